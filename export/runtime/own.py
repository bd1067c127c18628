"""Code of a person's own, from a file that the person names and trusts: never from a bundle."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from export.errors import UserError
from export.tasks.task import Array


def import_file(file: Path) -> ModuleType:
    """Run a file as a module with a unique name, with its folder on sys.path meanwhile; UserError where that fails."""
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a .py file has a spec"
    assert spec.loader is not None, "and a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.fx look up their module there
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{file}: cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


@dataclass(frozen=True)
class OwnMetric:
    """A function from one image's outputs and its path to a number, numbers by name, or a 1-D array of them; more is better."""

    name: str
    function: Callable[[Any, Path], object]

    def row(self, outputs: Array | Mapping[str, Array], path: Path) -> dict[str, float]:
        """Return an image's numbers by name; UserError where the function fails or returns anything else."""
        try:
            found = self.function(outputs, path)
        except Exception as error:  # the person's code: whatever it raises is for its author
            raise UserError(f"score: {self.name} fails on {path}: {type(error).__name__}: {error}") from error
        if isinstance(found, np.ndarray) and found.ndim == 1:
            found = {f"{self.name} {index}": value for index, value in enumerate(found.tolist())}
        named = found if isinstance(found, Mapping) else {self.name: found}
        numbers = {str(name): _number(value) for name, value in named.items()}
        if not numbers or None in numbers.values():
            raise UserError(
                f"score: {self.name} must return a number, numbers by name or a 1-D array, got {found!r:.100}"
            )
        return {name: value for name, value in numbers.items() if value is not None}

    def table(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Array]:
        """Return the images' numbers (n,) by name; UserError unless every image has the same names."""
        names = list(rows[0])
        if odd := next((row for row in rows if list(row) != names), None):
            raise UserError(
                f"score: {self.name} must return the same names for every image, got {names} and {list(odd)}"
            )
        return {name: np.array([row[name] for row in rows]) for name in names}


def _number(value: object) -> float | None:
    """Return a number, also one in an array or tensor without axes; None for anything else."""
    if isinstance(value, Real) or (hasattr(value, "item") and not getattr(value, "shape", True)):
        return float(value)  # type: ignore[arg-type]
    return None


def open_metric(text: str) -> OwnMetric:
    """Return the metric `FILE.py:function`; UserError if there is none."""
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"score: must be FILE.py:function, and the file must exist, got {text!r}")
    function = getattr(import_file(Path(path)), name, None)
    if not callable(function):
        raise UserError(f"score: {path} defines no function {name!r}: name one of its functions")
    return OwnMetric(name, function)


def means(numbers: Mapping[str, Array]) -> dict[str, float | None]:
    """Return each number's mean over images; None where it is not finite."""
    found = {name: float(np.mean(values)) for name, values in numbers.items()}
    return {name: value if np.isfinite(value) else None for name, value in found.items()}
