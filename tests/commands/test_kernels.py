"""What `compress doctor --speed` times and says."""

import pytest

from compress.commands.kernels import as_text, gains, measure


@pytest.mark.slow
def test_three_blocks_are_timed_in_float_and_int8() -> None:
    found = measure(seconds=0.01)
    assert list(found) == ["convolution", "depthwise", "attention"]
    assert {gain.place for gain in gains(found)} >= {"FP32 in CPU", "INT8 in CPU"}
    text = as_text(found)
    assert "INT8 in CPU" in text.splitlines()[-1]
    assert text.splitlines()[-1].startswith("On these three blocks: ")
