"""A local OpenAI-compatible endpoint whose behaviour a test scripts, request by request."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from refscale.evaluation.judge import JudgeConfig


@dataclass
class Reply:
    """What the endpoint does with one request."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of a chat completion
    delay_s: float = 0.0
    cut: bool = False  # close the connection in the middle of the body


class JudgeServer:
    """Use as a context manager. `script(number, request)` answers the number-th request."""

    def __init__(self, script: Callable[[int, dict], Reply | str]) -> None:
        self.script, self.requests, self.headers, self.times = script, [], [], []
        self.most_in_flight = self._in_flight = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def config(self, **changes: object) -> JudgeConfig:
        """A judge at this endpoint that waits little."""
        options = {"base_url": self.url, "model": "scripted", "backoff_s": 0.01, "timeout_s": 5}
        return JudgeConfig.model_validate({**options, **changes})

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        request = json.loads(body)
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            reply = self.script(number, request)
            if isinstance(reply, str):
                reply = Reply(reply)
            time.sleep(reply.delay_s)
            self._send(handler, reply)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has given up, as some tests want
        finally:
            with self._lock:
                self._in_flight -= 1

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        data = reply.body
        if data is None:
            completion = {
                "choices": [{"message": {"content": reply.text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            }
            data = json.dumps(completion).encode()
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if reply.cut else data)
