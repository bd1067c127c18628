"""Two files on the same images: what was lost, what was gained, and how small a loss would have been seen."""

import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist

from export.gate.answers import Answers

ALPHA = 0.05  # two-sided: of gates on equal files one in forty takes chance for a loss
POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """Counts over the images that both answered; `lost` was right and is wrong now, `gained` the other way round."""

    images: int
    right_before: int
    lost: int
    gained: int
    flipped: int  # any other answer than before, also from wrong to wrong
    by_class: dict[str, tuple[int, int]]  # lost and gained of each class that changed

    @property
    def top1_before(self) -> float:
        """The old file's top-1 on these images."""
        return self.right_before / self.images

    @property
    def top1(self) -> float:
        """The new file's top-1 on these images."""
        return (self.right_before - self.lost + self.gained) / self.images

    @property
    def ratio(self) -> float:
        """The new top-1 over the old; of nothing right before, 1 is all that can be kept."""
        return self.top1 / self.top1_before if self.right_before else 1.0

    @property
    def p_value(self) -> float:
        """How likely equal files differ by this much or more."""
        return mcnemar(self.lost, self.gained)

    @property
    def detectable(self) -> float:
        """The smallest loss, as a fraction of the images, that this many images with this much churn show."""
        return detectable_loss(self.images, (self.lost + self.gained) / self.images)

    def classes_lost(self) -> list[str]:
        """Return the classes that lost for sure; ALPHA is shared among all that changed (Bonferroni)."""
        share = ALPHA / max(1, len(self.by_class))
        return [name for name, counts in self.by_class.items() if counts[0] > counts[1] and mcnemar(*counts) < share]


def pair(before: Answers, now: Answers) -> Paired:
    """Count over the images that both have; classes are compared by name."""
    both = [(before.rows[digest], now.rows[digest]) for digest in now.rows.keys() & before.rows.keys()]
    lost = Counter(label for (label, old), (_, new) in both if old == label != new)
    gained = Counter(label for (label, old), (_, new) in both if old != label == new)
    return Paired(
        images=len(both),
        right_before=sum(label == old for (label, old), _ in both),
        lost=lost.total(),
        gained=gained.total(),
        flipped=sum(old != new for (_, old), (_, new) in both),
        by_class={name: (lost[name], gained[name]) for name in sorted(lost.keys() | gained.keys())},
    )


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided exact p-value of McNemar's test (1947): of the images that changed sides, half went each way by chance."""
    changed = lost + gained
    tail = sum(math.comb(changed, count) for count in range(max(lost, gained), changed + 1))
    return min(1.0, 2 * tail / (1 << changed))


def detectable_loss(images: int, discordance: float, *, power: float = POWER) -> float:
    """Return the smallest loss (a fraction of the images) that McNemar's test finds with this power.

    `discordance` is the fraction of images that one file answers right and the other wrong. Connor (1987) gives the images
    that a loss needs; solved for the loss by bisection. No fewer flips than make the exact test significant will do.
    """
    sure, often = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(power)

    def needs(loss: float) -> float:
        changing = max(discordance, loss)
        return (sure * math.sqrt(changing) + often * math.sqrt(changing - loss**2)) ** 2 / loss**2

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if needs(middle) <= images else (middle, high)
    fewest = next(count for count in range(1, 100) if mcnemar(count, 0) < ALPHA)
    return max(high, fewest / images)
