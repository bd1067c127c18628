"""What KServe's SDK and Starlette leave to us when a request comes: its lengths, its text, the form of a refusal. Needs neither."""

import json
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

App = Callable[[Any, Any, Any], Awaitable[None]]
MOST_CHARACTERS = 500  # of an error


class StatedLengthLimit:
    """ASGI middleware that refuses a body of more than `most` bytes, as its header states them, without reading it."""

    def __init__(self, app: App, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, or send the protocol's error."""
        stated = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if int(stated) <= self.most:
            return await self.app(scope, receive, send)
        body = json.dumps(
            error(f"the body has {int(stated)} bytes, allowed are {self.most}: send fewer images")
        ).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return None


def error(sentence: str) -> dict[str, str]:
    """Return the protocol's error, on one line, short, and of characters that UTF-8 has."""
    return {"error": " ".join(sentence.encode(errors="backslashreplace").decode().split())[:MOST_CHARACTERS]}


def misfit(body: bytes, headers: Mapping[str, str]) -> str:
    """Return a sentence if a body of JSON and binary tensors is not as long as its parts say, else an empty string.

    Raises ValueError, LookupError, TypeError or AttributeError if the JSON is no inference request.
    """
    length = int(headers["inference-header-content-length"])
    inputs = json.loads(body[:length])["inputs"]
    sizes = [(one.get("parameters") or {}).get("binary_data_size", 0) for one in inputs if one.get("data") is None]
    if length + sum(sizes) == len(body):
        return ""
    return f"the JSON has {length} bytes and the tensors have {sum(sizes)} by their binary_data_size, but the body has {len(body)}"


def not_text(name: str | None) -> bool:
    """Tell whether a name holds half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    return any(0xD800 <= ord(letter) <= 0xDFFF for letter in name or "")
