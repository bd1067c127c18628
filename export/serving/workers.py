"""Process samples from a queue with one ONNX session, for a load generator to measure."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.errors import BundleError
from export.runtime.session import RUNTIME_ERRORS, first_line

Logits = NDArray[np.generic]


class Sample(Protocol):
    """A request for one image; `index` is the image's, `id` the request's."""

    @property
    def id(self) -> int: ...  # noqa: D102
    @property
    def index(self) -> int: ...  # noqa: D102


Complete = Callable[[Sequence[Sample], Logits], None]


class Workers:
    """Threads that each take up to `batch` waiting samples, run them, and pass the logits to `complete`.

    They share the session, whose runs release Python's lock. A failed run is completed with zeros, since the generator would
    otherwise wait for ever; `failure` has the reason.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, images: NDArray[np.generic], *, batch: int, complete: Complete
    ) -> None:
        self.session, self.images, self.batch, self.complete = session, images, batch, complete
        self.waiting: deque[Sample] = deque()
        self.changed = Condition()
        self.closed = False
        self.failure: str | None = None

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Run `count` threads while the block runs; raise BundleError afterwards if a run failed."""
        threads = [Thread(target=self.work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify_all()
            for thread in threads:
                thread.join()
        if self.failure:
            raise BundleError(f"the network cannot run under this load ({self.failure}): choose a smaller batch")

    def issue(self, samples: Iterable[Sample]) -> None:
        """Put samples into the queue and return at once."""
        with self.changed:
            self.waiting.extend(samples)
            self.changed.notify_all()

    def work(self) -> None:
        """Run waiting samples until the queue is closed and empty."""
        while taken := self.take():
            try:
                logits = self.run(taken)
            except RUNTIME_ERRORS as error:
                self.failure, logits = first_line(error), np.zeros((len(taken), 1), np.float32)
            self.complete(taken, logits)

    def take(self) -> list[Sample]:
        """Wait for samples and return them; empty when the queue is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            return [self.waiting.popleft() for _ in range(min(self.batch, len(self.waiting)))]

    def run(self, samples: Sequence[Sample]) -> Logits:
        """Return the logits, (samples, classes)."""
        (given,) = self.session.get_inputs()
        (logits,) = self.session.run(None, {given.name: self.images[[sample.index for sample in samples]]})
        return np.asarray(logits)


@dataclass(frozen=True)
class WarmUp:
    """A sample for measuring capacity."""

    id: int
    index: int


def capacity(
    session: onnxruntime.InferenceSession, images: NDArray[np.generic], *, batch: int, workers: int, seconds: float
) -> float:
    """Return the samples per second of the workers with a full queue, measured for about `seconds`.

    Raises BundleError if the network cannot run on a batch.
    """
    samples = [WarmUp(index, index % len(images)) for index in range(batch * workers)]
    ticks = [time.perf_counter()]
    while len(ticks) < 3 or ticks[-1] - ticks[0] < seconds:
        pool = Workers(session, images, batch=batch, complete=lambda *_: None)
        pool.issue(samples)
        with pool.running(workers):
            pass
        ticks.append(time.perf_counter())
    return len(samples) / float(np.median(np.diff(ticks[1:])))  # without the first round, which allocates memory
