"""Did the new file lose accuracy? Compare both files on the same images, image by image."""

from collections.abc import Iterator

import numpy as np

from export.errors import first
from export.gate.checks import Check, Status
from export.gate.predictions import Predictions, pair
from export.tasks.paired import ALPHA, POWER, resamples, two_sided
from export.tasks.task import Comparison, Metric


def accuracy_checks(
    was: Predictions, now: Predictions, limit: float, *, same_file: bool
) -> tuple[list[Check], list[str]]:
    """Return the checks on images, score and single classes, and notes to print.

    `same_file`: the file has the baseline file's digest, so that nothing explains a better score.
    """
    images, found = images_check(was, now), pair(was, now)
    if found is None:
        return [images], []
    score = score_check(found, limit, now.task.metric, same_file=same_file)
    return [images, score, classes_check(found), *own_checks(was, now, limit)], [power_note(found, limit)]


def own_checks(was: Predictions, now: Predictions, limit: float) -> Iterator[Check]:
    """Yield a check for each of a person's own metrics: a significant loss of more than 1 - `limit` of its size fails."""
    names = dict.fromkeys(name for found in (was, now) for name in next(iter(found.own.values()), {}))
    both = [digest for digest in was.own if digest in now.own]
    for name in names:
        if not both or any(name not in found.own[digest] for found in (was, now) for digest in both):
            yield Check(
                name,
                "inconclusive",
                detail="not measured on both: give the --score that the baseline was recorded with",
            )
            continue
        before, after = (np.array([found.own[digest][name] for digest in both]) for found in (was, now))
        gains = (after - before)[resamples(len(both))].mean(axis=1)
        then, here, p_value = float(before.mean()), float(after.mean()), two_sided(gains)
        lost = then - here > (1 - limit) * abs(then)
        status: Status = ("fail" if p_value < ALPHA else "inconclusive") if lost else "pass"
        low, high = np.percentile(gains, [2.5, 97.5])
        detail = f"change {low:+.4g} to {high:+.4g} (95 %), p = {p_value:.2g}, {len(both)} images"
        yield Check(name, status, f"{then:.4g}", f"{here:.4g}", f"less {1 - limit:.1%} of its size", detail)


def images_check(was: Predictions, now: Predictions) -> Check:
    """Check that all of the baseline's images are there, each with its truth; further images are not compared."""
    gone = len(was.rows.keys() - now.rows.keys())
    moved = sum(was.rows[digest][0] != now.rows[digest][0] for digest in was.rows.keys() & now.rows.keys())
    parts = [
        *([f"{gone} of the baseline's images are not in the data"] if gone else []),
        *([f"{moved} have another label"] if moved else []),
    ]
    detail = f"{', '.join(parts)}: give the baseline's images, or record these with --update-baseline" if parts else ""
    return Check(
        "images", "inconclusive" if parts else "pass", str(len(was.rows)), str(len(now.rows)), "none lost", detail
    )


def score_check(found: Comparison, limit: float, metric: Metric, *, same_file: bool) -> Check:
    """Fail for a significant loss beyond the limit; if it is not significant, the check is inconclusive."""
    # If nothing was right before, nothing can be lost.
    ratio, sure = found.now / found.before if found.before else 1.0, found.p_value < ALPHA
    status: Status = "pass"
    detail = found.counts
    if ratio < limit and sure:
        status, detail = "fail", f"lost accuracy: {found.counts}"
    elif ratio < limit:
        status, detail = "inconclusive", f"beyond the limit, but it may be chance: {found.counts}: give more images"
    elif sure and found.now > found.before and same_file:
        status, detail = "unexplained", f"the same file scores better than before: {found.counts}: find out why"
    return Check(metric.title, status, f"{found.before:.2%}", f"{found.now:.2%}", f"{limit:.3f} times", detail)


def classes_check(found: Comparison) -> Check:
    """Fail for a significant loss in a single class, which the total may hide; otherwise name the classes that lost most."""
    detail = first(list(found.lost or found.worse))
    return Check("single classes", "fail" if found.lost else "pass", limit="none lost", detail=detail)


def power_note(found: Comparison, limit: float) -> str:
    """Return a sentence on the smallest loss that would be detected, and whether the limit allows it."""
    allowed = (1 - limit) * found.before
    enough = (
        ""
        if found.detectable <= allowed
        else f", more than the limit allows ({100 * allowed:.2f} points): use more images to detect smaller losses"
    )
    return (
        f"on these {found.images} images a loss of {100 * found.detectable:.2f} points is detected in {POWER:.0%} of cases{enough}; "
        f"{found.changed:.2%} of the predictions changed"
    )
