"""Remove whole channels: score, plan, cut, check, measure."""

from pathlib import Path

import torch
import torch_pruning as tp
from torch import nn

from compress.artifact import Metrics, write_json
from compress.distillation import distillation_step, supervised_step
from compress.models.structure import classifier
from compress.network import example_images, read_architecture, save_network
from compress.pruning.criteria import NEEDS_GRADIENTS
from compress.pruning.layers import Layer, measure_layers
from compress.pruning.plan import Cut, choose, cut_, find_groups, smallest_widths, widths
from compress.recipe import KD_ONLY, PruneStage
from compress.run import Run


def apply(cfg: PruneStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Cut the network to its budget in one or several steps."""
    assert src is not None
    model = run.load(src)
    exclude = (classifier(model), *cfg.exclude)
    images = example_images(run.image_size, run.device)
    layers = measure_layers(model, images)
    smallest = smallest_widths(find_groups(model, images, "random", exclude=exclude), cfg.min_keep)
    steps: list[tuple[Cut, ...]] = []
    with run.log(out, "prune") as log:
        if cfg.sparsity is not None:
            model = _learn_sparsity(model, cfg, exclude, images, out, run)
        for number in range(1, cfg.steps + 1):
            cuts = _cut_once_(model, cfg, images, exclude, smallest, _budget(cfg, layers, number), run)
            steps.append(tuple(cuts))
            if cfg.recover is not None and number < cfg.steps:
                step = distillation_step(KD_ONLY, run.task, run.teacher(src))
                model = run.fit(model, step, cfg.recover, out=out, log=log, phase=f"recover-{number}")
        table = widths(layers, model)
        for width in table:
            log.note_detail(f"{width.name}: {width.out_before} to {width.out_after} channels")
        metrics = run.measure(model)
        _check(cfg, layers, metrics)
        if run.rank == 0:
            save_network(model, read_architecture(src).pruned(*steps), out)
            write_json(
                out / "plan.json",
                {"layers": [vars(width) for width in table], "cuts": [[cut.to_json() for cut in step] for step in steps]},
            )
        cut = sum(width.out_after < width.out_before for width in table)
        log.note(f"{cut} of {len(table)} layers narrower; {metrics['macs_m']:.1f} M multiply-accumulates left")
    return metrics


def _budget(cfg: PruneStage, layers: list[Layer], number: int) -> float:
    """Return what the network may cost after step `number`; the steps share the way to the goal evenly."""
    keep = cfg.keep_macs if cfg.keep_macs is not None else cfg.keep_params
    assert keep is not None
    full = sum(layer.macs if cfg.keep_macs is not None else layer.weights + layer.vectors for layer in layers)
    return full * (1 - (1 - keep) * number / cfg.steps)


def _cut_once_(
    model: nn.Module,
    cfg: PruneStage,
    images: torch.Tensor,
    exclude: tuple[str, ...],
    smallest: dict[str, int],
    budget: float,
    run: Run,
) -> list[Cut]:
    """Score, choose and cut in place; every rank chooses the same."""
    torch.manual_seed(run.recipe.seed)
    if cfg.criterion in NEEDS_GRADIENTS:
        _accumulate_gradients_(model, cfg, run)
    groups = find_groups(model, images, cfg.criterion, exclude=exclude)
    cuts = choose(
        groups,
        measure_layers(model, images),
        goal="macs" if cfg.keep_macs is not None else "params",
        budget=budget,
        scope=cfg.scope,
        round_to=cfg.round_to,
        min_channels=smallest,
    )
    cut_(model, images, cuts)
    return cuts


def _accumulate_gradients_(model: nn.Module, cfg: PruneStage, run: Run) -> None:
    """Leave the loss's mean gradient over `score_batches` training batches in the parameters."""
    model.eval().zero_grad()
    batches = run.calibration(cfg.score_batches * 32)
    for batch in batches:
        run.task.supervised_loss(model(batch.images), batch.targets, label_smoothing=0.0).backward()


def _learn_sparsity(
    model: nn.Module, cfg: PruneStage, exclude: tuple[str, ...], images: torch.Tensor, out: Path, run: Run
) -> nn.Module:
    """Train with DepGraph's group regularizer (Fang et al. 2023, eq. 7), so that what will be cut is close to zero."""
    assert cfg.sparsity is not None
    head = model.get_submodule(classifier(model))
    regularizer = tp.pruner.GroupNormPruner(
        model,
        example_inputs=images,
        importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer=None),
        reg=cfg.sparsity.strength,
        ignored_layers=[head],
        customized_pruners={},
        unwrapped_parameters={},
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    with run.log(out, "prune") as log:
        return run.fit(
            model,
            supervised_step(run.task, label_smoothing=0.0),
            cfg.sparsity.fit,
            out=out,
            log=log,
            phase="sparsity",
            after_backward=regularizer.regularize,
        )


def _check(cfg: PruneStage, layers: list[Layer], metrics: Metrics) -> None:
    """Hold the network to its plan: what was cut costs what was planned."""
    params, macs = metrics["params_m"], metrics["macs_m"]
    assert params is not None
    assert macs is not None
    budget = _budget(cfg, layers, cfg.steps) / 1e6
    cost = macs if cfg.keep_macs is not None else params
    assert cost <= budget * (1 + 1e-6), f"the plan allows {budget} million, the network costs {cost}"
