"""Read a recipe from YAML, with `--set` overrides, and write it back."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.errors import RecipeError
from compress.recipe import strict_yaml
from compress.recipe.explain import explain, show, unknown
from compress.recipe.order import TAKES
from compress.recipe.schema import EMBEDDED, Recipe, StudentChain

MAX_BYTES = 1_000_000
UNKNOWN = re.compile(r"(.*\.(?:name|criterion)): unknown value '(\w+)'")
# Losses and a criterion of older versions (docs/decisions.md): what to use in their place.
GONE = {**dict.fromkeys(("fitnet", "at", "sp", "rkd"), "kd, or review to compare features"), "bn_scale": "l2, or obs"}


def read_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    data: str | None = None,
    weights: str | None = None,
    out: str | None = None,
) -> Recipe:
    """Read a recipe, apply overrides such as `stages.qat.fit.epochs=2` and the shorthands, and validate it.

    A stage is addressed by its position (`stages.3`) or its name (`stages.qat`, or just `qat`). `data`, `weights` and
    `out` override `data.path`, `model.weights` and `out`. A path also sets `data.dataset: imagefolder` where the recipe
    names no data set, or, given as `data`, an embedded one. Raises RecipeError with a line for each mistake.
    """
    with _named(str(path)):
        raw = strict_yaml.load(_text(path))
        if not isinstance(raw, dict):
            fault = "is empty" if raw is None else f"must be a mapping of keys to values, got {show(raw)}"
            raise RecipeError(f"{fault}; a recipe starts with `name:`, `model:` and `stages:`")
    for override in overrides:
        with _named(f"--set {override}"):
            _override(raw, override)
    with _named(str(path)):
        _apply_shorthands(raw, data=data, weights=weights, out=out)
    # Strict validation refuses "64", 64.0 and true for a whole number; only its JSON form accepts lists for tuples.
    try:
        return Recipe.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {_gone(line)}" for line in explain(error, Recipe))) from error


def _gone(line: str) -> str:
    """Return a mistake's line; for a value that is gone, with what to use in its place."""
    found = UNKNOWN.match(line)
    return f"{found[1]}: {found[2]} was removed; use {GONE[found[2]]}" if found and found[2] in GONE else line


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with all defaults as YAML, which reads back to an equal one."""
    unused = {"data": {"mean", "std"}} if recipe.data.pixels != "normalized" else None  # refused beside such pixels
    path.write_text(strict_yaml.dump(recipe.model_dump(mode="json", exclude=unused)), encoding="utf-8")


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Put a place before a mistake."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error


def _text(path: Path) -> str:
    """Return the file's text; raise RecipeError where it is missing, unreadable, too large or binary."""
    if not path.exists():
        siblings = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        folder = f"in {path.parent}: {unknown(path.name, siblings)}" if siblings else f"{path.parent} holds no recipes"
        raise RecipeError(f"no such file; {folder}")
    if not path.is_file():
        raise RecipeError("not a file; give the recipe's .yaml")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot be read ({error.strerror}); check its permissions") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES:,} bytes, so it is not a recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _apply_shorthands(raw: dict[str, Any], *, data: str | None, weights: str | None, out: str | None) -> None:
    if data is not None:
        _put(raw, ["data", "path"], str(Path(data).expanduser()))
        if raw["data"].get("dataset") in EMBEDDED:
            raw["data"]["dataset"] = "imagefolder"
    if weights is not None:
        _put(raw, ["model", "weights"], str(Path(weights).expanduser()))
    if out is not None:
        raw["out"] = str(Path(out).expanduser())
    if raw.get("teacher") is not None:  # a single teacher becomes a list, a plain name becomes a section
        each = raw["teacher"] if isinstance(raw["teacher"], list) else [raw["teacher"]]
        raw["teacher"] = [{"network": one} if isinstance(one, str) else one for one in each]
    if isinstance(raw.get("data"), dict) and raw["data"].get("path") is not None:
        raw["data"].setdefault("dataset", "imagefolder")  # digits, the default, have no folder


def _override(raw: dict[str, Any], override: str) -> None:
    """Set `path.to.key=value` in the raw recipe; keys are validated later, with the rest."""
    path, equals, value = override.partition("=")
    if not equals or not all(parts := path.strip().split(".")):
        raise RecipeError("must be path.to.key=value")
    _put(raw, _locate(raw, parts), strict_yaml.load(value))


def _locate(raw: dict[str, Any], parts: list[str]) -> list[str]:
    """Return the path with a stage's name replaced by its position; `students.NAME.STAGE` names a student's stage."""
    start, fields, holder, students = list[str](), Recipe.model_fields, raw, raw.get("students")
    if parts[0] == "students" and len(parts) > 2 and isinstance(students, dict):
        start, parts, fields, holder = parts[:2], parts[2:], StudentChain.model_fields, students.get(parts[1]) or {}
    among_stages = parts[0] == "stages"
    named = parts[1:] if among_stages else parts
    if not named or (named[0].isdecimal() if among_stages else named[0] in fields):
        return [*start, *parts]
    sections = holder.get("stages")
    names = [str(one.get("stage")) for one in sections if isinstance(one, dict)] if isinstance(sections, list) else []
    places = [[*start, "stages", str(index)] for index, name in enumerate(names) if name == named[0]]
    if not places:
        missing = "the recipe has no such stage" if named[0] in TAKES else f"unknown path {'.'.join([*start, *parts])}"
        raise RecipeError(
            f"{missing}; {unknown(named[0], dict.fromkeys(names if among_stages else [*fields, *names]))}"
        )
    if len(places) > 1:
        raise RecipeError(f"the recipe has {named[0]} more than once; name {' or '.join(map('.'.join, places))}")
    return [*places[0], *named[1:]]


def _put(raw: dict[str, Any], parts: Sequence[str], value: object) -> None:
    """Set a value deep in the raw recipe; make the missing sections on its path."""
    node: Any = raw
    for depth, part in enumerate(parts):
        here, last = ".".join(parts[:depth]), depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise RecipeError(f"{here} has entries 0 to {len(node) - 1}, got {part}")
            key: Any = int(part)
        elif isinstance(node, dict):
            key = part
        else:
            raise RecipeError(f"{here} is {show(node)} and has no {part}; set {here} itself")
        if last:
            node[key] = value
        else:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
