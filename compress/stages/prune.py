"""Remove whole channels: score, plan, cut, reconstruct the remaining weights, check, measure."""

import copy
import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch_pruning as tp
from torch import nn

from compress.artifact import Metrics
from compress.distillation.step import supervised_step
from compress.distillation.teacher import distil
from compress.logs.stage_log import StageLog
from compress.models.saved import example_images, load_float, read_architecture, save_network
from compress.models.structure import classifier, width_cost
from compress.pruning.costs import measure_layers
from compress.pruning.criteria import NEEDS_COVARIANCES, NEEDS_GRADIENTS
from compress.pruning.goals import METRICS, UNITS, Goal
from compress.pruning.inside_heads import open_heads_, rotate_
from compress.pruning.latency.search import Attempt, Latency, open_latency
from compress.pruning.latency.timings import Table
from compress.pruning.plan import Cut, Options, choose, cut_, find_groups, smallest_widths, widths
from compress.pruning.planner import options_of
from compress.pruning.recovery.gradients import BATCH, STEPS
from compress.pruning.recovery.reconstruction import (
    JUDGED,
    affordable_images,
    kept_outputs,
    number_outputs,
    reconstruct,
)
from compress.pruning.surgeon import input_covariances
from compress.ranks import first_decides, share_
from compress.recipe.arguments import goal_of
from compress.recipe.losses import KD_ONLY, MSE_ONLY
from compress.recipe.stages import PruneStage
from compress.run import Run
from compress.scoring import served
from compress.training.device import place_
from export.command.files import write_json
from export.images.size import Shape
from export.names import LATENCY_JSON, PLAN_JSON

TABLE = "latency-table"  # in the recipe's `out`, shared by all runs


def apply(cfg: PruneStage, src: Path, out: Path, run: Run) -> Metrics:
    """Cut the network to its budget in one or several steps."""
    model, goal = place_(load_float(src, trust_code=run.trust_code), run.device), goal_of(cfg)
    images = example_images(run.shape, run.device)
    with run.log(out, "prune") as log:
        if cfg.inside_heads:
            open_heads_(model, images)
        log.doing("measures the whole network on the validation images")
        layers, before = measure_layers(model, images), run.measure(model)
        smallest = smallest_widths(
            find_groups(model, images, "random", exclude=_excluded(model, cfg, run.shape)), cfg.min_keep
        )
        steps: list[tuple[Cut, ...]] = []
        if cfg.sparsity is not None:
            model = _learn_sparsity(model, cfg, images, log, run)
        _sort_inside_heads_(model, cfg, run)
        whole, numbered, as_cut = copy.deepcopy(model), number_outputs(model), {}
        planned = _Planner(cfg, goal, before, smallest, out, log, run)
        for number in range(1, cfg.steps + 1):
            log.doing("scores the channels")
            cuts = first_decides(partial(planned.cuts, model, images, number))
            cut_(model, images, cuts)
            steps.append(tuple(cuts))
            cut_(numbered, images, cuts)
            if cfg.reconstruct != "none":
                if number == cfg.steps:
                    log.doing("measures the network as it was cut")
                    as_cut = {"score_as_cut": run.evaluate(model)["score"]}
                model = _reconstructed(model, whole, kept_outputs(numbered), cfg, log, run)
            if cfg.recover is not None and number < cfg.steps:
                phase = f"recover-{number}"
                terms = KD_ONLY if run.task.output.has_classes else MSE_ONLY
                model = distil(run, model, terms, cfg.recover, src=src, log=log, phase=phase)
                _sort_inside_heads_(model, cfg, run)
                whole, numbered = copy.deepcopy(model), number_outputs(model)
        table = widths(layers, model)
        log.doing("measures the cut network")
        metrics = run.measure(model) | as_cut | first_decides(planned.metrics)
        _check(goal, before, metrics)
        if run.rank == 0:
            save_network(model, read_architecture(src).pruned(*steps), out)
            write_json(
                out / PLAN_JSON,
                {
                    "layers": [vars(width) for width in table],
                    "cuts": [[cut.to_json() for cut in step] for step in steps],
                },
            )
        log.note_detail(", ".join(f"{width.name} {width.out_before}→{width.out_after}" for width in table))
        log.note(f"{metrics['macs_m']:.1f} of {before['macs_m']:.1f} M multiply-accumulates left")
    return metrics


