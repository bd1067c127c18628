"""Checks of requests that need no server: lengths, text, and the form of a refusal."""

import asyncio
import json
from typing import Any

import pytest

from export.serving.requests import StatedLengthLimit, error, misfit, not_text

LENGTH = "inference-header-content-length"


def body_of(inputs: list[dict[str, Any]], tensors: int) -> tuple[bytes, dict[str, str]]:
    header = json.dumps({"inputs": inputs}).encode()
    return header + bytes(tensors), {LENGTH: str(len(header))}


def sized(size: int) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": size}}


@pytest.mark.parametrize(
    ("inputs", "tensors", "fits"),
    [
        ([sized(12)], 12, True),
        ([sized(12), sized(4)], 16, True),
        ([{"data": [1, 2]}], 0, True),
        ([sized(12)], 16, False),
        ([sized(12)], 8, False),
        ([{**sized(12), "data": [1, 2, 3]}], 12, False),  # KServe would not read the twelve bytes
        ([], 1, False),
    ],
)
def test_a_binary_body_is_as_long_as_its_parts_say(inputs: list[dict[str, Any]], tensors: int, fits: bool) -> None:
    body, headers = body_of(inputs, tensors)
    assert (misfit(body, headers) == "") == fits


def test_a_misfit_names_the_three_lengths() -> None:
    body, headers = body_of([sized(12)], 8)
    assert misfit(body, headers) == (
        f"the JSON has {len(body) - 8} bytes and the tensors have 12 by their binary_data_size, but the body has {len(body)}"
    )


@pytest.mark.parametrize(
    ("name", "lone"), [("\ud800", True), ("a\udfff", True), ("😀", False), ("", False), (None, False)]
)
def test_half_a_surrogate_pair_is_no_text(name: str | None, lone: bool) -> None:
    assert not_text(name) == lone


def test_an_error_is_one_short_line_that_can_be_sent() -> None:
    sentence = error("two\nlines \ud800 " + "x" * 1000)["error"]
    assert sentence.encode().startswith(rb"two lines \ud800 xxx")
    assert len(sentence) == 500


@pytest.mark.parametrize(("length", "status"), [(None, 200), (b"10", 200), (b"11", 413)])
def test_a_longer_body_is_refused_unread_and_in_json(length: bytes | None, status: int) -> None:
    sent: list[dict[str, Any]] = []

    async def app(*_: object) -> None:
        sent.append({"status": 200})

    async def receive() -> None:
        raise AssertionError("the body was read")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", length)]
    asyncio.run(StatedLengthLimit(app, most=10)({"type": "http", "headers": headers}, receive, send))
    assert sent[0]["status"] == status
    if status == 413:
        assert dict(sent[0]["headers"])[b"content-type"] == b"application/json"
        assert json.loads(sent[1]["body"]) == {"error": "the body has 11 bytes, allowed are 10: send fewer images"}
