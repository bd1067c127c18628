"""Score ONNX files on the run's validation images, and time them, where stages must choose between files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.run import Run, as_numpy
from export.accuracy import Score
from export.latency import speedup, time_sessions
from export.session import bind, open_session
from export.targets import Target, host_target

LATENCY_SECONDS, LATENCY_BLOCKS = 0.5, 6
# Whose files this machine runs as that target would; others are scored unoptimized, where the file's own arithmetic is exact.
RUNS = {"cpu_avx2": ("cpu_avx2",), "cpu_vnni": ("cpu_vnni", "cpu_avx2"), "cpu_arm": ("cpu_arm",)}


def runs_here(target: Target) -> bool:
    """Tell whether this machine's integer kernels compute what the target's do."""
    return target.name in RUNS[host_target().name]


def score_files(files: Sequence[Path], run: Run, *, images: int | None, optimize: bool) -> list[Score]:
    """Run the validation images (so many of them, all where None) through every file."""
    sessions = [open_session(path, optimize=optimize) for path in files]
    answers: list[list[NDArray[np.int64]]] = [[] for _ in files]
    labels: list[NDArray[np.int64]] = []
    for batch, targets in as_numpy(run.validation(limit=images)):
        labels.append(targets)
        for session, predictions in zip(sessions, answers, strict=True):
            (logits,) = session.run(None, {session.get_inputs()[0].name: batch})
            predictions.append(np.argmax(logits, axis=1))  # (batch,)
    return [Score(np.concatenate(predictions), np.concatenate(labels)) for predictions in answers]


def latency_ratio(fp32: Path, path: Path, image_size: int) -> float:
    """Return the FP32 file's time divided by this file's: one image, one thread, in turns."""
    image = np.random.default_rng(0).standard_normal((1, 3, image_size, image_size), np.float32)
    sessions = {name: bind(open_session(file, threads=1), image) for name, file in (("fp32", fp32), ("file", path))}
    timed = time_sessions(sessions, seconds=LATENCY_SECONDS, blocks=LATENCY_BLOCKS)
    return speedup(timed["fp32"], timed["file"]).ratio
