"""Score and time a stage's candidate files, and find the layers whose quantization hurts most: what `ptq` and `qat` choose by."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from compress.quant.sensitivity import Sensitivity, sensitivity
from compress.run import Run, as_numpy
from export.onnx_file.targets import RUNS, Target, host_target
from export.runtime.accuracy import Score, score
from export.runtime.latency import speedup, time_sessions
from export.runtime.session import bind, open_session

LATENCY_SECONDS, LATENCY_BLOCKS = 0.5, 6
SENSITIVITY_IMAGES = 128  # each layer takes one pass over them


def runs_here(target: Target) -> bool:
    """Tell whether this machine's integer kernels compute what the target's do; elsewhere a file is scored unoptimized, which is exact."""
    return target.name in RUNS[host_target().name]


def score_file(path: Path, run: Run, *, images: int | None, optimize: bool) -> Score:
    """Run the validation images (so many of them, all where None) through a file."""
    return score({path.stem: path}, as_numpy(run.validation(limit=images)), optimize=optimize)[path.stem]


def faster_than(fp32: Path, run: Run, target: Target) -> Callable[[Path], float | None]:
    """Return what tells how many times faster than `fp32` a file is: one image, one thread, in turns; None for another machine's files."""
    image = np.random.default_rng(0).standard_normal((1, 3, run.image_size, run.image_size), np.float32)

    def latency_ratio(path: Path) -> float | None:
        if not runs_here(target):
            return None
        sessions = {name: bind(open_session(file, threads=1), image) for name, file in (("fp32", fp32), ("file", path))}
        timed = time_sessions(sessions, seconds=LATENCY_SECONDS, blocks=LATENCY_BLOCKS)
        return speedup(timed["fp32"], timed["file"]).ratio

    return latency_ratio


def worst_first(prepared: nn.Module, run: Run, *, images: int) -> tuple[Sensitivity, ...]:
    """Return every layer's damage, measured on at most `images` calibration images."""
    batches = run.calibration(min(SENSITIVITY_IMAGES, images))
    return sensitivity(prepared, [(batch.images, batch.targets) for batch in batches])
