"""Which trials are on the front, and how much of the space it covers. Losses throughout: less is better."""

from collections.abc import Sequence

Losses = Sequence[float]


def front(points: Sequence[Losses]) -> list[int]:
    """Return the indices of the points that no other is at least as good as everywhere and better somewhere; of equal ones the first."""
    return [
        index
        for index, own in enumerate(points)
        if not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and (tuple(other) != tuple(own) or place < index)
            for place, other in enumerate(points)
            if place != index
        )
    ]


def hypervolume(points: Sequence[Losses], worst: Losses) -> float:
    """Return the volume between the points' front and `worst`: slices along the last axis, each a problem of one axis less."""
    inside = sorted((p for p in points if all(a < b for a, b in zip(p, worst, strict=True))), key=lambda p: p[-1])
    if not inside:
        return 0.0
    if len(worst) == 1:
        return worst[0] - inside[0][0]
    ends = [*(point[-1] for point in inside[1:]), worst[-1]]
    return sum(
        (end - point[-1]) * hypervolume([p[:-1] for p in inside[: index + 1]], worst[:-1])
        for index, (point, end) in enumerate(zip(inside, ends, strict=True))
        if end > point[-1]
    )


def covered(points: Sequence[Losses], are_allowed: Sequence[bool]) -> list[float]:
    """Return after each point the fraction of the box around all of them, a tenth wider, that the allowed ones' front covers."""
    if not points:
        return []
    lows, highs = ([end(axis) for axis in zip(*points, strict=True)] for end in (min, max))
    spans = [(high - low) or 1.0 for low, high in zip(lows, highs, strict=True)]
    scaled = [[(x - low) / span / 1.1 for x, low, span in zip(point, lows, spans, strict=True)] for point in points]
    allowed = [point if is_allowed else None for point, is_allowed in zip(scaled, are_allowed, strict=True)]
    return [hypervolume([p for p in allowed[: n + 1] if p], [1.0] * len(lows)) for n in range(len(points))]
