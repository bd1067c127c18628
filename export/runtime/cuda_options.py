"""Find the CUDA provider options that run one file fastest at one shape."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import BundleError
from export.runtime.latency import time_sessions
from export.runtime.providers import PROVIDERS, Runtime
from export.runtime.session import Run, bind, open_session

ON_CUDA = Runtime(PROVIDERS["cuda"], "f32")
# Each is added to the best options so far. The defaults: NCHW, no graph, exhaustive search for algorithms, TF32.
TRIALS: tuple[dict[str, str], ...] = (
    {"prefer_nhwc": "1"},
    {"enable_cuda_graph": "1"},
    {"cudnn_conv_algo_search": "HEURISTIC"},
    {"use_tf32": "0"},
)
FASTER = 0.98  # an option must save 2 % of the time to be kept


def fastest(model: Path, images: NDArray[np.float32], *, seconds: float) -> tuple[Run, dict[str, str], list[str]]:
    """Return a function that runs `model` fastest on `images`, its options, and a sentence for each trial that failed.

    Each trial is timed for `seconds`, interleaved with the best so far. Raises BundleError if the default options do not load.
    """
    options: dict[str, str] = {}
    best = bind(open_session(model, runs_in=ON_CUDA), images)
    skipped: list[str] = []
    for trial in TRIALS:
        wanted = options | trial
        try:
            run = bind(open_session(model, runs_in=ON_CUDA, provider_options=wanted), images)
        except BundleError as error:
            skipped.append(f"{describe(wanted)} does not load: {error}")
            continue
        timed = time_sessions({"best": best, "trial": run}, seconds=seconds, blocks=4)
        if timed["trial"].percentile(50) < FASTER * timed["best"].percentile(50):
            best, options = run, wanted
    return best, options, skipped


def describe(options: Mapping[str, str]) -> str:
    """Return options as name=value, or "the defaults"."""
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "the defaults"
