"""The cost that pruning must reach. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from compress.errors import CompressError

Cost = Literal["macs", "params", "latency"]
METRICS = {
    "macs": "macs_m",
    "params": "params_m",
    "latency": "latency_ms",
}  # the metric in which a stage reports each cost
UNITS = {"macs": "million multiply-accumulates", "params": "million parameters", "latency": "ms"}


@dataclass(frozen=True)
class Goal:
    """The most that a network may cost: a fraction of its cost before pruning, or a number in the cost's unit."""

    field: str  # the recipe's field that sets it
    cost: Cost
    value: float
    is_fraction: bool = True

    def budget(self, before: float, *, least: float = 0.0, step: int = 1, steps: int = 1) -> float:
        """Return the highest cost allowed after step `step` of `steps` equal steps to the goal.

        Raises CompressError where it is below `least`, the lowest cost that pruning can reach.
        """
        wanted = self.value * before if self.is_fraction else self.value
        allowed = before - (before - wanted) * step / steps
        if least > allowed:
            raise CompressError(self.refusal(before, least))
        return allowed

    def refusal(self, before: float, least: float) -> str:
        """Return the error message for a goal below `least`, the lowest cost that pruning can reach."""
        reached = least / before if self.is_fraction else least
        unit = f"of the {self.cost}" if self.is_fraction else UNITS[self.cost]
        missed = f"prune: {self.field}: {self.value:.3g} {unit} cannot be reached"
        if least >= before:
            return (
                f"{missed}, as no layer can be cut: leave prune out, choose another network, lower min_keep or round_to, "
                "or exclude less"
            )
        return (
            f"{missed}, the narrowest network has {reached:.3g}: "
            f"raise {self.field}, lower min_keep or round_to, or exclude less"
        )
