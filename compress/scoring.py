"""A run's networks as ONNX files: written, scored, timed; and the layers whose quantization hurts most."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from compress.data.batches import Batch
from compress.errors import CompressError
from compress.pruning.blocks import Conditions
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, prepare
from compress.quant.sensitivity import Sensitivity, sensitivity
from compress.recipe import stages
from compress.run import Run, as_numpy
from export.onnx_file.graph import save_model, to_float16
from export.onnx_file.names import module_of
from export.onnx_file.targets import CPU, RUNS, TARGET_PROVIDERS, Target, host_target
from export.onnx_file.to_onnx import to_onnx
from export.proof.half import overflowing
from export.runtime.accuracy import Score, score_files, score_of
from export.runtime.latency import Ratio, speedup, time_sessions
from export.runtime.session import PROVIDERS, bind, open_session

LATENCY_SECONDS, LATENCY_BLOCKS = 0.5, 6
SENSITIVITY_IMAGES = 128  # each layer takes one pass over them
RANGE_IMAGES = 64  # that say which values leave half precision


def export_network(model: nn.Module, path: Path, run: Run, *, score: float, target: Target) -> None:
    """Write `model`, in eval mode on the CPU, whose accuracy in torch is `score`."""
    model = model.eval().to(memory_format=torch.contiguous_format)
    to_onnx(model, path, image_size=run.image_size, metadata=metadata_of(run, score=score, target=target))


def metadata_of(run: Run, *, score: float, target: Target) -> dict[str, str]:
    """Return what a file says of itself."""
    return {
        "task": run.recipe.task,
        "classes": json.dumps(run.dataset.classes),
        "preprocess": json.dumps(run.dataset.preprocess.to_json()),
        "recipe": run.recipe.name,
        "score_torch": f"{score:.4f}",
        "target": target.name,
    }


def write_float16(fp32: Path, path: Path, run: Run) -> tuple[str, ...]:
    """Write an FP32 file's half-precision twin; return the modules that stay in float32, for their values leave half precision."""
    model = onnx.load(fp32)
    keep = overflowing(model, (images for images, _ in as_numpy(run.calibration(RANGE_IMAGES))))
    save_model(to_float16(model, keep), path)
    return tuple(dict.fromkeys(map(module_of, keep)))


@dataclass(frozen=True)
class Served:
    """How a network would be served, as far as its time depends on it."""

    conditions: Conditions
    precision: str
    image_size: int
    target: Target

    def write(self, model: nn.Module, path: Path) -> None:
        """Write a network on the CPU, with ranges from random images: its time does not depend on them.

        Raises ModelError or BundleError where it cannot be quantized or written.
        """
        images = random_images(self.image_size)
        if self.precision == "int8":
            prepared = prepare(model, self.target, images)
            calibrate_(prepared, [images], "minmax")
            model = deploy(prepared)
        to_onnx(model, path, image_size=self.image_size, metadata={})
        if self.precision == "fp16":
            save_model(to_float16(onnx.load(path)), path)


def served(asked: stages.Conditions, run: Run) -> Served:
    """Return the conditions that a recipe asks for; what it leaves open is the target's.

    Raises CompressError where the target has no such precision.
    """
    own = "fp16" if run.target.precision == "fp16" else "fp32"
    if run.int8_targets and any(section.stage in ("ptq", "qat") for section in run.recipe.stages):
        own = "int8"
    if asked.precision == "int8" and not run.int8_targets:
        raise CompressError(f"prune.conditions.precision: {run.target.name} has no int8: take fp16, or leave it out")
    provider = PROVIDERS[asked.provider] if asked.provider else TARGET_PROVIDERS.get(run.target.name, CPU)
    conditions = Conditions(provider, asked.threads, asked.batch)
    return Served(conditions, asked.precision or own, asked.image_size or run.image_size, run.target)


def random_images(image_size: int) -> Tensor:
    """Return noise (3, 3, s, s): another batch than the exporter's example has."""
    return torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def runs_here(target: Target) -> bool:
    """Tell whether this machine's integer kernels compute what the target's do; elsewhere a file is scored unoptimized, which is exact."""
    return target.name in RUNS[host_target().name]


def score_file(path: Path, run: Run, batches: Iterator[Batch], *, optimize: bool) -> Score:
    """Run the batches' images through a file."""
    return score_files({path.stem: path}, as_numpy(batches), run.task.output, optimize=optimize)[path.stem]


def tuning_score(path: Path, run: Run, *, optimize: bool) -> Score:
    """Run the tuning images through a file and keep what tells how far its outputs are from another's."""
    batches = as_numpy(run.tuning())
    return score_files({path.stem: path}, batches, run.task.output, optimize=optimize, keep_evidence=True)[path.stem]


def faster_than(fp32: Path, run: Run, target: Target) -> Callable[[Path], Ratio | None]:
    """Return what tells how many times faster than `fp32` a file is: one image, one thread, in turns; None for another machine's files."""
    image = np.random.default_rng(0).standard_normal((1, 3, run.image_size, run.image_size), np.float32)

    def faster(path: Path) -> Ratio | None:
        if not runs_here(target):
            return None
        sessions = {name: bind(open_session(file, threads=1), image) for name, file in (("fp32", fp32), ("file", path))}
        timed = time_sessions(sessions, seconds=LATENCY_SECONDS, blocks=LATENCY_BLOCKS)
        return speedup(timed["fp32"], timed["file"])

    return faster


def worst_first(prepared: nn.Module, run: Run, *, images: int) -> tuple[Sensitivity, ...]:
    """Return every layer's damage, measured on at most `images` calibration images."""
    batches = list(run.calibration(min(SENSITIVITY_IMAGES, images), labelled=True))
    truths = torch.cat([batch.targets for batch in batches])

    def rows(outputs: Tensor) -> Tensor:
        return run.task.rows(outputs, truths)

    def score(outputs: Tensor) -> float:
        return score_of(run.task.output, [outputs.cpu().numpy()], [truths.cpu().numpy()]).score

    return sensitivity(prepared, [batch.images for batch in batches], rows=rows, score=score)
