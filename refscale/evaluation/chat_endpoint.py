"""One attempt at an OpenAI-compatible chat endpoint, and what its failure means.

In: the body of a request. Out: text, tokens and finish reason, or `Refused`, which says whether to
try again, whether every other request would fail too, and how long to wait. The key travels in a
header alone: no redirect is followed, and no message or file holds it.
"""

import email.utils
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# The next request would be refused for the same reason.
_HOPELESS = {401, 402, 403, 404, 405}
_MAX_REPLY_BYTES = 16 << 20


class Refused(Exception):
    """An attempt failed.

    Args:
        message: Why.
        retry: Whether another attempt may succeed.
        hopeless: Whether every other request would fail too.
        after_s: What the endpoint asked to wait.
    """

    def __init__(
        self, message: str, *, retry: bool, hopeless: bool = False, after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry, self.hopeless, self.after_s = retry, hopeless, after_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would send the key on to wherever it points."""

    def redirect_request(self, *_args: Any, **_options: Any) -> None:
        return None


class ChatEndpoint:
    """A chat endpoint.

    Args:
        base_url: Its address, without /chat/completions.
        key: Sent as a bearer token; None sends none.
        timeout_s: Seconds for one attempt.
    """

    def __init__(self, base_url: str, key: str | None, timeout_s: float) -> None:
        self._url, self._key, self._timeout_s = f"{base_url}/chat/completions", key, timeout_s
        self._opener = urllib.request.build_opener(_NoRedirect)

    def post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One attempt: text, prompt_tokens, completion_tokens and finish_reason.

        Raises:
            Refused: No chat completion came back.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "refscale"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self._timeout_s
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return _reply(_read(response, deadline))
        except urllib.error.HTTPError as exc:
            said = self._without_key(_said(exc))
            raise Refused(
                f"HTTP {exc.code}: {' '.join(said.split())[:300] or exc.reason}",
                retry=exc.code in _RETRIED,
                hopeless=exc.code in _HOPELESS,
                after_s=_retry_after(exc.headers.get("Retry-After")),
            ) from exc
        except (OSError, http.client.HTTPException) as exc:
            # Timeouts, refused and cut connections; urllib wraps some of them.
            reason = getattr(exc, "reason", exc)
            message = self._without_key(str(reason) or type(reason).__name__)
            raise Refused(f"{type(reason).__name__}: {message}", retry=True) from exc

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of an error's body, if it comes."""
    try:
        with error:
            return error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""  # the status alone must do


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body. A socket's timeout is per read: a trickle would pass it for ever."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the reply took longer than timeout_s")
        if size > _MAX_REPLY_BYTES:
            raise Refused(f"the reply exceeds {_MAX_REPLY_BYTES:,} bytes", retry=False)
    return b"".join(parts)


def _reply(data: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(data)
        choice = reply["choices"][0]
        text = choice["message"].get("content")
        usage = reply.get("usage") or {}
        return {
            "text": valid_text(text) if isinstance(text, str) else "",
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "finish_reason": choice.get("finish_reason"),
        }
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        shown = " ".join(data[:200].decode("utf-8", "replace").split())
        raise Refused(f"not a chat completion: {shown!r}", retry=True) from exc


def valid_text(text: str) -> str:
    """Without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or an HTTP date."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    except ValueError:
        try:
            return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
        except ValueError:
            return None
