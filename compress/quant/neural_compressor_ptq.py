"""neural-compressor's static quantization (PT2E: torch.export, torchao's X86InductorQuantizer), to compare ours with.

Its weights use all levels from -128 to 127 whatever the target, so they saturate on a CPU without VNNI.
"""

import contextlib
import copy
import io
import itertools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from export.onnx_file.targets import Target

# Its observers: "minmax" is a moving average of the extremes, "kl" the histogram range with the least squared error.
Algorithm = Literal["minmax", "kl"]
ALGORITHMS: tuple[Algorithm, ...] = ("minmax", "kl")


def off_grid(target: Target) -> str | None:
    """Return why its files do not fit the target, or None if they do."""
    return "its weights take levels from -128 to 127, off this target's grid" if target.weight_max < 127 else None


def quantize(model: nn.Module, batches: Iterable[Tensor], *, target: Target, algorithm: Algorithm) -> nn.Module:
    """Return a statically quantized copy of the float `model`; ranges come from `batches`, each (n, c, h, w) on the CPU.

    Raises ModelError if the model cannot be exported or quantized.
    """
    batches = iter(batches)
    first = next(batches)
    # When torch.export fails, it prints the partial graph.
    with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        # Its import would open a log file below HOME, and fail where that is read-only; 6 is off.
        os.environ["LOG_LEVEL_INC"] = "6"
        from neural_compressor.torch.export import export
        from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

        config = StaticQuantConfig(
            act_dtype="uint8" if target.unsigned_activations else "int8",
            act_sym=target.symmetric_activations,
            act_algo=algorithm,
        )
        example = torch.zeros(2, *first.shape[1:])  # torch.export would make a batch of 1 a constant
        try:
            exported = export(
                copy.deepcopy(model).eval(),
                example_inputs=(example,),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
            prepared = prepare(exported, config)
            for batch in itertools.chain([first], batches):
                prepared(batch)
            quantized: nn.Module = convert(prepared)
        # Its `export` raises RuntimeError for every failure; torchao's annotation raises AssertionError and ValueError.
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"neural-compressor cannot quantize {type(model).__name__} ({reason})") from error
    return quantized


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence neural-compressor, which logs every step to its own handler and warns about missing accelerators."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
