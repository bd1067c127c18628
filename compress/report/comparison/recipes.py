"""Find the settings that differ between recipes, as dotted paths with stages (as in `--set`) and losses by name."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from compress.report.shape import Json

ABSENT: Final = "–"
LEFT_OUT = ("name", "out")  # where a run is stored, not what it does
FEW = 3  # a larger majority is called "all others" instead of listed


@dataclass(frozen=True)
class Difference:
    """One setting and its value in each recipe, a dash if a recipe does not have it."""

    path: str
    values: tuple[str, ...]


def differences(recipes: Sequence[Json]) -> Iterator[Difference]:
    """Yield the settings that are not the same in all recipes."""
    known = {index: _by_name(recipe) for index, recipe in enumerate(recipes)}
    for path, values in _walk("", known):
        yield Difference(path, tuple(values.get(index, ABSENT) for index in range(len(recipes))))


def _by_name(recipe: Json) -> Json:
    """Return the recipe with stages and losses keyed by name instead of position."""
    kept = {key: value for key, value in recipe.items() if key not in (*LEFT_OUT, "stages")}
    stages = recipe["stages"]
    order = " → ".join(str(section.get("stage")) for section in stages)
    return {**kept, "stages": order, **{name: _losses(section) for name, section in _named(stages, "stage").items()}}


def _losses(section: Json) -> Json:
    terms = section.get("loss")
    if not isinstance(terms, list) or not all(isinstance(term, dict) and "name" in term for term in terms):
        return section
    return {**section, "loss": _named(terms, "name")}


def _named(sections: Sequence[Json], key: str) -> dict[str, Json]:
    """Return sections by name; a second `kd` is kd_2."""
    found: dict[str, Json] = {}
    for section in sections:
        name = str(section.get(key))
        count = sum(str(other.get(key)) == name for other in found.values())
        found[name if not count else f"{name}_{count + 1}"] = section
    return found


def _walk(path: str, sections: Mapping[int, Json]) -> Iterator[tuple[str, dict[int, str]]]:
    """Yield the paths below `path` where the sections differ, with the values of those that have one."""
    for key in dict.fromkeys(key for section in sections.values() for key in section):
        below = f"{path}.{key}" if path else key
        values = {index: section[key] for index, section in sections.items() if key in section}
        are_sections = all(isinstance(value, Mapping) for value in values.values())
        # A stage that some recipes lack already shows in the order of the stages.
        if are_sections and (len(values) == len(sections) or all("stage" in value for value in values.values())):
            yield from _walk(below, values)
        elif len(values) < len(sections) or any(value != next(iter(values.values())) for value in values.values()):
            yield below, {index: _text(value) for index, value in values.items()}


def _text(value: Any) -> str:
    """Return a value in YAML's flow style."""
    if isinstance(value, Mapping):
        parts = (f"{key} {_text(below)}" for key, below in value.items() if key != "name" and below is not None)
        return ", ".join(parts) or "yes"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def by_value(names: Sequence[str], values: Sequence[str]) -> list[tuple[str, str]]:
    """Return each value once, in order, with its names; a large majority is called `all others` and comes last."""
    groups: dict[str, list[str]] = {}
    for name, value in zip(names, values, strict=True):
        groups.setdefault(value, []).append(name)
    most = max(groups, key=lambda value: len(groups[value]))
    has_others = len(groups) > 1 and len(groups[most]) > FEW
    found = [(value, ", ".join(of)) for value, of in groups.items() if not (has_others and value == most)]
    return [*found, (most, "all others")] if has_others else found