@dataclass
class _Planner:
    """Decides each step's cuts, on rank 0 alone; the latency table is measured once for all steps."""

    cfg: PruneStage
    goal: Goal
    before: Metrics
    smallest: dict[str, int]
    out: Path
    log: StageLog
    run: Run
    latency: Latency | None = None
    attempts: list[Attempt] = field(default_factory=list)

    def cuts(self, model: nn.Module, images: torch.Tensor, number: int) -> list[Cut]:
        """Score the channels and return the cuts that meet the budget of step `number`."""
        torch.manual_seed(self.run.recipe.seed)
        if self.cfg.criterion in NEEDS_GRADIENTS:
            _accumulate_gradients_(model, self.cfg, self.run)
        covariances = None
        if self.cfg.criterion in NEEDS_COVARIANCES:
            batches = (batch.images for batch in self.run.feed.calibration(self.cfg.score_images))
            covariances = input_covariances(model.eval(), batches)
        groups = find_groups(
            model,
            images,
            self.cfg.criterion,
            exclude=_excluded(model, self.cfg, self.run.shape),
            covariances=covariances,
        )
        options = options_of(
            model,
            groups,
            images,
            scope=self.cfg.scope,
            round_to=self.cfg.round_to,
            min_channels=self.smallest,
            blocks=self.cfg.blocks,
        )
        if self.goal.cost == "latency":
            return self._within_time(model, images, options, number)
        full = self.before[METRICS[self.goal.cost]]
        assert full is not None
        cost = width_cost(model, options.layers, self.goal.cost, self.run.shape)
        budget = self.goal.budget(full, least=options.least(cost), step=number, steps=self.cfg.steps)
        return choose(options, cost, budget)

    def metrics(self) -> Metrics:
        """Return the latency before pruning and after the last step, predicted and measured; empty for other budgets."""
        if self.latency is None:
            return {}
        write_json(self.out / LATENCY_JSON, self.latency.to_json(self.attempts))
        shutil.rmtree(self.latency.folder)
        return {
            "latency_before_ms": self.latency.whole_ms,
            "latency_predicted_ms": self.attempts[-1].predicted_ms,
            "latency_ms": self.attempts[-1].measured_ms,
            "latency_table_s": self.latency.table_s,
        }

    def _within_time(self, model: nn.Module, images: torch.Tensor, options: Options, number: int) -> list[Cut]:
        how = served(self.cfg.conditions, self.run)
        if how.shape != self.run.shape:  # latency is measured at the size that will be served
            options = replace(options, layers=measure_layers(model, example_images(how.shape, self.run.device)))
        if self.latency is None:
            self.latency = open_latency(
                model,
                options,
                self.goal,
                Table(Path(self.run.recipe.out) / TABLE, how.conditions),
                shape=how.shape,
                folder=self.out / "timed",
                write=how.write,
                tell=self.log.note,
            )
        budget = self.latency.budget(number, self.cfg.steps)
        self.attempts = self.latency.choose(model, images, options, budget)
        return list(self.attempts[-1].cuts)


def _excluded(model: nn.Module, cfg: PruneStage, shape: Shape) -> tuple[str, ...]:
    return (classifier(model, shape), *cfg.exclude)


def _sort_inside_heads_(model: nn.Module, cfg: PruneStage, run: Run) -> None:
    """Sort the dimensions inside heads by what they are worth; rank 0 sorts for all ranks."""
    if cfg.inside_heads and run.rank == 0:
        rotate_(model.eval(), (batch.images for batch in run.feed.calibration(cfg.score_images)))
    if cfg.inside_heads:
        share_(model.state_dict().values(), run.group)


