"""Measure what compiling a network costs and gains in training."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from compress.errors import CompressError

WARM_UP, TIMED = 2, 5  # steps


def compare(
    trial: Callable[[nn.Module], None], eager: nn.Module, compiled: nn.Module, *, device: torch.device, steps: int
) -> str:
    """Time training steps of both networks and say after how many of the `steps` compiling pays.

    `compiled` runs for the first time here. Raises CompressError where torch cannot compile it on this machine.
    """
    for _ in range(WARM_UP):
        trial(eager)
    eager_s = median(_time(trial, eager, device) for _ in range(TIMED))
    try:
        first_s = sum(_time(trial, compiled, device) for _ in range(WARM_UP))
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise CompressError(
            f"fit.compile: torch cannot compile this network here ({reason}); set fit.compile: false, "
            "or install a C++ compiler (g++) and Python's headers"
        ) from error
    compiled_s = median(_time(trial, compiled, device) for _ in range(TIMED))
    return describe(eager_s, compiled_s, first_s - WARM_UP * compiled_s, steps)


def describe(eager_s: float, compiled_s: float, compile_s: float, steps: int) -> str:
    """Return the comparison in words."""
    took = f"compiled in {compile_s:.0f} s; a step takes {1e3 * compiled_s:.3g} ms instead of {1e3 * eager_s:.3g}"
    if compiled_s >= eager_s:
        return f"{took}: never pays here, fit.compile: false is faster"
    pays = int(compile_s / (eager_s - compiled_s)) + 1
    return f"{took}: pays after {pays:,} steps, {'and' if pays < steps else 'but'} this training has {steps:,} left"


def _time(trial: Callable[[nn.Module], None], network: nn.Module, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    trial(network)
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
