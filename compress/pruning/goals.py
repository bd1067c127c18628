"""What a cut is held to. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

Cost = Literal["macs", "params", "latency"]
METRICS = {"macs": "macs_m", "params": "params_m", "latency": "latency_ms"}  # where a stage reports a cost, in its unit
UNITS = {"macs": "million multiply-accumulates", "params": "million parameters", "latency": "ms"}


@dataclass(frozen=True)
class Goal:
    """The most that a network may cost: a fraction of what it cost before the cut, or a number in the cost's unit."""

    field: str  # of the recipe
    cost: Cost
    value: float
    is_fraction: bool = True

    def budget(self, before: float, *, step: int = 1, steps: int = 1) -> float:
        """Return what the network may cost after one of several steps, which share the way to the goal evenly."""
        wanted = self.value * before if self.is_fraction else self.value
        return before - (before - wanted) * step / steps

    def refusal(self, before: float, least: float) -> str:
        """Return the sentence that refuses a goal below the least cost that can be reached."""
        reached = least / before if self.is_fraction else least
        what = f"of the present {self.cost}" if self.is_fraction else UNITS[self.cost]
        return (
            f"prune: {self.field}: {self.value:.3g} {what} cannot be reached, the narrowest plan keeps {reached:.3g}: "
            f"raise {self.field}, lower min_keep or round_to, or exclude less"
        )
