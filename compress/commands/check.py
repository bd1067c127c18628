"""Check a recipe without torch: the networks that it names, and the files that must exist."""

import ast
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from compress.data.teachers import foreign
from compress.errors import ModelError
from compress.models.digest import (
    check_library,
    class_names,
    existing_file,
    files_of,
    is_named,
    local_modules,
)
from compress.models.known import LACKS, OWN, check_listed, libraries, suggestion
from compress.recipe.schema import Recipe
from compress.recipe.stages import StudentStage
from export.errors import UserError
from export.images.folders import check_folder


def mistakes(recipe: Recipe) -> list[str]:
    """Return a line, with its place in the recipe, for each mistake that the schema cannot find."""
    checks: dict[str, Callable[[], object]] = {}
    if recipe.data.dataset == "imagefolder" and recipe.data.path is not None:
        checks["data.path"] = partial(check_folder, Path(recipe.data.path))
    if recipe.data.unlabelled is not None:
        checks["data.unlabelled"] = partial(check_folder, Path(recipe.data.unlabelled))
    named = {f"teacher.{index}.classes": one.classes for index, one in enumerate(recipe.teacher)}
    for place, file in ({"data.classes": recipe.data.classes} | named).items():
        if file is not None:
            checks[place] = partial(class_names, Path(file))
    for place, arch, weights in _networks(recipe):
        checks[f"{place}.arch"] = partial(check_network, arch)
        if weights is not None:
            checks[f"{place}.weights"] = partial(check_weights, arch, weights)
    return [f"{place}: {error}" for place, check in checks.items() if (error := _refusal(check))]


def checked() -> str:
    """Return a line on what was checked, and what only a run checks."""
    listed = [name if library.version == OWN else f"{name} {library.version}" for name, library in libraries().items()]
    return (
        f"checked: keys and values, the order of stages, targets, names of networks ({', '.join(listed)}), files; "
        "a run also checks layer names and the networks themselves before it trains"
    )


def check_network(arch: str) -> None:
    """Raise ModelError if a library does not have the network, or a file cannot define it; runs no code of the file."""
    source, _, name = arch.rpartition(":")
    if foreign(arch) is not None:
        files_of(arch)
        return
    if source in LACKS:
        check_listed(arch)
        return
    file = existing_file(source, "the model's file")
    local_modules(file)  # refuses a file that is not Python
    names = set(_names(file))
    if name not in names and "*" not in names:
        raise ModelError(f"{arch}: {file} defines no {name}; {suggestion(name, names)}")


def check_weights(arch: str, weights: str) -> None:
    """Raise ModelError if named weights are of another library than the network, or a weights file does not exist."""
    if is_named(weights):
        check_library(arch, weights)
    else:
        existing_file(weights, "the weights file")


def _refusal(check: Callable[[], object]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None


def _networks(recipe: Recipe) -> Iterator[tuple[str, str, str | None]]:
    """Yield the place, the architecture and the weights of every network in a recipe."""
    if recipe.model is not None:
        yield "model", recipe.model.arch, recipe.model.weights
    for index, teacher in enumerate(recipe.teacher):
        yield f"teacher.{index}", teacher.network, teacher.weights
    for name, chain in recipe.chains().items():
        for index, section in enumerate(chain.stages):
            if isinstance(section, StudentStage):
                yield recipe.place(name, index), section.arch, section.weights


def _names(file: Path) -> Iterator[str]:
    """Yield every name that a Python file defines or imports; `*` for a star import."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
