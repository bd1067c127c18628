"""Find the CUDA provider options that run one file fastest at one shape."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import BundleError
from export.onnx_file.targets import CUDA
from export.runtime.latency import time_sessions
from export.runtime.session import Run, bind, open_session

# Each is tried on top of what has won so far. The defaults: NCHW, no graph, an exhaustive search for algorithms, TF32.
TRIALS: tuple[dict[str, str], ...] = (
    {"prefer_nhwc": "1"},
    {"enable_cuda_graph": "1"},
    {"cudnn_conv_algo_search": "HEURISTIC"},
    {"use_tf32": "0"},
)
FASTER = 0.98  # a change must save 2 %, else the simpler options stay


def fastest(model: Path, images: NDArray[np.float32], *, seconds: float) -> tuple[Run, dict[str, str], list[str]]:
    """Return the call that runs `model` fastest on `images`, its options, and a sentence for each trial that failed.

    Each trial is timed in turns with the best so far, for `seconds`. Raises BundleError where the defaults do not load.
    """
    options: dict[str, str] = {}
    best = bind(open_session(model, provider=CUDA), images)
    skipped: list[str] = []
    for trial in TRIALS:
        wanted = options | trial
        try:
            run = bind(open_session(model, provider=CUDA, provider_options=wanted), images)
        except BundleError as error:
            skipped.append(f"{describe(wanted)} does not load: {error}")
            continue
        timed = time_sessions({"best": best, "trial": run}, seconds=seconds, blocks=4)
        if timed["trial"].percentile(50) < FASTER * timed["best"].percentile(50):
            best, options = run, wanted
    return best, options, skipped


def describe(options: Mapping[str, str]) -> str:
    """Return options as one writes them."""
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "the defaults"
