"""Say what is wrong in a recipe: one line for each mistake, with the path, the value and the repair."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from compress.recipe.section import NAME, Section
from export.errors import did_you_mean

Schema = dict[str, Any]
OLD_BOOLEANS = {"yes", "no", "on", "off", "y", "n", "true", "false"}


@dataclass(frozen=True)
class _Place:
    """A place in the recipe: its path as the user writes it, and the JSON Schema of what belongs there."""

    path: str
    schema: Schema
    description: str


def explain(error: ValidationError, section: type[Section]) -> list[str]:
    """Return a line for each mistake in a section, such as `stages.2.fit.epochs: must be > 0, got 0`."""
    schema = section.model_json_schema()
    mistakes = error.errors(include_url=False)
    return [_line(mistake, schema) for mistake in mistakes if not _is_echo(mistake)]


def unknown(name: str, known: Iterable[str]) -> str:
    """Return a phrase for an unknown name: the nearest known one, and all of them."""
    names = list(known)
    near = did_you_mean(name, names)
    return f"{near} (known: {', '.join(names)})" if near else f"known: {', '.join(names)}"


def show(value: object) -> str:
    """Return a value as an error message shows it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _line(mistake: ErrorDetails, schema: Schema) -> str:
    place = _place(mistake["loc"], schema)
    value, limits = mistake["input"], mistake.get("ctx", {})
    match mistake["type"]:
        case "value_error":  # a section's own check, whose message starts with the path inside the section
            return ".".join(filter(None, [place.path, str(limits["error"])]))
        case "extra_forbidden":
            section = _place(mistake["loc"][:-1], schema).schema
            return f"{place.path}: unknown key; {unknown(str(mistake['loc'][-1]), section['properties'])}"
        case "union_tag_invalid":
            known = re.findall(r"'([^']*)'", limits["expected_tags"])
            return f"{place.path}.{_tag(place)}: unknown value {show(limits['tag'])}; {unknown(limits['tag'], known)}"
        case "union_tag_not_found":
            return f"{place.path}.{_tag(place)}: missing; one of {', '.join(place.schema['discriminator']['mapping'])}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", limits["expected"])
            repair = f"must be {limits['expected']}, got" if len(known) < 2 else "unknown value"
            return f"{place.path}: {repair} {show(value)}" + (
                f"; {unknown(str(value), known)}" if len(known) > 1 else ""
            )
        case "missing":
            return f"{place.path}: missing" + (f"; {place.description}" if place.description else "")
        case "string_pattern_mismatch" if limits["pattern"] == NAME:
            wanted = "must be lower-case letters, digits, - and _, the first a letter or digit, at most 64"
            return f"{place.path.removesuffix('.[key]')}: {wanted}, got {show(value)}"
        case "string_pattern_mismatch":
            return f"{place.path}: got {show(value)}, wanted {place.description}"
        case kind:
            wanted = WANTED[kind](limits) if kind in WANTED else mistake["msg"]
            return f"{place.path or 'the file'}: {wanted}, got {show(value)}{_hint(kind, value, place)}"


WANTED: dict[str, Callable[[dict[str, Any]], str]] = {
    "greater_than": lambda limits: f"must be > {limits['gt']:.10g}",
    "greater_than_equal": lambda limits: f"must be >= {limits['ge']:.10g}",
    "less_than": lambda limits: f"must be < {limits['lt']:.10g}",
    "less_than_equal": lambda limits: f"must be <= {limits['le']:.10g}",
    "int_type": lambda _: "must be a whole number",
    "int_from_float": lambda _: "must be a whole number",
    "float_type": lambda _: "must be a number",
    "bool_type": lambda _: "must be true or false",
    "string_type": lambda _: "must be text",
    "string_too_short": lambda _: "must not be empty",
    "tuple_type": lambda _: "must be a list",
    "model_type": lambda _: "must be a mapping of keys to values",
    "dict_type": lambda _: "must be a mapping of keys to values",
    "too_short": lambda _: "must not be empty",
    "too_long": lambda limits: f"must have at most {limits['max_length']} entries",
    "json_invalid": lambda _: "must be Unicode text without lone surrogates",
}


def _hint(kind: str, value: object, place: _Place) -> str:
    if kind == "less_than_equal" and "0.01 is one point" in place.description:
        return "; it is a fraction: 0.01 is one point"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in OLD_BOOLEANS:
        return " (only true and false are booleans here)"
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    return ""


def _is_echo(mistake: ErrorDetails) -> bool:
    """Tell whether "too short" is only due to faulty entries, which pydantic does not count and reports by themselves."""
    limits = mistake.get("ctx", {})
    return mistake["type"] == "too_short" and len(mistake["input"]) >= limits["min_length"]


def _tag(place: _Place) -> str:
    return str(place.schema["discriminator"]["propertyName"])


def _place(loc: Sequence[str | int], schema: Schema) -> _Place:
    """Find pydantic's location in the JSON Schema; leave out the union tags that pydantic adds."""
    path: list[str] = []
    node, description = schema, ""
    for part in loc:
        if (ref := node.get("discriminator", {}).get("mapping", {}).get(part)) is not None:
            node = _follow({"$ref": ref}, schema)
            continue
        if "oneOf" in node:  # a union told apart by JSON type, whose name is the tag
            node = next(form for form in (_follow(one, schema) for one in node["oneOf"]) if form["type"] == part)
            continue
        path.append(str(part) if str(part).isprintable() else repr(part))
        if isinstance(part, int):
            fixed = node.get("prefixItems", [])
            node = fixed[part] if part < len(fixed) else node.get("items", {})
        else:
            chosen: Schema = next(iter(node.get("patternProperties", {}).values()), {})  # of a key that the user chose
            node = node.get("properties", {}).get(part, chosen)
        description = node.get("description", "").rstrip(".")
        node = _follow(node, schema)
    return _Place(".".join(path), node, description)


def _follow(node: Schema, schema: Schema) -> Schema:
    """Follow references, and take the first form of an optional value."""
    while "$ref" in node or "anyOf" in node:
        node = schema["$defs"][node["$ref"].removeprefix("#/$defs/")] if "$ref" in node else node["anyOf"][0]
    return node
