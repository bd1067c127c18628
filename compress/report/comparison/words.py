"""Who has which value, in few words."""

from collections.abc import Sequence

FEW = 3  # names that are worth spelling out where the rest can be called the others


def by_value(names: Sequence[str], values: Sequence[str]) -> list[tuple[str, str]]:
    """Return each value once, in order, with the names that have it; a large majority is `all others`, and comes last."""
    groups: dict[str, list[str]] = {}
    for name, value in zip(names, values, strict=True):
        groups.setdefault(value, []).append(name)
    most = max(groups, key=lambda value: len(groups[value]))
    has_others = len(groups) > 1 and len(groups[most]) > FEW
    found = [(value, ", ".join(of)) for value, of in groups.items() if not (has_others and value == most)]
    return [*found, (most, "all others")] if has_others else found


def sentence(names: Sequence[str], values: Sequence[str]) -> str:
    """Return `a, b: 72 images; c: 360 images`."""
    return "; ".join(f"{of}: {value}" for value, of in by_value(names, values))