def _reconstructed(
    model: nn.Module, whole: nn.Module, kept: dict[str, torch.Tensor], cfg: PruneStage, log: StageLog, run: Run
) -> nn.Module:
    """Return the cut network, its weights solved against the uncut one `whole`; rank 0 solves for all ranks."""
    assert cfg.reconstruct != "none"
    if run.rank == 0:
        started = time.monotonic()
        log.doing("reads the images to solve from")
        most = affordable_images(whole.eval(), example_images(run.shape, run.device))
        wanted = min(cfg.reconstruct_images * JUDGED // (JUDGED - 1), most)
        images = torch.cat([batch.images for batch in run.feed.calibration(wanted)])
        views = torch.cat([batch.images for batch in run.feed.views(min(cfg.reconstruct_images, most))])
        if cfg.reconstruct == "gradients":
            place_(model, run.device)  # the cut may have left layers that need it to train
        model, method = reconstruct(
            model.eval(),
            whole,
            kept,
            images,
            cfg.reconstruct,
            views=views,
            batches=_shown(run, log),
            tell=log.doing,
            aligned=run.task.aligned,
        )
        seconds = time.monotonic() - started
        log.note(f"weights reconstructed ({method}) from {len(images):,} images, without labels, in {seconds:.0f} s")
    share_(model.state_dict().values(), run.group)
    return model


def _shown(run: Run, log: StageLog) -> Iterator[torch.Tensor]:
    """Yield a batch of augmented training images for each step by gradients, labels unread, in a new order and view each time round."""
    n, generator = len(run.dataset.train), torch.Generator().manual_seed(run.recipe.seed)
    rounds = (run.feed.view(view, torch.randperm(n, generator=generator).split(BATCH)) for view in itertools.count(1))
    batches = (batch.images for batch in itertools.chain.from_iterable(rounds))
    for step, images in enumerate(itertools.islice(batches, STEPS), start=1):
        log.doing(f"step {step} of {STEPS} from the solve")
        yield images


def _accumulate_gradients_(model: nn.Module, cfg: PruneStage, run: Run) -> None:
    """Accumulate the loss's gradient over `score_images` training images in the parameters, up to a factor.

    It is a sum over what the loss is a mean over (images, pixels, objects), divided by the number of images.
    """
    placed = place_(copy.deepcopy(model), run.device).eval()
    placed.zero_grad()
    images = min(cfg.score_images, len(run.dataset.train))
    for batch in run.feed.calibration(images):
        outputs = placed(batch.images)
        loss = run.judged.loss(outputs, batch.targets, label_smoothing=0.0)
        (loss * max(1, int(run.judged.loss_count(outputs, batch.targets))) / images).backward()
    for own, other in zip(model.parameters(), placed.parameters(), strict=True):
        own.grad = None if other.grad is None else other.grad.to(own.device)


def _learn_sparsity(model: nn.Module, cfg: PruneStage, images: torch.Tensor, log: StageLog, run: Run) -> nn.Module:
    """Train with DepGraph's group regularizer (Fang et al. 2023, eq. 7), which drives unimportant channels to 0."""
    assert cfg.sparsity is not None
    regularizer = tp.pruner.GroupNormPruner(
        model,
        example_inputs=images,
        importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer=None),
        reg=cfg.sparsity.strength,
        ignored_layers=[model.get_submodule(classifier(model, run.shape))],
        customized_pruners={},
        unwrapped_parameters={},
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    step = supervised_step(run.learned, label_smoothing=0.0)
    return run.fit(model, step, cfg.sparsity.fit, log=log, phase="sparsity", after_backward=regularizer.regularize)


def _check(goal: Goal, before: Metrics, after: Metrics) -> None:
    """Assert that the cut network costs no more than the budget."""
    metric = METRICS[goal.cost]
    full, cost = before.get(metric, after.get("latency_before_ms")), after[metric]
    assert full is not None
    assert cost is not None
    budget = goal.budget(full)
    assert cost <= budget * (1 + 1e-6), f"the plan allows {budget} {UNITS[goal.cost]}, the network costs {cost}"
