"""Write, score and time a run's ONNX files; rank layers by the damage of their quantization."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn

from compress.data.batches import Batch
from compress.data.feed import as_numpy
from compress.errors import CompressError
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, prepare
from compress.quant.rows import GroupRow
from compress.quant.sensitivity import sensitivity
from compress.recipe import stages
from compress.recipe.arguments import providers_of
from compress.run import Run
from export.images.size import Shape, size_of
from export.names import CLASSES_KEY, PREPROCESS_KEY, SCORE_KEY, TARGET_KEY, TASK_KEY
from export.onnx_file.graph import save_model, to_float16
from export.onnx_file.names import module_of
from export.onnx_file.outputs import Output
from export.onnx_file.roles import FP32
from export.onnx_file.targets import CPU, RUNS, TARGET_PROVIDERS, Target, host_target
from export.onnx_file.to_onnx import to_onnx
from export.proof.half import overflowing
from export.runtime.accuracy import Score, score_files, score_of
from export.runtime.conditions import Conditions
from export.runtime.latency import Ratio, speedup, time_sessions
from export.runtime.measure import BenchPlan, trusted
from export.runtime.providers import PLAIN, PROVIDERS, Arithmetic, Runtime
from export.runtime.rows import file_in
from export.runtime.session import bind, infer, open_session

LATENCY_SECONDS, LATENCY_BLOCKS = 0.5, 6
SENSITIVITY_IMAGES = 128  # there is one pass over them for each layer
RANGE_IMAGES = 64  # for finding values that exceed half precision


def export_network(model: nn.Module, path: Path, run: Run, *, score: float, target: Target) -> None:
    """Write `model`, which is on the CPU, with its `score` in torch as metadata."""
    model = model.eval().to(memory_format=torch.contiguous_format)
    metadata = metadata_of(run, score=score, target=target)
    to_onnx(model, path, shape=run.shape, metadata=metadata, outputs=run.dataset.outputs)


def metadata_of(run: Run, *, score: float, target: Target) -> dict[str, str]:
    """Return a file's metadata."""
    return {
        TASK_KEY: run.recipe.task if run.dataset.decoder is None else "tensors",  # which the file alone computes
        CLASSES_KEY: json.dumps(run.dataset.classes),
        PREPROCESS_KEY: json.dumps(run.dataset.preprocess.to_json()),
        "recipe": run.recipe.name,
        SCORE_KEY: f"{score:.4f}",
        TARGET_KEY: target.name,
    }


def write_float16(fp32: Path, path: Path, run: Run) -> tuple[str, ...]:
    """Write an FP32 file as FP16; return the modules that stay in float32, as their values exceed half precision."""
    model = onnx.load(fp32)
    keep = overflowing(model, (images for images, _ in as_numpy(run.feed.calibration(RANGE_IMAGES))))
    save_model(to_float16(model, keep), path)
    return tuple(dict.fromkeys(map(module_of, keep)))


@dataclass(frozen=True)
class Served:
    """The conditions of serving on which a network's latency depends."""

    conditions: Conditions
    precision: str
    shape: Shape
    target: Target
    outputs: tuple[Output, ...] = ()
    keep_float: tuple[str, ...] = ()  # modules, if the precision is int8

    def write(self, model: nn.Module, path: Path) -> None:
        """Write a network on the CPU, with ranges from random images, on which its latency does not depend.

        Raises ModelError or BundleError where it cannot be quantized or written.
        """
        images = random_images(self.shape)
        if self.precision == "int8":
            prepared = prepare(model, self.target, images, keep_float=self.keep_float)
            calibrate_(prepared, [images], "minmax")
            model = deploy(prepared)
        to_onnx(model, path, shape=self.shape, metadata={}, outputs=self.outputs)
        if self.precision == "fp16":
            save_model(to_float16(onnx.load(path)), path)


