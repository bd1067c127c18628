"""neural-compressor's static quantization (PT2E: torch.export, torchao's X86InductorQuantizer): a baseline beside our own.

Its weights always take the whole range from -128 to 127, whatever the target: where a CPU has no VNNI they saturate.
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

# Its names for the observers: a moving average of the extremes, and a histogram whose range has the least squared error.
Algorithm = Literal["minmax", "kl"]
ALGORITHMS: tuple[Algorithm, ...] = ("minmax", "kl")


def off_grid(target: Target) -> str | None:
    """Return why its files are not for the target, None where they are."""
    return "its weights take levels from -128 to 127, off this target's grid" if target.weight_max < 127 else None


def quantize(model: nn.Module, batches: Iterable[Tensor], *, target: Target, algorithm: Algorithm) -> nn.Module:
    """Return the float `model` statically quantized, with ranges from `batches`, each (n, 3, s, s) on the CPU; `model` stays as it is.

    Raises ModelError where it cannot be exported or quantized.
    """
    batches = iter(batches)
    first = next(batches)
    # Where torch.export fails it prints the graph so far.
    with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        os.environ["LOG_LEVEL_INC"] = (
            "6"  # off: else its import opens a log below HOME, and fails where that cannot be written
        )
        from neural_compressor.torch.export import export
        from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

        config = StaticQuantConfig(
            act_dtype="uint8" if target.unsigned_activations else "int8",
            act_sym=target.symmetric_activations,
            act_algo=algorithm,
        )
        example = torch.zeros(2, *first.shape[1:])  # torch.export would specialise a batch of 1
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
        # Its `export` turns every failure into a RuntimeError; torchao's annotation of partitions asserts and raises ValueError.
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"neural-compressor cannot quantize {type(model).__name__} ({reason})") from error
    return quantized


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence neural-compressor, which logs every step to its own handler and warns of accelerators that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
