"""The recipe's reference tables, written from its JSON Schema."""

import json
import re
from typing import Any

from compress.recipe.schema import Recipe

Schema = dict[str, Any]
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
WORDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}


def reference() -> str:
    """Return a Markdown table for the recipe and for each of its sections, in order of first use."""
    schema = Recipe.model_json_schema()
    sections = schema.pop("$defs")
    tables = [_table("Recipe", schema), *(_table(name, sections[name]) for name in _used(schema, sections))]
    return "\n".join(tables)


def _used(schema: Schema, sections: dict[str, Schema]) -> dict[str, None]:
    """Return the names of the sections that a schema refers to, in order of first use."""
    names: dict[str, None] = {}
    for name in re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(schema)):
        names |= {name: None} | _used(sections[name], sections)
    return names


def _table(name: str, schema: Schema) -> str:
    required = schema.get("required", [])
    rows = [
        f"| `{key}` | {_kind(field)} | {'**required**' if key in required else _default(field['default'])} | {_cell(field)} |"
        for key, field in schema["properties"].items()
    ]
    head = [f"### {name}", "", schema["description"], "", "| key | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _kind(field: Schema) -> str:
    """Return a phrase for the values that a field takes, with its limits."""
    match field:
        case {"$ref": path}:
            name = path.rpartition("/")[2]
            return f"[{name}](#{name.lower()})"
        case {"const": value}:
            return f"`{value}`"
        case {"enum": values}:
            return " ".join(f"`{value}`" for value in values)
        case {"anyOf": options} | {"oneOf": options}:
            return " or ".join(map(_kind, options))
        case {"type": "object"}:
            of_each = field.get("patternProperties", {"": field.get("additionalProperties")})
            return f"names, each with {_kind(next(iter(of_each.values())))}"
        case {"prefixItems": items}:
            return f"{len(items)} × {_kind(items[0])}"
        case {"type": "array"}:
            return f"list of {_kind(field['items'])}"
    limits = [f"{sign} {field[limit]:.10g}" for limit, sign in LIMITS.items() if limit in field]
    return " ".join([WORDS[field["type"]], ", ".join(limits)]).strip()


def _default(value: Any) -> str:
    match value:
        case dict():
            return "its defaults" if value else "none"
        case None | bool():
            return f"`{json.dumps(value)}`"
        case [{"name": _}, *_]:
            return f"`{', '.join(entry['name'] for entry in value)}`"
    return f"`{value}`"


def _cell(field: Schema) -> str:
    return str(field.get("description", "")).replace("|", "\\|").replace("\n", " ")
