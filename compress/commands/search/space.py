"""What a search is: its YAML file, and the axes along which its trials differ."""

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
    """All numbers between two; whole ones where both are whole."""

    low: int | float
    """The smallest."""
    high: int | float
    """The largest."""
    log: bool = False
    """Draw evenly over orders of magnitude."""
    step: Annotated[int | float, Field(gt=0)] | None = None
    """Only `low`, `low + step` and so on; a grid needs it."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"high: must be > low ({self.low:g}), got {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log: needs low > 0 and no step, got low {self.low:g}")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return all(isinstance(end, int) for end in (self.low, self.high, self.step or 1))


Values = Annotated[
    Annotated[Range, Tag("object")] | Annotated[tuple[Any, ...], Tag("array")],
    Discriminator(lambda given: "object" if isinstance(given, dict | Range) else "array"),
]


class Budget(Section):
    """When a search ends: at the first of these, or when a grid is done."""

    trials: PositiveInt | None = None
    """Number of trials, those of all workers together."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Hours after which a command starts no further trial."""
    patience: PositiveInt | None = None
    """Trials in a row without gain in hypervolume."""


class Search(Section):
    """What is tried, what is measured, and when it ends."""

    name: Name
    """The folder of the search, made as a run's name is."""
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Recipe files, relative to the search's own folder; several are one more axis."""
    set: tuple[str, ...] = ()
    """Changes of every trial, as --set takes them."""
    space: dict[str, Values] = Field(default={})
    """Paths of the recipe, each with a list of values or a range (`low`, `high`, `log`, `step`)."""
    variants: dict[VariantName, tuple[str, ...]] = Field(default={})
    """One more axis whose choices change several fields: a name for each, and changes as --set takes them."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    """Every trial runs once with each, on the same split and under the first one's teacher; the mean counts."""
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("score", "latency")
    """What is sought, of the measures below; two or more give a front."""
    constraints: tuple[str, ...] = ()
    """Limits such as `latency < 5`; a trial outside of them is on no front."""
    sampler: Literal["tpe", "nsga2", "grid"] = "tpe"
    """Who chooses the next trial: Optuna's TPE or NSGA-II, or the grid, which tries every combination."""
    seed: NonNegativeInt = 0
    """Drives the sampler."""
    budget: Budget = Budget()
    """When it ends; only a grid ends by itself."""
    mode: Literal["full", "no_training"] = "full"
    """`no_training` runs every trial without its training stages first, and then whole those that are on that front."""
    judge_by: Literal["tuning", "validation"] = "tuning"
    """The images that score: `tuning` holds them out of the training images, so that validation can judge the chosen student; `validation` is for tables that nothing is chosen from."""

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
    """One thing in which trials differ: choices by label, each with the changes it means, or a range of one path."""

    name: str
    choices: Mapping[str, tuple[str, ...]]
    span: Range | None = None

    def values(self) -> list[str | float]:
        """Return every choice, or what a range's step gives; its two ends where it has none."""
        if self.span is None:
            return list(self.choices)
        if self.span.step is None:
            return [self.span.low, self.span.high]
        steps = int((self.span.high - self.span.low) / self.span.step + 1e-9)
        return [self.rounded(self.span.low + index * self.span.step) for index in range(steps + 1)]

    def rounded(self, value: float) -> float:
        """Return a drawn number as it is tried: whole, or with four digits."""
        assert self.span is not None
        return round(value) if self.span.is_whole else float(f"{value:.4g}")

    def changes(self, value: str | float) -> tuple[str, ...]:
        """Return what a choice or number means for the recipe."""
        return self.choices[str(value)] if self.span is None else (f"{self.name}={value}",)


def axes(search: Search) -> list[Axis]:
    """Return the axes of a search: its recipes and variants where there are several, then its space."""
    found = [Axis("recipe", {Path(name).stem: () for name in search.recipes})] if len(search.recipes) > 1 else []
    found += [Axis("variant", search.variants)] if search.variants else []
    for path, values in search.space.items():
        if isinstance(values, Range):
            found.append(Axis(path, {}, values))
        else:
            found.append(Axis(path, {_label(value): (f"{path}={json.dumps(value)}",) for value in values}))
    return found


def grid(search: Search) -> list[Point]:
    """Return every combination, the last axis changing fastest."""
    own = axes(search)
    return [
        dict(zip((axis.name for axis in own), values, strict=True))
        for values in itertools.product(*(axis.values() for axis in own))
    ]


def probes(search: Search) -> Iterator[tuple[str, list[Point]]]:
    """Yield for each axis points that differ in it alone, every choice or both ends, to be tried as recipes."""
    own = axes(search)
    first: dict[str, str | float] = {axis.name: axis.values()[0] for axis in own}
    for axis in own:
        yield axis.name, [{**first, axis.name: value} for value in axis.values()]


def read_search(path: Path) -> Search:
    """Read a search's YAML.

    Raises CompressError with what is wrong.
    """
    try:
        return Search.model_validate(strict_yaml.load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CompressError(f"{path}: cannot be read ({error.strerror}); give a search's .yaml") from error
    except RecipeError as error:
        raise CompressError(f"{path}: {error}") from error
    except ValidationError as error:
        raise CompressError("\n".join(f"{path}: {line}" for line in explain(error, Search))) from error


def _label(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")
