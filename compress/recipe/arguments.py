"""Translate a recipe's sections into the plain arguments of the algorithms. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compress.data.settings import DataSettings
from compress.data.teachers import GivenTeacher
from compress.errors import CompressError
from compress.pruning.goals import Goal
from compress.recipe.schema import Decode, Recipe
from compress.recipe.stages import DEFAULT_PROVIDERS, DistillStage, Fit, PruneStage, QatStage, SourceStage
from export.errors import first
from export.images.preprocess import Letterbox, Look
from export.images.size import size_of
from export.onnx_file.outputs import Output, Softmax
from export.runtime.providers import PROVIDERS, present
from export.tasks.boxes import Limits

MOST_OVERLAP = 0.65  # of a recipe's decode, as in YOLOX


def limits_of(decode: Decode) -> Limits:
    """Return what counts as a detection."""
    most = decode.most_overlap or (1.0 if decode.function == "queries" else MOST_OVERLAP)
    return Limits(decode.detections, decode.least_score, most)


def as_served(recipe: Recipe, outputs: Sequence[Output]) -> tuple[Output, ...]:
    """Return a network's several outputs as the recipe declares them; what `queries` decodes are sets."""
    known = recipe.model.outputs if recipe.model else {}
    classes = softmax_of(recipe)
    if classes and not outputs:
        raise CompressError(
            f"model.outputs: softmax needs several outputs, got {first(sorted(classes))} alone: leave it out, or for a classifier set task: "
            "unlabelled, whose losses compare probabilities"
        )
    sets = {name for name, one in known.items() if one.unordered}
    if sets and (not outputs or any(len(one.shape) != 2 for one in outputs if one.name in sets)):
        raise CompressError(
            f"model.outputs: unordered needs several outputs, of which {first(sorted(sets))} are rows (n, rows, channels): leave it out"
        )
    if recipe.decode is not None and recipe.decode.function == "queries":
        sets |= {"logits", "pred_boxes"}
    return tuple(
        replace(
            one,
            weight=known[one.name].weight if one.name in known else 1.0,
            unordered=one.name in sets,
            softmax=classes.get(one.name),
        )
        for one in outputs
    )


def softmax_of(recipe: Recipe) -> dict[str, Softmax]:
    """Return what the channels are of those outputs that the recipe declares a softmax."""
    return {name: one.softmax for name, one in (recipe.model.outputs if recipe.model else {}).items() if one.softmax}


def data_settings(recipe: Recipe) -> DataSettings:
    """Return the settings of a recipe's images, their split and their preprocessing."""
    data, n = recipe.data, recipe.data.channels
    mean, std = {
        "normalized": (data.mean, data.std),
        "unit": ((0.0,) * n, (1.0,) * n),
        "bytes": ((0.0,) * n, (1 / 255,) * n),
    }[data.pixels]
    boxed: dict[str | None, Letterbox] = {"letterbox": "centre", "letterbox_corner": "corner"}
    return DataSettings(
        task=recipe.task,
        name=data.dataset,
        path=None if data.path is None else Path(data.path),
        image_size=None if data.image_size is None else size_of(data.image_size),
        resize=data.resize,
        mean=mean,
        std=std,
        val_fraction=data.val_fraction,
        limit_per_class=data.limit_per_class,
        skip_broken=data.skip_broken,
        ignore_index=data.ignore_index,
        seed=recipe.seed if data.split_seed is None else data.split_seed,
        tuning=data.judge_by == "tuning",
        memory=Path(recipe.out) / ".images",
        unlabelled=None if data.unlabelled is None else Path(data.unlabelled),
        stretch=data.framing == "stretch" and recipe.task != "detection",
        look=Look(
            boxed.get(data.framing, "none"), data.pad_value, data.interpolation, data.antialias, data.colors == "bgr"
        ),
    )


def teachers_of(recipe: Recipe) -> tuple[GivenTeacher, ...]:
    """Return the teachers that a recipe names besides its own network."""
    return tuple(
        GivenTeacher(
            one.network,
            one.weights,
            None if one.image_size is None else size_of(one.image_size),
            one.mean,
            one.std,
            None if one.classes is None else Path(one.classes),
        )
        for one in recipe.teacher
    )


def goal_of(cfg: PruneStage) -> Goal:
    """Return the one goal of a prune stage."""
    goals = (
        Goal("keep_macs", "macs", cfg.keep_macs or 0),
        Goal("keep_params", "params", cfg.keep_params or 0),
        Goal("keep_latency", "latency", cfg.keep_latency or 0),
        Goal("max_latency_ms", "latency", cfg.max_latency_ms or 0, is_fraction=False),
    )
    return next(goal for goal in goals if goal.value)


def fits(recipe: Recipe) -> Iterator[Fit]:
    """Yield the settings of each training of the recipe."""
    for chain in recipe.chains().values():
        for section in chain.stages:
            if isinstance(section, SourceStage | DistillStage | QatStage) and section.fit is not None:
                yield section.fit
            if isinstance(section, PruneStage) and section.recover is not None:
                yield section.recover
            if isinstance(section, PruneStage) and section.sparsity is not None:
                yield section.sparsity.fit


def qat_fit(cfg: QatStage, recipe: Recipe) -> Fit:
    """Return the settings of quantization-aware training.

    The default is a tenth of the last float training's epochs at a hundredth of its rate, with a cosine schedule, as
    Krishnamoorthi 2018 (Quantizing deep convolutional networks, section 4) and NVIDIA's QAT guide (2021) advise.
    """
    if cfg.fit is not None:
        return cfg.fit
    trained = [
        section.fit for section in recipe.stages if isinstance(section, SourceStage | DistillStage) and section.fit
    ]
    return trained[-1].model_copy(
        update={
            "epochs": max(1, round(trained[-1].epochs / 10)),
            "lr": trained[-1].lr / 100,
            "warmup_epochs": 0.0,
            "schedule": "cosine",
            "milestones": (),
            "decay_vectors": False,  # or weight decay would shrink learned ranges, which are vectors
            "stop": None,
        }
    )


def providers_of(recipe: Recipe) -> list[str]:
    """Return the keys of the providers in which a recipe's files are scored and timed: its bench's.

    With `target: auto` a recipe that names none also takes the plugins that start on this machine.
    """
    bench = next((section for section in recipe.stages if section.stage == "bench"), None)
    asked = bench.providers if bench else DEFAULT_PROVIDERS
    named = bench is not None and "providers" in bench.model_fields_set
    if named or recipe.target != "auto" or asked == "auto":
        return present(asked)
    return present([*asked, *(key for key in present("auto") if PROVIDERS[key].plugin)])
