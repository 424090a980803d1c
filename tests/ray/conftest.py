"""A local S3-compatible server that fails on demand."""

import logging
import os
import threading

import pytest

# Before Ray starts, whose workers have the environment of that moment.
os.environ.update(
    AWS_ACCESS_KEY_ID="test",
    AWS_SECRET_ACCESS_KEY="test",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_DEFAULT_REGION="us-east-1",
)

_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>injected</Message></Error>"


class S3Server:
    """moto behind a filter: counts requests, and answers some with an error."""

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.requests = []
        self._failures, self._status, self._when = 0, "", lambda method, path: False
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fail(self, times, status="503 Slow Down", code="SlowDown", when=lambda method, path: True):
        """Answer the next `times` requests that `when` picks with an error."""
        self._failures, self._status, self._code, self._when = times, status, code, when

    def heal(self):
        self._failures = 0

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if self._failures and self._when(method, path):
            self._failures -= 1
            body = _ERROR.format(self._code).encode()
            start_response(self._status, [("Content-Length", str(len(body)))])
            return [body]
        return self._application(environ, start_response)

    def uri(self, run):
        address = self.endpoint.removeprefix("http://")
        return f"s3://bucket/{run}?endpoint_override={address}&scheme=http&region=us-east-1"

    def stop(self):
        self._server.shutdown()


@pytest.fixture(scope="session")
def s3_server():
    """The server, with an empty bucket named "bucket"."""
    import boto3

    server = S3Server()
    boto3.client("s3", endpoint_url=server.endpoint).create_bucket(Bucket="bucket")
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server):
    """The server without failures."""
    s3_server.heal()
    s3_server.requests.clear()
    yield s3_server
    s3_server.heal()
