"""The chain in three lines of Python: prune, quantize, export; the algorithms and defaults are those of the stages."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx, nn

from compress.data.given import Images, first_images
from compress.errors import CompressError
from compress.models.structure import classifier, width_cost
from compress.pruning.inside_heads import open_heads_, rotate_
from compress.pruning.plan import cut_
from compress.pruning.planner import cuts_to, options_of_uncut
from compress.pruning.recovery import reconstruction as recovery
from compress.pruning.surgeon import input_covariances
from compress.quant.post_training import BATCH, SHOWN, quantized
from compress.quant.prepare import deploy
from compress.quant.reference import reference_of
from compress.recipe.stages import PruneStage, PtqStage
from compress.scoring import difference
from export.names import TASK_KEY
from export.onnx_file.targets import resolve_target
from export.onnx_file.to_onnx import to_onnx
from export.proof.audit import Audit, audit
from export.proof.verify import verify
from export.runtime.session import open_session
from export.tasks import task_named

COMPARED = 128  # images on which a file is compared with its network, at most
TOLERANCE = 1e-3  # of a float file from its network, over the outputs' largest value


def prune(
    model: nn.Module, images: Images, *, keep_macs: float, exclude: Sequence[str] = (), inside_heads: bool = False
) -> nn.Module:
    """Return a copy with this fraction of the multiply-accumulates, its weights solved on unlabelled images; in eval mode.

    Layers that match `exclude` (shell patterns) and the classifier keep their outputs.
    `inside_heads` removes dimensions inside attention's heads instead of whole heads. Raises CompressError where it cannot be cut so far.
    """
    if not 0 < keep_macs < 1:
        raise CompressError(f"keep_macs: must be above 0 and below 1, got {keep_macs}")
    cfg = PruneStage(stage="prune", keep_macs=keep_macs, exclude=tuple(exclude))
    shown, shape = first_images(images, cfg.reconstruct_images * recovery.JUDGED // (recovery.JUDGED - 1))
    whole, example = copy.deepcopy(model).cpu().eval(), shown[:1]
    if inside_heads and open_heads_(whole, example):
        rotate_(whole, shown[: cfg.score_images].split(BATCH))
    student, numbered = copy.deepcopy(whole), recovery.number_outputs(whole)
    options = options_of_uncut(
        student,
        example,
        cfg.criterion,
        exclude=(classifier(student, shape), *cfg.exclude),
        scope=cfg.scope,
        round_to=cfg.round_to,
        min_keep=cfg.min_keep,
        covariances=input_covariances(student, shown[: cfg.score_images].split(BATCH)),
    )
    cuts = cuts_to(keep_macs, options, width_cost(student, options.layers, "macs", shape))
    for network in (student, numbered):
        cut_(network, example, cuts)
    shown, kept = shown[: recovery.affordable_images(whole, example)], recovery.kept_outputs(numbered)
    return recovery.reconstruct(student.eval(), whole, kept, shown, "least_squares", views=shown)[0].eval()


def quantize(model: nn.Module, images: Images, *, target: str = "auto") -> fx.GraphModule:
    """Return the network fake-quantized for a target, calibrated on unlabelled images, biases corrected; it can be trained on.

    Ranges are by the method whose outputs are nearest to the float network's on every fourth image. `auto` is this machine's target.
    """
    resolved = resolve_target(target)
    if resolved.precision != "int8":
        raise CompressError(f"target: {resolved.name} has no INT8: name another one")
    return quantized(model, resolved, first_images(images, PtqStage(stage="ptq").calibration_images)[0])


def export(model: nn.Module, path: str | Path, *, images: Images | None = None, task: str = "classification") -> Audit:
    """Write an ONNX file, compare it with the network in ONNX Runtime, and return what each of its layers runs in.

    A float network needs `images`, at least one; `quantize` has kept some. `task` says what the outputs mean. Raises CompressError where
    file and network differ, BundleError for an unknown task.
    """
    file, meaning = Path(path), task_named(task)
    calibrated = model if isinstance(model, fx.GraphModule) and SHOWN in model.meta else None
    images = calibrated.meta[SHOWN] if images is None and calibrated is not None else images
    if images is None:
        raise CompressError("images: missing: give at least one image, which the file is compared on")
    shown, shape = first_images(images, COMPARED)
    network = copy.deepcopy(model).cpu().eval() if calibrated is None else deploy(calibrated)
    network = network.to(memory_format=torch.contiguous_format)
    to_onnx(network, file, shape=shape, metadata={TASK_KEY: task})
    if calibrated is not None:
        reference = reference_of(copy.deepcopy(calibrated).cpu().eval())
        found = verify(file, [(shown.contiguous().numpy(), None)], reference, task=meaning)
        if found["first_divergence"] is not None:
            raise CompressError(f"{file}: does not compute what the network does, from {found['first_divergence']} on")
    else:
        off, largest = difference(network, open_session(file), shown)
        if not off <= TOLERANCE * largest:  # not a number is no agreement
            raise CompressError(f"{file}: differs from the network by {off:.2g}, whose largest output is {largest:.2g}")
    return audit(file)
