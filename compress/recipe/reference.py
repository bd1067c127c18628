"""The recipe's reference tables, written from its JSON Schema."""

from typing import Any

from compress.recipe.schema import Recipe

Schema = dict[str, Any]
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference() -> str:
    """Return a Markdown table for the recipe and for each of its sections, in order of first use."""
    schema = Recipe.model_json_schema()
    tables = [_table("Recipe", schema)]
    tables += [_table(name, schema["$defs"][name]) for name in _sections(schema, schema["$defs"])]
    return "\n".join(tables)


def _sections(node: Any, definitions: dict[str, Schema]) -> dict[str, None]:
    """Return the names of the sections that a schema refers to, in order of first use."""
    names: dict[str, None] = {}
    if isinstance(node, dict):
        if "$ref" in node:
            name = _name(node)
            return {name: None} | _sections(definitions[name], definitions)
        for key, child in node.items():
            if key not in ("$defs", "discriminator"):
                names |= _sections(child, definitions)
    elif isinstance(node, list):
        for child in node:
            names |= _sections(child, definitions)
    return names


def _table(name: str, schema: Schema) -> str:
    required = schema.get("required", [])
    rows = [
        f"| `{key}` | {_kind(field)} | {'**required**' if key in required else _default(field)} | {_cell(field.get('description', ''))} |"
        for key, field in schema["properties"].items()
    ]
    head = [f"### {name}", "", schema["description"], "", "| key | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _kind(field: Schema) -> str:
    """Return a phrase for the values that a field takes, with its limits."""
    if "$ref" in field:
        return f"[{_name(field)}](#{_name(field).lower()})"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " ".join(f"`{value}`" for value in field["enum"])
    for union in ("anyOf", "oneOf"):
        if union in field:
            return " or ".join(_kind(option) for option in field[union])
    if field["type"] == "object":
        return f"names, each with {_kind(next(iter(field['patternProperties'].values())))}"
    if field["type"] == "array":
        if "prefixItems" in field:
            return f"{len(field['prefixItems'])} × {_kind(field['prefixItems'][0])}"
        return f"list of {_kind(field['items'])}"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "string": "text",
        "null": "null",
    }
    limits = [f"{sign} {field[limit]:.10g}" for limit, sign in LIMITS.items() if limit in field]
    return " ".join([words[field["type"]], ", ".join(limits)]).strip()


def _default(field: Schema) -> str:
    default = field["default"]
    if isinstance(default, dict):
        return "its defaults" if default else "none"
    if default is None or isinstance(default, bool):
        return f"`{str(default).lower().replace('none', 'null')}`"
    if default and isinstance(default, list) and isinstance(default[0], dict):
        return f"`{', '.join(entry['name'] for entry in default)}`"
    return f"`{default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _name(field: Schema) -> str:
    return str(field["$ref"].rpartition("/")[2])
