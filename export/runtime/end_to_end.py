"""Time a file from an image's bytes to the prediction: read and preprocess, run the network, decode its output."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from export.images.preprocess import Preprocess
from export.images.read import read_pixels
from export.runtime.session import infer, open_session
from export.tasks.task import OutputTask


class EndToEnd(TypedDict):
    """Medians over images and rounds, in ms; one image at a time, one thread."""

    read_ms: float
    network_ms: float
    answer_ms: float
    images: int


def end_to_end(
    model: Path, images: Sequence[Path], preprocess: Preprocess, task: OutputTask, *, seconds: float
) -> EndToEnd:
    """Time one file on the images in turn for `seconds`, at least twice on each."""
    session = open_session(model, threads=1)
    clock, times = time.perf_counter, list[tuple[float, float, float]]()
    end = clock() + seconds
    while len(times) <= 2 * len(images) or clock() < end:
        start = clock()
        pixels = preprocess.normalize(read_pixels(images[len(times) % len(images)], preprocess)[None])
        read = clock()
        outputs = infer(session, pixels)
        ran = clock()
        task.decode(outputs)
        times.append((read - start, ran - read, clock() - ran))
    read_ms, network_ms, answer_ms = np.median(np.array(times[1:]) * 1e3, axis=0).tolist()  # the first warms up
    return EndToEnd(read_ms=read_ms, network_ms=network_ms, answer_ms=answer_ms, images=len(images))
