"""Did the new file lose accuracy? Both on the same images, image by image."""

from export.gate.answers import Answers
from export.gate.checks import Check, Status
from export.gate.hard import named
from export.gate.paired import ALPHA, POWER, Paired, pair


def accuracy_checks(was: Answers, now: Answers, limit: float, *, same_file: bool) -> tuple[list[Check], list[str]]:
    """Return the checks on images, top-1 and single classes, and what else to print.

    `same_file`: the file has the digest of the baseline's, so that nothing explains that it answers better.
    """
    images, found = images_check(was, now), pair(was, now)
    if not found.images:
        return [images], []
    return [images, top1_check(found, limit, same_file=same_file), classes_check(found)], [power_note(found, limit)]


def images_check(was: Answers, now: Answers) -> Check:
    """The baseline's images must all be there, each in its class; more of them are not compared."""
    gone = len(was.rows.keys() - now.rows.keys())
    moved = sum(was.rows[digest][0] != now.rows[digest][0] for digest in was.rows.keys() & now.rows.keys())
    parts = [
        *([f"{gone} of the baseline's images are not in the data"] if gone else []),
        *([f"{moved} lie in another class"] if moved else []),
    ]
    detail = f"{', '.join(parts)}: give the baseline's images, or record these with --update-baseline" if parts else ""
    return Check(
        "images", "inconclusive" if parts else "pass", str(len(was.rows)), str(len(now.rows)), "none lost", detail
    )


def top1_check(found: Paired, limit: float, *, same_file: bool) -> Check:
    """Fail for a loss beyond the limit that McNemar's test does not take for chance; if it may be chance, nobody can tell."""
    sure = found.p_value < ALPHA
    counts = (
        f"{found.lost} lost, {found.gained} gained, {found.flipped} flipped of {found.images}, p = {found.p_value:.2g}"
    )
    status: Status = "pass"
    if found.ratio < limit and sure:
        status, counts = "fail", f"lost accuracy: {counts}"
    elif found.ratio < limit:
        status, counts = "inconclusive", f"beyond the limit, but it may be chance: {counts}: give more images"
    elif sure and found.gained > found.lost and same_file:
        status, counts = "unexplained", f"the same file answers better than it did: {counts}: find out why"
    return Check("top-1", status, f"{found.top1_before:.2%}", f"{found.top1:.2%}", f"{limit:.3f} times", counts)


def classes_check(found: Paired) -> Check:
    """Fail for a class that lost for sure, which the whole may hide; otherwise name the classes that lost most."""
    worst = sorted(found.by_class, key=lambda name: found.by_class[name][1] - found.by_class[name][0])
    losers = [name for name in worst if found.by_class[name][0] > found.by_class[name][1]]
    sure = [name for name in losers if name in found.classes_lost()]
    text = named(
        [f"{name} ({found.by_class[name][0]} lost, {found.by_class[name][1]} gained)" for name in sure or losers]
    )
    return Check("single classes", "fail" if sure else "pass", limit="none lost", detail=text)


def power_note(found: Paired, limit: float) -> str:
    """Say how small a loss would have been seen, and whether that is small enough for the limit."""
    allowed = (1 - limit) * found.top1_before
    enough = (
        ""
        if found.detectable <= allowed
        else f", more than the limit lets through ({100 * allowed:.2f} points): more images show smaller losses"
    )
    return (
        f"on these {found.images} images a loss of {100 * found.detectable:.2f} points is seen in {POWER:.0%} of the cases{enough}; "
        f"{found.flipped / found.images:.2%} of the answers flipped"
    )
