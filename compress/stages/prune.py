"""Remove whole channels: score, plan, cut, solve for what they gave, check, measure."""

import copy
import time
from functools import partial
from pathlib import Path

import torch
import torch_pruning as tp
from torch import nn

from compress.artifact import Metrics, write_json
from compress.distillation.step import supervised_step
from compress.distillation.teacher import distil
from compress.log import StageLog
from compress.models.saved import example_images, read_architecture, save_network
from compress.models.structure import classifier, count
from compress.pruning.costs import measure_layers
from compress.pruning.criteria import NEEDS_GRADIENTS
from compress.pruning.plan import Cut, choose, cut_, find_groups, smallest_widths, widths
from compress.pruning.reconstruction import JUDGED, kept_outputs, number_outputs, reconstruct
from compress.ranks import first_decides
from compress.recipe.losses import KD_ONLY
from compress.recipe.stages import PruneStage
from compress.run import Run


def apply(cfg: PruneStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Cut the network to its budget in one or several steps."""
    assert src is not None
    model = run.load(src)
    exclude = (classifier(model), *cfg.exclude)
    images = example_images(run.image_size, run.device)
    layers, before = measure_layers(model, images), run.measure(model)
    smallest = smallest_widths(find_groups(model, images, "random", exclude=exclude), cfg.min_keep)
    steps: list[tuple[Cut, ...]] = []
    with run.log(out, "prune") as log:
        if cfg.sparsity is not None:
            model = _learn_sparsity(model, cfg, images, out, log, run)
        whole, numbered, as_cut = copy.deepcopy(model), number_outputs(model), {}
        for number in range(1, cfg.steps + 1):
            budget = _budget(cfg, before, number)
            cuts = first_decides(partial(_choose, model, cfg, images, exclude, smallest, budget, run))
            cut_(model, images, cuts)
            steps.append(tuple(cuts))
            cut_(numbered, images, cuts)
            if cfg.reconstruct != "none":
                if number == cfg.steps:
                    as_cut = {"score_as_cut": run.evaluate(model)["score"]}
                model = _reconstructed(model, whole, kept_outputs(numbered), cfg, log, run)
            if cfg.recover is not None and number < cfg.steps:
                phase = f"recover-{number}"
                model = distil(run, model, KD_ONLY, cfg.recover, src=src, out=out, log=log, phase=phase)
                whole, numbered = copy.deepcopy(model), number_outputs(model)
        table = widths(layers, model)
        metrics = run.measure(model) | as_cut
        _check(cfg, before, metrics)
        if run.rank == 0:
            save_network(model, read_architecture(src).pruned(*steps), out)
            write_json(
                out / "plan.json",
                {
                    "layers": [vars(width) for width in table],
                    "cuts": [[cut.to_json() for cut in step] for step in steps],
                },
            )
        log.note(", ".join(f"{width.name} {width.out_before}→{width.out_after}" for width in table))
        log.note(f"{metrics['macs_m']:.1f} of {before['macs_m']:.1f} M multiply-accumulates left")
    return metrics


def _budget(cfg: PruneStage, before: Metrics, number: int) -> float:
    """Return what the network may cost after step `number`, in millions; the steps share the way to the goal evenly."""
    keep = cfg.keep_macs if cfg.keep_macs is not None else cfg.keep_params
    full = before[_measure(cfg)]
    assert keep is not None
    assert full is not None
    return full * (1 - (1 - keep) * number / cfg.steps)


def _measure(cfg: PruneStage) -> str:
    """Return the metric that the goal speaks of."""
    return "macs_m" if cfg.keep_macs is not None else "params_m"


def _choose(
    model: nn.Module,
    cfg: PruneStage,
    images: torch.Tensor,
    exclude: tuple[str, ...],
    smallest: dict[str, int],
    budget: float,
    run: Run,
) -> list[Cut]:
    """Score the network and return the cuts that meet the budget."""
    torch.manual_seed(run.recipe.seed)
    if cfg.criterion in NEEDS_GRADIENTS:
        _accumulate_gradients_(model, cfg, run)
    layers, costs = measure_layers(model, images), count(model, run.image_size)
    macs = cfg.keep_macs is not None
    prunable = sum(layer.macs if macs else layer.weights + layer.vectors for layer in layers)
    fixed = (
        costs.macs if macs else costs.params
    ) - prunable  # attention, position embeddings: never cut, but part of the whole
    return choose(
        find_groups(model, images, cfg.criterion, exclude=exclude),
        layers,
        goal="macs" if macs else "params",
        budget=budget * 1e6,
        fixed=fixed,
        scope=cfg.scope,
        round_to=cfg.round_to,
        min_channels=smallest,
    )


def _reconstructed(
    model: nn.Module, whole: nn.Module, kept: dict[str, torch.Tensor], cfg: PruneStage, log: StageLog, run: Run
) -> nn.Module:
    """Return the network with its weights solved against the one that was whole; rank 0 solves for all."""
    assert cfg.reconstruct != "none"
    if run.rank == 0:
        started = time.monotonic()
        batches = run.calibration(cfg.reconstruct_images * JUDGED // (JUDGED - 1))
        images = torch.cat([batch.images for batch in batches])
        views = torch.cat([batch.images for batch in run.views(cfg.reconstruct_images)])
        model, method, used = reconstruct(model.eval(), whole.eval(), kept, images, cfg.reconstruct, views=views)
        log.note(f"reconstructed ({method}) from {used:,} images without labels in {time.monotonic() - started:.0f} s")
    run.share_(model)
    return model


def _accumulate_gradients_(model: nn.Module, cfg: PruneStage, run: Run) -> None:
    """Leave the loss's mean gradient over `score_images` training images in the parameters."""
    model.eval().zero_grad()
    images = min(cfg.score_images, len(run.dataset.train))
    for batch in run.calibration(images):
        loss = run.task.loss(model(batch.images), batch.targets, label_smoothing=0.0)
        (loss * len(batch.targets) / images).backward()


def _learn_sparsity(
    model: nn.Module, cfg: PruneStage, images: torch.Tensor, out: Path, log: StageLog, run: Run
) -> nn.Module:
    """Train with DepGraph's group regularizer (Fang et al. 2023, eq. 7), so that what will be cut is close to zero."""
    assert cfg.sparsity is not None
    regularizer = tp.pruner.GroupNormPruner(
        model,
        example_inputs=images,
        importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer=None),
        reg=cfg.sparsity.strength,
        ignored_layers=[model.get_submodule(classifier(model))],
        customized_pruners={},
        unwrapped_parameters={},
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    step = supervised_step(run.task, label_smoothing=0.0)
    return run.fit(
        model, step, cfg.sparsity.fit, out=out, log=log, phase="sparsity", after_backward=regularizer.regularize
    )


def _check(cfg: PruneStage, before: Metrics, after: Metrics) -> None:
    """Hold the network to its plan: what was cut costs what was planned."""
    cost, budget = after[_measure(cfg)], _budget(cfg, before, cfg.steps)
    assert cost is not None
    assert cost <= budget * (1 + 1e-6), f"the plan allows {budget} million, the network costs {cost} million"
