"""The gate's checks, its verdict, and the exit code that follows."""

from dataclasses import dataclass, field
from typing import Literal

from export.errors import BundleError

Status = Literal["pass", "skipped", "unexplained", "inconclusive", "fail", "broken"]
# The worst status, the last of these, decides: 0 pass, 1 regression, 2 cannot tell, 3 broken bundle.
EXIT_CODES: dict[Status, int] = {"pass": 0, "skipped": 0, "unexplained": 2, "inconclusive": 2, "fail": 1, "broken": 3}


@dataclass(frozen=True)
class Limits:
    """How much worse than the baseline a bundle may be; None means not judged."""

    max_latency_ratio: float | None = 1.05  # of the time, new over old
    min_score_ratio: float | None = 0.995  # of the score, new over old
    max_size_ratio: float = 1.01  # of a file's bytes, and of its multiply-accumulates

    def __post_init__(self) -> None:
        """Raise BundleError for impossible limits."""
        if self.max_latency_ratio is not None and not self.max_latency_ratio > 1:
            raise BundleError(f"max_latency_ratio: must be > 1, got {self.max_latency_ratio}")
        if self.min_score_ratio is not None and not 0 <= self.min_score_ratio <= 1:
            raise BundleError(f"min_score_ratio: must be from 0 to 1, got {self.min_score_ratio}")
        if not self.max_size_ratio >= 1:
            raise BundleError(f"max_size_ratio: must be >= 1, got {self.max_size_ratio}")


@dataclass(frozen=True)
class Check:
    """One row of the verdict; `detail` is a sentence for the reader."""

    name: str
    status: Status
    was: str = ""
    now: str = ""
    limit: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Measured:
    """A number to plot over time; smaller is better."""

    name: str
    unit: str
    value: float
    spread: str = ""


@dataclass(frozen=True)
class Verdict:
    """All checks of one bundle, in order."""

    title: str
    checks: tuple[Check, ...]
    metrics: tuple[Measured, ...] = ()
    notes: tuple[str, ...] = ()
    environment: dict[str, object] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """The worst status of all checks; inconclusive if nothing was judged."""
        found = [check.status for check in self.checks if check.status != "skipped"]
        return max(found, key=list(EXIT_CODES).index, default="inconclusive")

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regression, 2 cannot tell, 3 broken bundle."""
        return EXIT_CODES[self.status]
