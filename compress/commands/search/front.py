"""Pareto front and hypervolume of points. All coordinates are losses: less is better."""

from collections.abc import Sequence

Losses = tuple[float, ...]


def front(points: Sequence[Losses]) -> list[int]:
    """Return the indices of the points that no other dominates; of equal points only the first."""

    def beats(other: Losses, own: Losses) -> bool:
        return other != own and all(a <= b for a, b in zip(other, own, strict=True))

    return [i for i, own in enumerate(points) if points.index(own) == i and not any(beats(p, own) for p in points)]


def hypervolume(points: Sequence[Losses], worst: Losses) -> float:
    """Return the volume between the points' front and `worst`, by slices along the last axis, each with one dimension less."""
    inside = sorted((p for p in points if all(a < b for a, b in zip(p, worst, strict=True))), key=lambda p: p[-1])
    if not inside:
        return 0.0
    if len(worst) == 1:
        return worst[0] - inside[0][0]
    ends = [*(point[-1] for point in inside[1:]), worst[-1]]
    heights = [end - point[-1] for point, end in zip(inside, ends, strict=True)]
    slices = [hypervolume([p[:-1] for p in inside[: n + 1]], worst[:-1]) if height else 0.0 for n, height in enumerate(heights)]  # fmt: skip
    return sum(height * area for height, area in zip(heights, slices, strict=True))


def covered(points: Sequence[Losses], are_allowed: Sequence[bool]) -> list[float]:
    """Return, after each point, the hypervolume of the allowed ones as a fraction of the box around all, made a tenth wider."""
    columns = list(zip(*points, strict=True))
    spans = [(min(column), 1.1 * ((max(column) - min(column)) or 1.0)) for column in columns]
    scaled = [tuple((x - low) / span for x, (low, span) in zip(point, spans, strict=True)) for point in points]
    worst = (1.0,) * len(columns)
    return [
        hypervolume([p for p, is_allowed in zip(scaled[: n + 1], are_allowed, strict=False) if is_allowed], worst)
        for n in range(len(points))
    ]
