"""YAML without its traps: plain values only, every key once, no tags, no anchors.

In PyYAML's YAML 1.1 `1e-3` is a string, `no` is False, `1:30` is 90, and the last of two equal keys wins silently.
"""

import math
import re
from typing import Any, NoReturn

import yaml

from compress.errors import RecipeError

MAX_DEPTH = 32  # a recipe needs 6; each level costs the parser a few Python frames
# Longer numbers stay text, which the schema refuses: they would become infinity, or exceed the digits that int() takes.
PLAIN_VALUES = (
    ("tag:yaml.org,2002:bool", r"true|false", "tf"),
    ("tag:yaml.org,2002:null", r"null|~|", ["n", "~", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]{0,17})", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]{1,40}|[0-9]{1,40}(?:\.[0-9]{0,40})?)(?:[eE][-+]?[0-9]{1,2})?",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads PLAIN_VALUES and text, and refuses anchors, tags, deep nesting and repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (typeshed's declaration)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node; refuse anchors, aliases, tags and depth."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            _refuse("anchors and aliases (& and *) are not supported; repeat the value", event.start_mark)
        if getattr(event, "tag", None) is not None:
            _refuse(f"the tag {event.tag} is not supported; write the plain value", event.start_mark)
        if self.depth == MAX_DEPTH:
            _refuse(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping whose keys are text and occur once."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                _refuse("a key must be text", key.start_mark)
            if key.value in lines:
                _refuse(f"{key.value} is given twice, first in line {lines[key.value]}; keep one", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes text which either YAML 1.1 or this module's loader would read as something else."""

    def ignore_aliases(self, _: Any) -> bool:
        """Repeat equal values instead of writing aliases."""
        return True


for _tag, _pattern, _first in PLAIN_VALUES:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def load(text: str) -> Any:
    """Return the YAML document as dicts, lists, str, int, float, bool and None; an empty one is None.

    Raises RecipeError with line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_sentence(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"line {line}: the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        ) from error


def dump(value: Any) -> str:
    """Return YAML that `load` reads back to an equal value, in the order given; a text takes one line, however long."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _refuse(problem: str, mark: yaml.Mark) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _sentence(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    if "'\\t'" in problem:
        problem = "a tab cannot indent; use spaces"
    elif "mapping values are not allowed" in problem:
        problem = "a colon is not allowed here: check the indentation, and quote text that contains ': '"
    elif "but found another document" in problem:
        problem = "a second document starts; a recipe is a single one"
    elif error.context:
        problem = f"{problem} {error.context}"
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
