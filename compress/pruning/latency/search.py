"""Prune to a measured latency: choose by prediction, export and time the choice, correct the budget, choose again."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.errors import CompressError
from compress.pruning.goals import Goal
from compress.pruning.latency.clock import Clock
from compress.pruning.latency.nodes import Block, read_blocks
from compress.pruning.latency.predict import LatencyModel, choose_within, latency_model
from compress.pruning.latency.timings import Table
from compress.pruning.plan import Cut, Options, cut_
from export.command.files import key_of
from export.images.size import Shape, written

ROUNDS = 8
# Stop when a time is between these fractions of the wanted one; measured again, it differs by half a percent.
CLOSE = (0.97, 0.995)
AIM = 0.985  # fraction of the wanted time to aim at

Write = Callable[[nn.Module, Path], None]  # export a network on the CPU as the file that will be served
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Attempt:
    """One choice of cuts, with its predicted and measured time."""

    cuts: tuple[Cut, ...]
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True)
class Latency:
    """Prunes one network to a time: its goal, clock and latency model."""

    goal: Goal
    clock: Clock
    whole_ms: float
    model: LatencyModel
    table_s: float
    write: Write
    folder: Path
    tell: Tell

    def budget(self, step: int, steps: int) -> float:
        """Return the most that the network may take after step `step` of `steps`, in ms."""
        return self.goal.budget(self.whole_ms, step=step, steps=steps)

    def file(self, cuts: Sequence[Cut]) -> Path:
        """Return where the network is written after some cuts."""
        return self.folder / f"{key_of({'cuts': [cut.to_json() for cut in cuts]})}.onnx"

    def measured_ms(self, network: nn.Module, file: Path) -> float:
        """Export a network and time it interleaved with the reference, so that a fraction holds on a machine of varying speed."""
        self.write(network, file)
        ratio, _, ms = self.clock.against(file)
        return ratio.ratio * self.whole_ms if self.goal.is_fraction else ms

    def choose(self, network: nn.Module, images: Tensor, options: Options, asked_ms: float) -> list[Attempt]:
        """Return the attempts; the last takes at most `asked_ms`, and little less if the widths allow.

        Raises CompressError if even the narrowest network takes longer.
        """

        def measure(cuts: Sequence[Cut]) -> float:
            student = copy.deepcopy(network).cpu()
            cut_(student, images.cpu(), cuts)
            return self.measured_ms(student, self.file(cuts))

        return until_close(
            asked_ms,
            lambda budget_ms: choose_within(options, self.model, budget_ms),
            lambda cuts: self.predicted_ms(options, cuts),
            measure,
            options.cut_of,
            options.narrowest,
            tell=self.tell,
            refuse=lambda least: CompressError(self.goal.refusal(self.whole_ms, least)),
        )

    def predicted_ms(self, options: Options, cuts: Sequence[Cut]) -> float:
        """Return the predicted time of the network after some cuts."""
        return self.model.cost(*options.widths(options.removed_by(cuts)))

    def to_json(self, attempts: Sequence[Attempt]) -> dict[str, Any]:
        """Return the wanted, predicted and measured times, and the time of each layer before and after."""
        conditions = self.clock.conditions
        after = read_blocks(self.file(attempts[-1].cuts), self.model.layers, conditions)
        return {
            "goal": asdict(self.goal),
            "conditions": asdict(conditions) | {"image_size": written(self.clock.shape[1:])},
            "before_ms": self.whole_ms,
            "asked_ms": self.budget(1, 1),
            "attempts": [
                {"predicted_ms": attempt.predicted_ms, "measured_ms": attempt.measured_ms} for attempt in attempts
            ],
            "table": {"seconds": self.table_s, "timed": self.model.timed},
            "layers": _by_layer(self.model, after, attempts[-1].measured_ms),
        }


def open_latency(
    network: nn.Module,
    options: Options,
    goal: Goal,
    table: Table,
    *,
    shape: Shape,
    folder: Path,
    write: Write,
    tell: Tell,
) -> Latency:
    """Export the unpruned network into `folder`, time it, and fill the latency table; all under the table's conditions.

    Raises CompressError if the machine is too busy to measure times.
    """
    folder.mkdir(exist_ok=True)
    reference = folder / "before.onnx"
    write(copy.deepcopy(network).cpu(), reference)
    clock = Clock(reference, table.conditions, shape)
    whole_ms = clock.require_quiet(tell)
    started = time.monotonic()
    nodes = read_blocks(reference, options.layers, table.conditions)
    model = latency_model(nodes, options, table, whole_ms=whole_ms, tell=tell)
    return Latency(goal, clock, whole_ms, model, time.monotonic() - started, write, folder, tell)


def until_close(
    asked_ms: float,
    choose: Callable[[float], list[Cut] | None],
    predict: Callable[[Sequence[Cut]], float],
    measure: Callable[[Sequence[Cut]], float],
    cut_of: Callable[[str, float], list[Cut]],
    narrowest: list[Cut],
    *,
    tell: Tell,
    refuse: Callable[[float], CompressError],
) -> list[Attempt]:
    """Return the attempts with the best last: measured at most `asked_ms`, and the closest to AIM of it.

    `choose` returns cuts for a budget of predicted milliseconds, or None; `predict` and `measure` return the milliseconds of cuts; `cut_of`
    returns the cut of about so many of a group's channels. Once attempts lie on both sides of `asked_ms`, the next one mixes the cuts of
    the nearest two, since predictions that are close may be out of order. Raises `refuse(milliseconds)` if the narrowest cuts take over
    `asked_ms`.
    """
    attempts: list[Attempt] = []
    budget = AIM * asked_ms
    for number in range(1, ROUNDS + 1):
        found: list[Cut] | None = _between(attempts, asked_ms, predict, cut_of) or choose(budget)
        cuts = narrowest if found is None else found
        attempts.append(Attempt(tuple(cuts), predict(cuts), measure(cuts)))
        predicted, measured = attempts[-1].predicted_ms, attempts[-1].measured_ms
        tell(
            f"choice {number}: {predicted:.3f} ms predicted, {measured:.3f} ms measured, at most {asked_ms:.3f} ms wanted"
        )
        if found is None and measured > asked_ms:
            raise refuse(measured)
        if CLOSE[0] <= measured / asked_ms <= CLOSE[1]:
            break
        budget *= AIM * asked_ms / measured
    within = [attempt for attempt in attempts if attempt.measured_ms <= asked_ms]
    if not within:
        raise CompressError(
            f"prune: after {ROUNDS} choices the network still takes {measured:.3f} ms, more than the wanted {asked_ms:.3f} ms: "
            "end other processes and run again"
        )
    best = min(within, key=lambda attempt: abs(attempt.measured_ms - AIM * asked_ms))
    return [*(attempt for attempt in attempts if attempt is not best), best]


def _between(
    attempts: Sequence[Attempt],
    asked_ms: float,
    predict: Callable[[Sequence[Cut]], float],
    cut_of: Callable[[str, float], list[Cut]],
) -> list[Cut]:
    """Return cuts between the nearest attempts below and above `asked_ms`; empty if there are none.

    Groups are switched one by one from the cuts below to those above, each time the one that keeps the prediction nearest to a straight line.
    The only group that differs gets a width between its two.
    """
    below = max((a for a in attempts if a.measured_ms <= asked_ms), key=lambda a: a.measured_ms, default=None)
    above = min((a for a in attempts if a.measured_ms > asked_ms), key=lambda a: a.measured_ms, default=None)
    if below is None or above is None:
        return []
    here, there = ({cut.root: cut for cut in attempt.cuts} for attempt in (below, above))
    differ = sorted(root for root in here.keys() | there.keys() if here.get(root) != there.get(root))
    way = (AIM * asked_ms - below.measured_ms) / (above.measured_ms - below.measured_ms)
    if len(differ) == 1:
        low, high = (len(cuts[differ[0]].remove) if differ[0] in cuts else 0 for cuts in (here, there))
        here = _switched(here, differ[0], cut_of(differ[0], low + way * (high - low)))
    count, steps = len(differ), min(max(1, round(way * len(differ))), len(differ) - 1)
    for step in range(1, steps + 1):
        line = below.predicted_ms + (above.predicted_ms - below.predicted_ms) * step / count
        ways = {root: _switched(here, root, [there[root]] if root in there else []) for root in differ}
        best = min(ways, key=lambda root: abs(predict(list(ways[root].values())) - line))
        differ.remove(best)
        here = ways[best]
    known = any({cut.root: cut for cut in attempt.cuts} == here for attempt in attempts)
    return [] if known or not differ else list(here.values())


def _switched(cuts: Mapping[str, Cut], root: str, to: Sequence[Cut]) -> dict[str, Cut]:
    """Return the cuts, by root, with others for one root."""
    return {key: cut for key, cut in cuts.items() if key != root} | {cut.root: cut for cut in to}


def _by_layer(model: LatencyModel, after: Sequence[Block], after_ms: float) -> list[dict[str, Any]]:
    """Return each layer's milliseconds before and after, with the nodes that follow it; nodes that follow none are named ""."""
    names = [layer.name for layer in model.layers]
    rows: dict[str, list[float]] = {}
    for column, nodes, scale in ((0, model.nodes, model.scale), (1, after, after_ms / sum(node.ms for node in after))):
        for node in nodes:
            reached = [node.layer] if node.layer is not None else list(node.follows[:1])
            name = names[reached[0]] if reached else ""
            rows.setdefault(name, [0.0, 0.0])[column] += scale * node.ms
    return [{"name": name, "before_ms": before, "after_ms": later} for name, (before, later) in rows.items()]
