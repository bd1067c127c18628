"""Format numbers for readers: few digits, with a unit; a dash if unknown."""

from collections.abc import Sequence

UNKNOWN = "–"
GAP = "\u00a0"  # keeps a number and its unit on one line


def percent(fraction: float | None, decimals: int = 2) -> str:
    """Return a fraction as 97.78 %."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.{decimals}f}{GAP}%"


def points(difference: float) -> str:
    """Return a signed difference of two fractions as −0.56 points."""
    value = round(100 * difference, 2)
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{abs(value):.2f}{GAP}points"


def loss(drop: float) -> str:
    """Return a drop of a fraction as 0.56 points; a negative one is a gain."""
    return f"{round(100 * drop, 2) + 0.0:.2f}{GAP}points".replace("-", "−")  # no −0.00


def change(before: float, after: float) -> str:
    """Return a relative change as −58 %; empty below half a percent."""
    percents = round(100 * (after / before - 1)) if before else 0
    return f"{percents:+}{GAP}%".replace("-", "−") if percents else ""


def significant(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Return a number with `digits` significant digits and its unit, such as 0.412 ms, 17.9 ms or 1,204 ms."""
    if value is None:
        return UNKNOWN
    size = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    text = f"{value:.{digits}g}" if abs(value) < 0.1 else f"{value:,.{max(digits - size, 0)}f}"
    return f"{text}{GAP}{unit}" if unit else text


def times(ratio: float | None) -> str:
    """Return a ratio as 2.31×."""
    return UNKNOWN if ratio is None else f"{ratio:.2f}×"


def interval(ends: Sequence[float] | None, decimals: int = 2, scale: float = 1) -> str:
    """Return the ends of an interval as 1.88–2.00; with scale 100 fractions are percentages."""
    return "–".join(f"{scale * end:.{decimals}f}" for end in ends) if ends else UNKNOWN


def duration(seconds: float | None) -> str:
    """Return a time as 0.8 s, 42 s, 12 min 30 s or 3 h 05 min."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute:02} min"
    return f"{minute} min {second:02} s" if minute else f"{second} s"


def tick(value: float) -> str:
    """Return an axis label without trailing zeros."""
    return f"{value:,.10g}"


def heading(title: str) -> str:
    """Return a metric's title in the case of a heading: Top-1, mIoU."""
    return title[:1].upper() + title[1:] if title.islower() else title
