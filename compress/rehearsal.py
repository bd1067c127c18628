"""Try on untrained networks what later stages will do with the trained ones: a refusal comes in seconds, not after hours of training."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import format_exception

import numpy as np
import torch
from torch import nn

from compress.distillation.step import check_layers
from compress.errors import ModelError, own_line
from compress.models.architectures import build
from compress.models.saved import example_images
from compress.pruning.plan import find_groups
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, prepare
from compress.recipe.schema import Recipe
from compress.recipe.stages import (
    DistillStage,
    PruneStage,
    QatStage,
    SourceStage,
    StageSection,
    StudentStage,
)
from compress.run import Run
from export.errors import BundleError, UserError
from export.onnx_file.graph import INPUT
from export.onnx_file.to_onnx import to_onnx
from export.runtime.session import bind, open_session

TRIED = ("prune", "ptq", "qat", "export")
IMAGES = 3  # another batch than the exporter's example has
TOLERANCE = 1e-2  # of the largest logit: kernels round differently, an answer to other values differs more


def rehearse(run: Run, missing: Mapping[str, Sequence[bool]]) -> None:
    """Prune, fake-quantize and export untrained networks as the recipe's stages will, where one of those that are missing trains.

    `missing` says of each chain's first stages whether they are; those behind are. Raises ModelError, which names the stage, where one cannot
    take its network.
    """
    tried: set[tuple[str, str]] = set()
    for name, chain in run.recipe.chains().items():
        behind = chain.stages[len(missing[name]) :]
        sections = [section for section, absent in zip(chain.stages, missing[name], strict=False) if absent] + [*behind]
        if any(_trains(section, chain) for section in sections):
            stages = [section.stage for section in sections if section.stage in TRIED]
            if run.rank == 0 and stages:
                sys.stderr.write(f"{', '.join(stages)}: tried on the untrained network\n")
            _rehearse(run, chain, sections, tried)


def _rehearse(run: Run, chain: Recipe, sections: Sequence[StageSection], tried: set[tuple[str, str]]) -> None:
    """Rehearse one chain; what was `tried` on an architecture is not tried again."""
    stages = [section.stage for section in sections]
    networks = _networks(run, chain, sections)
    (_, teacher), (arch, student) = networks[0], networks[-1]
    if student is not teacher:
        run.check_logits(student)
    for section in sections:
        if isinstance(section, PruneStage):
            find_groups(student, example_images(run.image_size), "random", exclude=section.exclude)
        if isinstance(section, DistillStage | QatStage):
            check_layers(section.loss, student=student, teacher=teacher)
    integer = " and ".join(stage for stage in stages if stage in ("ptq", "qat"))
    if integer and (arch, "int8") not in tried:
        with _refused_by(integer, f"or leave out {integer}"):
            _quantize(student, run)
        tried.add((arch, "int8"))
    for section in sections:
        if isinstance(section, QatStage) and section.keep_float:
            prepare(student, run.int8_targets[0], _images(run), keep_float=section.keep_float)
    for name, model in networks if "export" in stages else []:
        if {(name, "int8"), (name, "float")}.isdisjoint(tried):
            with _refused_by("export"):
                _export(model, run)
            tried.add((name, "float"))


def _trains(section: StageSection, recipe: Recipe) -> bool:
    if isinstance(section, SourceStage):
        return section.fit is not None and (recipe.model.weights is None or section.fine_tune)
    if isinstance(section, PruneStage):
        return section.recover is not None or section.sparsity is not None
    return isinstance(section, DistillStage | QatStage)


def _networks(run: Run, chain: Recipe, sections: Sequence[StageSection]) -> list[tuple[str, nn.Module]]:
    """Return the teacher and, where it is another network, the student, by architecture; a student still to start is given its weights."""
    classes = len(run.dataset.classes)
    teacher = build(chain.model.arch, num_classes=classes, trust_code=run.trust_code)
    run.check_output(teacher)
    found = [(chain.model.arch, teacher)]
    for section in chain.stages:
        if isinstance(section, StudentStage):
            fresh = section in sections
            student = (
                run.start(section)[1] if fresh else build(section.arch, num_classes=classes, trust_code=run.trust_code)
            )
            found.append((section.arch, student))
    return found


@contextmanager
def _refused_by(stages: str, advice: str = "") -> Iterator[None]:
    """Let a refusal name the stages that would have come to it, the line of the person's own code, and the advice."""
    try:
        yield
    except UserError as error:
        where = own_line("".join(format_exception(error))) if isinstance(error, BundleError) else ""
        raise ModelError(f"{stages}: {error}{where}{advice and f'; {advice}'}") from error


def _export(model: nn.Module, run: Run) -> None:
    """Write the float file and hold its answers against the network's own."""
    images = _images(run)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        to_onnx(model, path, image_size=run.image_size, metadata={})
        session = open_session(path, threads=1)
        try:
            bind(session, images.numpy())()
        except BundleError as error:
            raise ModelError(
                f"{type(model).__name__}: its ONNX file takes no other number of images than it was written with"
            ) from error
        (answers,) = session.run(None, {INPUT: images.numpy()})
    with torch.no_grad():
        expected = model(images).numpy()
    difference, largest = float(np.abs(answers - expected).max()), float(np.abs(expected).max())
    if not difference <= TOLERANCE * largest:
        raise ModelError(
            f"{type(model).__name__}: its ONNX file answers otherwise than it does in PyTorch, by up to {difference:.2g} where logits "
            f"reach {largest:.2g}: something in its forward is no operator of torch (numpy, Python's numbers) or is random"
        )


def _quantize(model: nn.Module, run: Run) -> None:
    """Write and run the INT8 file."""
    images = _images(run)
    prepared = prepare(model, run.int8_targets[0], images)
    calibrate_(prepared, [images], "minmax")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        to_onnx(deploy(prepared), path, image_size=run.image_size, metadata={})
        bind(open_session(path, threads=1), images.numpy())()


def _images(run: Run) -> torch.Tensor:
    size = run.image_size
    return torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(run.recipe.seed))