def served(asked: stages.ServingConditions, run: Run) -> Served:
    """Return a recipe's conditions, with the target's where they are null.

    Raises CompressError where the target has no such precision.
    """
    own = "fp16" if run.target.precision == "fp16" else "fp32"
    if run.int8_targets and any(section.stage in ("ptq", "qat") for section in run.recipe.stages):
        own = "int8"
    if asked.precision == "int8" and not run.int8_targets:
        raise CompressError(f"prune.conditions.precision: {run.target.name} has no int8: use fp16, or leave it out")
    provider = PROVIDERS[asked.provider].name if asked.provider else TARGET_PROVIDERS.get(run.target.name, CPU)
    precision = "fp32" if asked.precision == "bf16" else asked.precision or own
    arithmetic: Arithmetic = "bf16" if asked.precision == "bf16" else "f32"
    conditions = Conditions(provider, asked.threads, asked.batch, arithmetic)
    channels, *size = run.shape
    shape = (channels, *(size_of(asked.image_size or size)))
    return Served(conditions, precision, shape, run.target, run.dataset.outputs)


def random_images(shape: Shape) -> Tensor:
    """Return noise (3, *shape), whose batch size differs from the exporter's example."""
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def difference(model: nn.Module, session: InferenceSession, images: Tensor) -> tuple[float, float]:
    """Return how far a file's outputs for images are from the network's at most, and the network's largest output."""
    outputs = infer(session, images.contiguous().numpy())
    with torch.no_grad():
        wanted = model(images)
    return float((torch.from_numpy(outputs) - wanted).abs().max()), float(wanted.abs().max())


def runs_here(target: Target) -> bool:
    """Tell whether this machine's integer kernels compute what the target's do; if not, files are scored unoptimized."""
    return target.name in RUNS[host_target().name]


def score_file(path: Path, run: Run, batches: Iterator[Batch], *, optimize: bool) -> Score:
    """Score a file on the batches."""
    return score_files({path.stem: path}, as_numpy(batches), run.task.output, optimize=optimize)[path.stem]


def tuning_score(path: Path, run: Run, *, optimize: bool) -> Score:
    """Score a file on the tuning images; keep the evidence for its divergence from another file."""
    batches = as_numpy(run.feed.tuning())
    return score_files({path.stem: path}, batches, run.task.output, optimize=optimize, keep_evidence=True)[path.stem]


def faster_than(
    fp32: Path, run: Run, target: Target, *, blocks: int = LATENCY_BLOCKS
) -> Callable[[Path], Ratio | None]:
    """Return a function that times a file and `fp32` in turns (one image, one thread), and returns the speed-up.

    Each is taken in the CPU's provider and arithmetic that is the fastest for it, among those of the recipe. It returns None for another
    machine's target.
    """
    image = np.random.default_rng(0).standard_normal((1, *run.shape), np.float32)
    on_cpu = [key for key in providers_of(run.recipe) if PROVIDERS[key].device == "cpu"] or ["cpu"]

    @cache
    def places() -> list[Runtime]:
        channels, height, width = run.shape
        plan = BenchPlan(providers=on_cpu, seed=run.recipe.seed)
        return [one.runs_in for one in trusted({FP32: fp32}, plan, channels=channels, size=(height, width))[0]]

    def faster(path: Path) -> Ratio | None:
        if not runs_here(target):
            return None
        files = {(name, place): file for place in places() for name, file in ((FP32, fp32), ("file", path))}
        sessions = {
            file_in(name, place): bind(open_session(file, threads=1, runs_in=place), image)
            for (name, place), file in files.items()
        }
        clock = time.thread_time if places() == [PLAIN] else time.perf_counter
        timed = time_sessions(sessions, seconds=LATENCY_SECONDS / LATENCY_BLOCKS * blocks, blocks=blocks, clock=clock)
        best = {
            name: min((timed[file_in(name, place)] for place in places()), key=lambda timing: timing.percentile(50))
            for name in (FP32, "file")
        }
        return speedup(best[FP32], best["file"])

    return faster


def worst_first(
    prepared: nn.Module, run: Run, *, images: int, tell: Callable[[str], None] = lambda _: None
) -> tuple[GroupRow, ...]:
    """Return every layer's sensitivity, the worst first, measured on at most `images` calibration images."""
    batches = list(run.feed.calibration(min(SENSITIVITY_IMAGES, images), labelled=True))
    truths = torch.cat([batch.targets for batch in batches])

    def rows(outputs: Tensor) -> Tensor:
        return run.task.rows(outputs, truths)

    def score(outputs: Tensor) -> float:
        return score_of(run.task.output, [outputs.cpu().numpy()], [truths.cpu().numpy()]).score

    return sensitivity(prepared, [batch.images for batch in batches], rows=rows, score=score, tell=tell)
