"""Prune, quantize and export untrained networks before training, so that a refusal takes seconds, not hours."""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from compress.distillation.step import check_layers, check_smoothing, check_task
from compress.errors import CompressError, ModelError, own_line
from compress.models.saved import Architecture, example_images, rebuild
from compress.models.structure import classifier, width_cost
from compress.pruning.inside_heads import open_heads_
from compress.pruning.latency.clock import Clock
from compress.pruning.plan import cut_
from compress.pruning.planner import options_of_uncut
from compress.quant.prepare import prepare
from compress.recipe.arguments import goal_of
from compress.recipe.schema import Recipe
from compress.recipe.stages import DistillStage, PruneStage, QatStage, SourceStage, StageSection, StudentStage
from compress.run import Run
from compress.scoring import Served, difference, random_images, served
from export.errors import BundleError, UserError, first
from export.onnx_file.targets import CPU
from export.onnx_file.to_onnx import to_onnx
from export.runtime.accuracy import score_of
from export.runtime.conditions import Conditions
from export.runtime.session import bind, open_session
from export.tasks.paired import MAX_CHANCE, chance

TRIED = ("prune", "ptq", "qat", "export")
TEACHER_IMAGES = 1000  # on which a teacher must be better than chance
TOLERANCE = 1e-2  # largest difference from rounding, as a fraction of the largest logit; wrong values differ by more


def rehearse(run: Run, missing: Mapping[str, Sequence[bool]]) -> None:
    """Prune, fake-quantize and export untrained networks as the recipe's stages will, if a missing stage trains.

    `missing` tells for each chain's first stages whether they are missing; all later ones are. Raises ModelError, which
    names the stage, where a stage cannot take its network.
    """
    tried: set[tuple[str, str]] = set()
    own = run.own_metric
    for name, chain in run.recipe.chains().items():
        behind = chain.stages[len(missing[name]) :]
        sections = [section for section, absent in zip(chain.stages, missing[name], strict=False) if absent] + [*behind]
        if any(_trains(section, chain) for section in sections):
            if own is not None and not run.task.output.has_classes:
                own.row(run.task.output.split(run.dataset.held_out.labels[:1].numpy())[0], run.paths()[0])
            stages = [section.stage for section in sections if section.stage in TRIED]
            if chain.teacher and ("teacher", "score") not in tried:
                _check_teacher(run)
                tried.add(("teacher", "score"))
            if run.rank == 0 and stages:
                sys.stderr.write(f"{', '.join(stages)}: rehearsed on the untrained network\n")
            _rehearse(run, chain, sections, tried)


def _check_teacher(run: Run) -> None:
    """Print the given teacher's score on validation images; raise CompressError where it is no better than chance."""
    teacher, output = run.given_teacher(), run.task.output
    outputs, truths = [], []
    for batch in run.feed.validation(limit=TEACHER_IMAGES):
        with torch.no_grad():
            outputs.append(teacher(batch.images).float().cpu().numpy())
        truths.append(batch.targets.cpu().numpy())
    found = score_of(output, outputs, truths)
    names = ", ".join(one.network for one in run.recipe.teacher)
    line = f"teacher {names}: {output.metric.title} {found.score:.1%} on {found.images:,} validation images"
    classes = output.by_class({"teacher": found.rows}, run.dataset.classes, ())
    if classes is not None and chance(classes["images"], classes["files"]["teacher"])[1] > MAX_CHANCE:
        raise CompressError(
            f"{line}, no better than chance: check its image_size, mean and std, and the order of its classes"
        )
    if run.rank == 0:
        sys.stderr.write(f"{line}\n")


def _rehearse(run: Run, chain: Recipe, sections: Sequence[StageSection], tried: set[tuple[str, str]]) -> None:
    """Rehearse one chain; skip what was `tried` on an architecture before."""
    stages = [section.stage for section in sections]
    networks = _networks(run, chain, sections)
    (_, teacher), (arch, student) = networks[0], networks[-1]
    _ = run.learned  # whose loss may take no weights
    for _, network in networks:
        run.check(network, logits=True)
    for section in sections:
        if isinstance(section, PruneStage):
            _try_cut(student, section, run.of(chain))
        if isinstance(section, DistillStage | QatStage):
            check_task(section.loss, run.task)
            check_layers(section.loss, student=student, teacher=teacher)
        if isinstance(section, SourceStage):
            check_smoothing(section.label_smoothing, run.task)
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
        return section.fit is not None and (recipe.model is None or recipe.model.weights is None or section.fine_tune)
    if isinstance(section, PruneStage):
        return section.recover is not None or section.sparsity is not None
    return isinstance(section, DistillStage | QatStage)


