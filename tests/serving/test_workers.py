"""The workers that a load generator talks to: every sample is answered once, with its own image's logits."""

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx_files import classifier, save

from export.errors import BundleError
from export.runtime.session import open_session
from export.serving.workers import Sample, WarmUp, Workers, capacity

IMAGES = np.random.default_rng(0).standard_normal((5, 3, 16, 16), np.float32)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_session(save(classifier(), tmp_path_factory.mktemp("workers") / "net.onnx"), threads=1)


@pytest.mark.parametrize("count", [1, 3])
def test_every_sample_is_answered_once_with_the_logits_of_its_image(session: Any, count: int) -> None:
    answers: dict[int, NDArray[Any]] = {}
    batches: list[list[int]] = []

    def complete(samples: Sequence[Sample], logits: NDArray[Any]) -> None:
        batches.append([sample.id for sample in samples])
        answers.update({sample.id: row for sample, row in zip(samples, logits, strict=True)})

    pool = Workers(session, IMAGES, batch=4, complete=complete)
    samples = [WarmUp(id=100 + number, index=number * 3 % 5) for number in range(37)]
    with pool.running(count):
        for sample in samples[:10]:
            pool.issue([sample])
        pool.issue(samples[10:])
    assert sorted(chain(*batches)) == [sample.id for sample in samples]
    assert max(map(len, batches)) <= 4
    (expected,) = session.run(None, {"input": IMAGES})
    for sample in samples:
        np.testing.assert_allclose(answers[sample.id], expected[sample.index], rtol=1e-5)


def test_a_run_that_fails_is_completed_all_the_same_and_then_named() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory\nat line 1")

    broken: Any = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="input")], run=fail)
    done: list[int] = []
    pool = Workers(broken, IMAGES, batch=2, complete=lambda samples, _: done.extend(one.id for one in samples))
    with pytest.raises(BundleError, match=r"cannot run under this load \(out of memory\)"), pool.running(2):
        pool.issue(WarmUp(number, 0) for number in range(5))
    assert sorted(done) == [0, 1, 2, 3, 4]


def test_the_capacity_is_that_of_a_network_of_known_speed() -> None:
    def run(_: None, given: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        time.sleep(0.01)
        return [np.zeros((len(given["input"]), 3))]

    sleeper: Any = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="input")], run=run)
    # 4 images in 10 ms by each of two workers; threads and a busy machine cost some of it.
    assert 200 < capacity(sleeper, IMAGES, batch=4, workers=2, seconds=0.2) <= 800


def test_a_network_that_cannot_run_has_no_capacity(tmp_path: Path) -> None:
    other = open_session(save(classifier(size=24, pooled=False), tmp_path / "net.onnx"), threads=1)
    with pytest.raises(BundleError, match="cannot run under this load"):
        capacity(other, IMAGES, batch=2, workers=1, seconds=0.1)
