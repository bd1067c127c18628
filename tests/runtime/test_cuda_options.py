from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from export.errors import BundleError
from export.runtime import cuda_options
from export.runtime.cuda_options import TRIALS, describe, fastest
from export.runtime.latency import Timing

Run = Callable[[], None]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, float | None]:
    """Replace CUDA by a table: the milliseconds of each option, as a factor, or None where it does not load."""
    factors: dict[str, float | None] = {}
    cost: dict[Run, float] = {}

    def open_planted(model: Path, *, runs_in: object, provider_options: Mapping[str, str] | None = None) -> float:
        duration = 10.0
        for option in provider_options or {}:
            factor = factors.get(option, 1.0)
            if factor is None:
                raise BundleError(f"{option} is not for this network")
            duration *= factor
        return duration

    def bind_planted(duration: float, images: np.ndarray) -> Run:
        def run() -> None: ...

        cost[run] = duration
        return run

    def time_planted(sessions: Mapping[str, Run], *, seconds: float, blocks: int) -> dict[str, Timing]:
        return {name: Timing((np.array([cost[run]]),)) for name, run in sessions.items()}

    monkeypatch.setattr(cuda_options, "open_session", open_planted)
    monkeypatch.setattr(cuda_options, "bind", bind_planted)
    monkeypatch.setattr(cuda_options, "time_sessions", time_planted)
    return factors


def found() -> tuple[dict[str, str], list[str]]:
    _, options, skipped = fastest(Path("m.onnx"), np.zeros((1, 3, 8, 8), np.float32), seconds=1.0)
    return options, skipped


def test_options_that_help_are_kept_together_and_others_left_out(planted: dict[str, float | None]) -> None:
    planted.update(prefer_nhwc=0.8, enable_cuda_graph=0.5, cudnn_conv_algo_search=1.3, use_tf32=2.0)
    assert found() == ({"prefer_nhwc": "1", "enable_cuda_graph": "1"}, [])


def test_a_gain_too_small_to_tell_leaves_the_simpler_options(planted: dict[str, float | None]) -> None:
    planted.update(prefer_nhwc=0.99)
    assert found() == ({}, [])


def test_options_that_do_not_load_are_skipped_and_named(planted: dict[str, float | None]) -> None:
    planted.update(enable_cuda_graph=None, prefer_nhwc=0.5)
    options, skipped = found()
    assert options == {"prefer_nhwc": "1"}
    assert skipped == ["prefer_nhwc=1, enable_cuda_graph=1 does not load: enable_cuda_graph is not for this network"]


def test_options_read_as_one_writes_them() -> None:
    assert describe({}) == "the defaults"
    assert describe(TRIALS[0] | TRIALS[1]) == "prefer_nhwc=1, enable_cuda_graph=1"