def _networks(run: Run, chain: Recipe, sections: Sequence[StageSection]) -> list[tuple[str, nn.Module]]:
    """Return teacher and student, if it is another network, by architecture; a student to start has its weights."""

    def untrained(arch: str) -> nn.Module:
        architecture = Architecture(arch, run.num_classes, run.shape, outputs=run.served)
        return rebuild(architecture, trust_code=run.trust_code)

    if chain.model is None:
        found = [("teacher", run.given_teacher(whole=True).cpu())]
    else:
        found = [(chain.model.arch, untrained(chain.model.arch))]
        run.check(found[0][1], logits=False)
    for section in chain.stages:
        if isinstance(section, StudentStage):
            fresh = section in sections
            student = run.start(section)[1] if fresh else untrained(section.arch)
            found.append((section.arch, student))
    return found


@contextmanager
def _refused_by(stages: str, advice: str = "") -> Iterator[None]:
    """Raise a refusal as ModelError, with the stages that would raise it, the line of the user's code, and the advice."""
    try:
        yield
    except UserError as error:
        where = own_line(error) if isinstance(error, BundleError) else ""
        raise ModelError(f"{stages}: {error}{where}{advice and f'; {advice}'}") from error


def _export(model: nn.Module, run: Run) -> None:
    """Write the float file and compare its outputs with the network's."""
    images = _images(run)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        to_onnx(model, path, shape=run.shape, metadata={}, outputs=run.dataset.outputs)
        session = open_session(path, threads=1)
        try:
            bind(session, images.numpy())()
        except BundleError as error:
            raise ModelError(
                f"{type(model).__name__}: its ONNX file runs only on the number of images that it was exported with"
            ) from error
        off, largest = difference(model, session, images)
    if not off <= TOLERANCE * largest:
        raise ModelError(
            f"{type(model).__name__}: its ONNX file's outputs differ from PyTorch's by up to {off:.2g}, of logits up to "
            f"{largest:.2g}: its forward uses more than torch's operators (numpy, Python's numbers), or is random"
        )


def _quantize(model: nn.Module, run: Run) -> None:
    """Write and run the INT8 file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        Served(Conditions(CPU, 1, 1), "int8", run.shape, run.int8_targets[0], run.dataset.outputs).write(model, path)
        bind(open_session(path, threads=1), _images(run).numpy())()


def _try_cut(model: nn.Module, cfg: PruneStage, run: Run) -> None:
    """Print which layers keep their width; raise CompressError where even the narrowest network misses the goal."""
    images, goal, exclude = example_images(run.shape), goal_of(cfg), (classifier(model, run.shape), *cfg.exclude)
    if cfg.inside_heads:
        open_heads_(model, images)
    options = options_of_uncut(
        model,
        images,
        "random",
        exclude=exclude,
        scope="local",
        round_to=cfg.round_to,
        min_keep=cfg.min_keep,
        blocks=cfg.blocks,
    )
    narrowest = copy.deepcopy(model)
    cut_(narrowest, images, options.narrowest)
    if goal.cost == "latency":
        with TemporaryDirectory() as folder:
            how, files = served(cfg.conditions, run), (Path(folder) / "before.onnx", Path(folder) / "narrowest.onnx")
            with _refused_by("prune"):
                for network, file in zip((model, narrowest), files, strict=True):
                    how.write(network, file)
            ratio, before, least = Clock(files[0], how.conditions, how.shape).against(files[1])
            least = ratio.ratio * before if goal.is_fraction else least
    else:
        cost = width_cost(model, options.layers, goal.cost, run.shape)
        before, least = options.full(cost), options.least(cost)
    cuts = {
        layer.name: cut
        for layer, cut in zip(options.layers, options.reach[0].sum(0).tolist(), strict=True)
        if layer.weights
    }
    fixed = [name for name, cut in cuts.items() if not cut and not any(fnmatchcase(name, given) for given in exclude)]
    if fixed and run.rank == 0:
        sys.stderr.write(
            f"prune: {len(fixed):,} of {len(cuts):,} layers keep their width, as their channels cannot be followed or reach an output or an "
            f"excluded layer: {first(fixed)}; the others can be cut to {least / before:.0%} of the {goal.cost}\n"
        )
    goal.budget(before, least=least)


def _images(run: Run) -> torch.Tensor:
    return random_images(run.shape)
