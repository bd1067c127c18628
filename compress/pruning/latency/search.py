"""Prune to a measured latency: choose by prediction, export and time the choice, correct the budget, choose again."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from compress.errors import CompressError
from compress.pruning.costs import Floats
from compress.pruning.goals import Goal
from compress.pruning.latency.clock import Clock
from compress.pruning.latency.nodes import Node
from compress.pruning.latency.predict import LatencyModel, choose_within, latency_model
from compress.pruning.latency.timings import Table, timed_nodes
from compress.pruning.plan import Cut, Options, cut_
from export.command.files import key_of
from export.images.size import Shape, written

ROUNDS = 12
# Stop when a time is between these fractions of the wanted one; measured again, it differs by half a percent.
CLOSE = (0.97, 0.995)
AIM = 0.985  # fraction of the wanted time to aim at
NEIGHBOURS = 500  # choices that are predicted to find the next one to measure
REACH = 0.5  # widths, as fractions summed over groups, within which prediction errors are alike
NOISE = 0.01  # of these errors

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
        return Search(self, network, images, options, asked_ms).run()

    def to_json(self, attempts: Sequence[Attempt]) -> dict[str, Any]:
        """Return the wanted, predicted and measured times, and the time of each layer before and after."""
        conditions = self.clock.conditions
        after = timed_nodes(self.file(attempts[-1].cuts), self.model.layers, conditions)
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
    nodes = timed_nodes(reference, options.layers, table.conditions)
    model = latency_model(nodes, options, table, whole_ms=whole_ms, tell=tell)
    return Latency(goal, clock, whole_ms, model, time.monotonic() - started, write, folder, tell)


@dataclass
class Search:
    """Searches the cuts of one network that take at most `asked_ms`, and little less: choose, predict, measure, until it is close."""

    latency: Latency
    network: nn.Module
    images: Tensor
    options: Options
    asked_ms: float
    attempts: list[Attempt] = field(default_factory=list)

    def choose(self, budget_ms: float) -> list[Cut] | None:
        """Return the cuts that lose the least importance within a budget of predicted milliseconds, or None if there are none."""
        return choose_within(self.options, self.latency.model, budget_ms)

    def predict(self, cuts: Sequence[Cut]) -> float:
        """Return the predicted milliseconds of the network after some cuts."""
        return self.latency.model.cost(*self.options.widths(self.options.removed_by(cuts)))

    def measure(self, cuts: Sequence[Cut]) -> float:
        """Return the measured milliseconds of the network after some cuts."""
        student = copy.deepcopy(self.network).cpu()
        cut_(student, self.images.cpu(), cuts)
        return self.latency.measured_ms(student, self.latency.file(cuts))

    def run(self) -> list[Attempt]:
        """Return the attempts with the best last: measured at most `asked_ms`, and the closest to AIM of it.

        Once attempts lie on both sides of `asked_ms`, the next one mixes the cuts of the nearest two, since predictions that are close may be
        out of order. Where that gives nothing new, it changes one group of an attempt. Raises CompressError if the narrowest cuts take over
        `asked_ms`.
        """
        tell, goal, whole_ms = self.latency.tell, self.latency.goal, self.latency.whole_ms
        budget, least = AIM * self.asked_ms, self.options.narrowest
        for number in range(1, ROUNDS + 1):
            found = self._between() or self.choose(budget)
            cuts = least if found is None else found
            if self._is_known(cuts):
                cuts = self._neighbour() or least
                if self._is_known(cuts):
                    break
            self.attempts.append(Attempt(tuple(cuts), self.predict(cuts), self.measure(cuts)))
            predicted, measured = self.attempts[-1].predicted_ms, self.attempts[-1].measured_ms
            tell(
                f"choice {number}: {predicted:.3f} ms predicted, {measured:.3f} ms measured, at most {self.asked_ms:.3f} ms wanted"
            )
            if measured > self.asked_ms and set(cuts) == set(least):
                raise CompressError(goal.refusal(whole_ms, measured))
            if CLOSE[0] <= measured / self.asked_ms <= CLOSE[1]:
                break
            budget *= AIM * self.asked_ms / measured
        best, above = self._nearest()
        if best is None:
            assert above is not None
            raise CompressError(
                f"prune: after {len(self.attempts)} choices the network still takes {above.measured_ms:.3f} ms, more than the wanted "
                f"{self.asked_ms:.3f} ms: end other processes and run again"
            )
        if best.measured_ms < CLOSE[0] * self.asked_ms:
            tell(self._shortfall(best.measured_ms, None if above is None else above.measured_ms))
        return [*(attempt for attempt in self.attempts if attempt is not best), best]

    def _nearest(self) -> tuple[Attempt | None, Attempt | None]:
        """Return the attempt nearest to AIM of those that take at most `asked_ms`, and the fastest of the others."""
        below = [attempt for attempt in self.attempts if attempt.measured_ms <= self.asked_ms]
        above = [attempt for attempt in self.attempts if attempt.measured_ms > self.asked_ms]
        return (
            min(below, key=lambda attempt: abs(attempt.measured_ms - AIM * self.asked_ms), default=None),
            min(above, key=lambda attempt: attempt.measured_ms, default=None),
        )

    def _shortfall(self, best_ms: float, above_ms: float | None) -> str:
        more = "no choice took longer" if above_ms is None else f"the next took {above_ms / self.asked_ms:.1%}"
        return (
            f"the nearest of {len(self.attempts)} choices takes {best_ms / self.asked_ms:.1%} of the wanted {self.asked_ms:.3f} ms, {more}: "
            "times rise in steps with the widths, so a smaller round_to or another time may come nearer"
        )

    def _is_known(self, cuts: Sequence[Cut]) -> bool:
        """Tell whether some cuts were measured before, in any order."""
        return any(set(attempt.cuts) == set(cuts) for attempt in self.attempts)

    def _between(self) -> list[Cut]:
        """Return cuts between the nearest attempts below and above `asked_ms`; empty if there are none.

        Groups are switched one by one from the cuts below to those above, each time the one that keeps the prediction nearest to a straight
        line. The only group that differs gets a width between its two.
        """
        below, above = self._nearest()
        if below is None or above is None:
            return []
        here, there = ({cut.root: cut for cut in attempt.cuts} for attempt in (below, above))
        differ = sorted(root for root in here.keys() | there.keys() if here.get(root) != there.get(root))
        way = (AIM * self.asked_ms - below.measured_ms) / (above.measured_ms - below.measured_ms)
        if len(differ) == 1:
            low, high = (len(cuts[differ[0]].remove) if differ[0] in cuts else 0 for cuts in (here, there))
            here = _switched(here, differ[0], self.options.cut_of(differ[0], low + way * (high - low)))
        count, steps = len(differ), min(max(1, round(way * len(differ))), len(differ) - 1)
        for step in range(1, steps + 1):
            line = below.predicted_ms + (above.predicted_ms - below.predicted_ms) * step / count
            ways = {root: _switched(here, root, [there[root]] if root in there else []) for root in differ}
            best = min(ways, key=lambda root: abs(self.predict(list(ways[root].values())) - line))
            differ.remove(best)
            here = ways[best]
        return [] if self._is_known(list(here.values())) or not differ else list(here.values())

    def _neighbour(self) -> list[Cut]:
        """Return the cuts not measured yet, one group away from the nearest attempts, whose corrected prediction is nearest to AIM."""
        found = []
        bases = [attempt for attempt in self._nearest() if attempt is not None]
        step = -(-len(bases) * len(self.options.blocks) // NEIGHBOURS)
        for base in bases:
            here = {cut.root: cut for cut in base.cuts}
            whole = {index for branch in self.options.branches if branch.path in here for index in branch.groups}
            for index, group in enumerate(self.options.groups):
                blocks = [block for block in self.options.blocks if block.group == index and index not in whole]
                for count in range(0, len(blocks) + 1, step) if blocks else ():
                    cuts = list(_switched(here, group.root, self.options.cuts(blocks[:count])).values())
                    if cuts and not self._is_known(cuts):
                        found.append(cuts)
        corrected = self._corrected(found)
        return min(
            zip(corrected, found, strict=True), key=lambda one: abs(one[0] - AIM * self.asked_ms), default=(0.0, [])
        )[1]

    def _corrected(self, choices: Sequence[Sequence[Cut]]) -> Floats:
        """Return predicted milliseconds times the attempts' measured over predicted ones, interpolated by the distance of widths (kriging)."""
        channels = np.array([group.channels for group in self.options.groups])

        def positions(many: Iterable[Sequence[Cut]]) -> Floats:
            return np.array([self.options.removed_by(cuts) / channels for cuts in many]).reshape(-1, len(channels))

        known, wanted = positions(attempt.cuts for attempt in self.attempts), positions(choices)
        errors = np.log([attempt.measured_ms / attempt.predicted_ms for attempt in self.attempts])
        near, far = (np.exp(-np.abs(rows[:, None] - known).sum(2) / REACH) for rows in (known, wanted))
        weights = np.linalg.solve(near + NOISE * np.eye(len(known)), errors - errors.mean())
        corrected: Floats = np.array([self.predict(cuts) for cuts in choices]) * np.exp(errors.mean() + far @ weights)
        return corrected


def _switched(cuts: Mapping[str, Cut], root: str, to: Sequence[Cut]) -> dict[str, Cut]:
    """Return the cuts, by root, with others for one root."""
    return {key: cut for key, cut in cuts.items() if key != root} | {cut.root: cut for cut in to}


def _by_layer(model: LatencyModel, after: Sequence[Node], after_ms: float) -> list[dict[str, Any]]:
    """Return each layer's milliseconds before and after, with the nodes that follow it; nodes that follow none are named ""."""
    names = [layer.name for layer in model.layers]
    rows: dict[str, list[float]] = {}
    for column, nodes, scale in ((0, model.nodes, model.scale), (1, after, after_ms / sum(node.ms for node in after))):
        for node in nodes:
            reached = [node.layer] if node.layer is not None else list(node.follows[:1])
            name = names[reached[0]] if reached else ""
            rows.setdefault(name, [0.0, 0.0])[column] += scale * node.ms
    return [{"name": name, "before_ms": before, "after_ms": later} for name, (before, later) in rows.items()]
