"""A search's YAML file, and the axes of its space."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, ValidationError, model_validator

from compress.commands.search.measures import MEASURES, limits
from compress.errors import CompressError, RecipeError
from compress.recipe import strict_yaml
from compress.recipe.explain import explain, unknown
from compress.recipe.section import Name, Section

VariantName = Annotated[str, Field(pattern=r"^[^/\x00-\x1f]{1,64}$")]
Point = Mapping[str, str | float]  # a trial's place: a choice's label or a number for each axis


class Range(Section):
    """Numbers from `low` to `high`, integers if both are; a grid needs a `step`, `log` draws on a logarithmic scale."""

    low: int | float
    high: int | float
    log: bool = False
    step: Annotated[int | float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"high: must be > low ({self.low:g}), got {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log: needs low > 0 and no step, got low {self.low:g}")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the range has only integers."""
        return all(isinstance(end, int) for end in (self.low, self.high, self.step or 1))

    def rounded(self, value: float) -> float:
        """Return a drawn number as an integer, or with four significant digits."""
        return round(value) if self.is_whole else min(max(float(f"{value:.4g}"), self.low), self.high)

    def values(self) -> list[float]:
        """Return all values of the step, or both ends without a step."""
        if self.step is None:
            return [self.low, self.high]
        steps = int((self.high - self.low) / self.step + 1e-9)
        return [self.rounded(self.low + index * self.step) for index in range(steps + 1)]


Values = Annotated[  # tagged with JSON's names of the two types, which `explain` leaves out of a path
    Annotated[Range, Tag("object")] | Annotated[tuple[Any, ...], Tag("array")],
    Discriminator(lambda given: "object" if isinstance(given, dict | Range) else "array"),
]


class Budget(Section):
    """Limits of a search; the first one reached ends it. `patience` counts trials in a row without gain in hypervolume."""

    trials: PositiveInt | None = None
    hours: Annotated[float, Field(gt=0)] | None = None
    patience: PositiveInt | None = None


class Search(Section):
    """What to try, what to measure, and when to end; docs/search.md explains each field."""

    name: Name
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    set: tuple[str, ...] = ()
    space: dict[str, Values] = Field(default={})
    variants: dict[VariantName, tuple[str, ...]] = Field(default={})
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("score", "latency")
    constraints: tuple[str, ...] = ()
    sampler: Literal["tpe", "nsga2", "grid"] = "tpe"
    seed: NonNegativeInt = 0
    budget: Budget = Budget()
    end_early: bool = True
    mode: Literal["full", "no_training"] = "full"
    judge_by: Literal["tuning", "validation"] = "tuning"

    @model_validator(mode="after")
    def _makes_sense(self) -> "Search":
        if not axes(self):
            raise ValueError("space: is empty: give a path of the recipe with values, or variants")
        for axis in axes(self):
            if axis.span is None and not axis.choices:
                raise ValueError(f"space.{axis.name}: is empty: give a list of values or a range")
            if self.sampler == "grid" and axis.span is not None and axis.span.step is None:
                raise ValueError(f"space.{axis.name}: a grid needs a list of values, or a range with a step")
        for name in self.objectives:
            if name not in MEASURES:
                raise ValueError(f"objectives: nothing measures {name}; {unknown(name, MEASURES)}")
        for text in self.constraints:
            limits(text)
        if self.sampler != "grid" and self.budget == Budget():
            raise ValueError("budget: give trials, hours or patience: this sampler never ends by itself")
        return self


@dataclass(frozen=True)
class Axis:
    """One axis of the space: choices by label, each with its changes to the recipe, or a range of one path."""

    name: str
    choices: Mapping[str, tuple[str, ...]]
    span: Range | None = None

    def values(self) -> list[str | float]:
        """Return every choice's label, or a range's steps or ends."""
        return [*self.choices] if self.span is None else [*self.span.values()]

    def changes(self, value: str | float) -> tuple[str, ...]:
        """Return the changes to the recipe for a choice or number, in the form of --set."""
        return self.choices[str(value)] if self.span is None else (f"{self.name}={value}",)


def axes(search: Search) -> list[Axis]:
    """Return the axes of a search: its recipes if there are several, its variants, its space."""
    found = [Axis("recipe", {Path(name).stem: () for name in search.recipes})] if len(search.recipes) > 1 else []
    found += [Axis("variant", search.variants)] if search.variants else []
    for path, values in search.space.items():
        if isinstance(values, Range):
            found.append(Axis(path, {}, values))
        else:
            found.append(Axis(path, {_label(value): (f"{path}={json.dumps(value)}",) for value in values}))
    return found


def _label(value: object) -> str:
    """Return a short label for a value; losses as `cross_entropy + kd {temperature: 2.0}`."""
    if isinstance(value, tuple | list) and value and all(isinstance(one, dict) and "name" in one for one in value):
        rests = [{name: more for name, more in one.items() if name != "name"} for one in value]
        parts = [f"{one['name']} {_label(rest) if rest else ''}" for one, rest in zip(value, rests, strict=True)]
        return " + ".join(part.strip() for part in parts)
    return json.dumps(value).replace('"', "")


def grid(search: Search) -> list[Point]:
    """Return every combination, the last axis changing fastest."""
    own = axes(search)
    return [
        dict(zip((axis.name for axis in own), values, strict=True))
        for values in itertools.product(*(axis.values() for axis in own))
    ]


def probes(search: Search) -> Iterator[tuple[str, list[Point]]]:
    """Yield for each axis the points that vary only it (every choice or both ends), to check them as recipes."""
    own = axes(search)
    first: dict[str, str | float] = {axis.name: axis.values()[0] for axis in own}
    for axis in own:
        yield axis.name, [{**first, axis.name: value} for value in axis.values()]


def read_search(path: Path) -> Search:
    """Read a search's YAML; raise CompressError if it is wrong."""
    try:
        raw = strict_yaml.load(path.read_text(encoding="utf-8"))
        # Strict validation accepts lists for tuples only from JSON.
        return Search.model_validate_json(json.dumps(raw), strict=True)
    except OSError as error:
        raise CompressError(f"{path}: cannot be read ({error.strerror}); give a search's .yaml") from error
    except RecipeError as error:
        raise CompressError(f"{path}: {error}") from error
    except ValidationError as error:
        raise CompressError("\n".join(f"{path}: {line}" for line in explain(error, Search))) from error
