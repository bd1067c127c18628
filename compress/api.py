"""The chain in three lines of Python: prune, quantize, export; the algorithms and defaults are those of the stages."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.errors import CompressError
from compress.models.structure import classifier, width_cost
from compress.pruning.goals import Goal
from compress.pruning.plan import choose, cut_, find_groups, smallest_widths
from compress.pruning.planner import options_of
from compress.pruning.recovery.reconstruction import (
    JUDGED,
    affordable_images,
    kept_outputs,
    number_outputs,
    reconstruct,
)
from compress.pruning.surgeon import input_covariances
from compress.quant.bias_correction import corrected, float_means, images_to_correct_with
from compress.quant.calibrate import METHODS, collect, set_ranges_
from compress.quant.prepare import deploy, prepare
from compress.quant.reference import reference_of
from compress.recipe.stages import PruneStage, PtqStage
from export.audit import Audit, audit
from export.names import TASK_KEY
from export.onnx_file.graph import INPUT
from export.onnx_file.targets import resolve_target
from export.onnx_file.to_onnx import to_onnx
from export.runtime.session import open_session
from export.tasks import task_named
from export.verify import verify

BATCH = 32
HELD_OUT = 4  # every fourth image chooses the ranges
SHOWN = "images"  # where a quantized network keeps some images, on which its file is compared with it
TOLERANCE = 1e-3  # of a float file from its network, over the outputs' largest value
Images = Iterable[Any] | Tensor
"""Normalized images (n, channels, height, width): a tensor, an array, or batches of them, alone or first in a tuple."""


def prune(model: nn.Module, images: Images, *, keep_macs: float, exclude: Sequence[str] = ()) -> nn.Module:
    """Return a copy with this fraction of the multiply-accumulates, its weights solved on unlabelled images; in eval mode.

    Layers that match `exclude` (shell patterns) and the classifier keep their outputs. Raises CompressError where it cannot be cut so far.
    """
    if not 0 < keep_macs < 1:
        raise CompressError(f"keep_macs: must be above 0 and below 1, got {keep_macs}")
    cfg = PruneStage(stage="prune", keep_macs=keep_macs, exclude=tuple(exclude))
    whole = copy.deepcopy(model).cpu().eval()
    student, goal = copy.deepcopy(whole), Goal("keep_macs", "macs", keep_macs)
    shown = torch.cat(list(_batches(images, cfg.reconstruct_images * JUDGED // (JUDGED - 1))))
    example, fixed = shown[:1], (classifier(student), *cfg.exclude)
    groups = find_groups(
        student,
        example,
        cfg.criterion,
        exclude=fixed,
        covariances=input_covariances(student, shown[: cfg.score_images].split(BATCH)),
    )
    smallest = smallest_widths(groups, cfg.min_keep)
    options = options_of(student, groups, example, scope=cfg.scope, round_to=cfg.round_to, min_channels=smallest)
    shape = (example.shape[1], example.shape[2], example.shape[3])
    cost = width_cost(student, options.layers, "macs", shape)
    budget = goal.budget(options.full(cost), least=options.least(cost))
    cuts, numbered = choose(options, cost, budget), number_outputs(student)
    cut_(student, example, cuts)
    cut_(numbered, example, cuts)
    shown = shown[: affordable_images(whole, example)]
    student, _ = reconstruct(student.eval(), whole, kept_outputs(numbered), shown, "least_squares", views=shown)
    return student.eval()


@torch.no_grad()
def quantize(model: nn.Module, images: Images, *, target: str = "auto") -> fx.GraphModule:
    """Return the network fake-quantized for a target, calibrated on unlabelled images, biases corrected; it can be trained on.

    Ranges are by the method whose outputs are nearest to the float network's on every fourth image. `auto` is this machine's target.
    """
    resolved = resolve_target(target)
    if resolved.precision != "int8":
        raise CompressError(f"target: {resolved.name} has no INT8: name another one")
    shown = torch.cat(list(_batches(images, PtqStage.model_fields["calibration_images"].default)))
    judged = torch.arange(len(shown)) % HELD_OUT == 0
    whole = copy.deepcopy(model).cpu().eval()
    prepared = prepare(whole, resolved, shown[:1]).eval()
    histograms = collect(prepared, shown[~judged if len(shown) > 1 else judged].split(BATCH))
    few = images_to_correct_with(shown.split(BATCH))
    means, wanted = float_means(prepared, few), whole(shown[judged])
    found: list[tuple[float, fx.GraphModule]] = []
    for method in METHODS:
        set_ranges_(prepared, histograms, method)
        network = corrected(prepared, few, means)
        found.append((float((network(shown[judged]) - wanted).square().mean()), network))
    best = min(found, key=lambda one: one[0])[1]
    best.meta[SHOWN] = shown[judged]
    return best


def export(model: nn.Module, path: str | Path, *, images: Images | None = None, task: str = "classification") -> Audit:
    """Write an ONNX file, compare it with the network in ONNX Runtime, and return what each of its layers runs in.

    A float network needs `images`, at least one; `quantize` has kept some. `task` says what the outputs mean. Raises CompressError where
    file and network differ, BundleError for an unknown task.
    """
    file, meaning = Path(path), task_named(task)
    shown = None if images is None else torch.cat(list(_batches(images, BATCH)))
    shown = model.meta.get(SHOWN) if shown is None and isinstance(model, fx.GraphModule) else shown
    if shown is None:
        raise CompressError("images: missing: give at least one image, which the file is compared on")
    quantized = isinstance(model, fx.GraphModule) and SHOWN in model.meta
    network = deploy(model) if quantized else copy.deepcopy(model).cpu().eval()  # type: ignore[arg-type]
    network = network.to(memory_format=torch.contiguous_format)
    to_onnx(network, file, shape=(shown.shape[1], shown.shape[2], shown.shape[3]), metadata={TASK_KEY: task})
    array = shown.contiguous().numpy()
    if quantized:
        found = verify(file, [(array, None)], reference_of(copy.deepcopy(model).cpu().eval()), task=meaning)
        if found.first_divergence is not None:
            raise CompressError(f"{file}: does not compute what the network does, from {found.first_divergence} on")
    else:
        with torch.no_grad():
            wanted = network(shown)
        (outputs,) = open_session(file).run(None, {INPUT: array})
        off, largest = float((torch.from_numpy(outputs) - wanted).abs().max()), float(wanted.abs().max())
        if not off <= TOLERANCE * largest:  # not a number is no agreement
            raise CompressError(f"{file}: differs from the network by {off:.2g}, whose largest output is {largest:.2g}")
    return audit(file)


def _batches(images: Images, limit: int) -> Iterator[Tensor]:
    """Yield at most `limit` images."""
    batches = iter([images]) if hasattr(images, "shape") else iter(images)
    for given in batches:
        batch = torch.as_tensor(given[0] if isinstance(given, tuple | list) else given).float().cpu()
        if batch.dim() != 4:
            raise CompressError(f"images: must be (n, channels, height, width), got {tuple(batch.shape)}")
        yield batch[:limit]
        limit -= len(batch)
        if limit <= 0:
            return
