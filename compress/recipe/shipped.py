"""The recipes that come with this package, in its source tree or installed beside it."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from compress.errors import RecipeError
from compress.recipe.explain import unknown

PLACES = (Path(__file__).parents[2] / "recipes", Path(sys.prefix) / "share" / "prune-distill-quantize" / "recipes")


def listing() -> Iterator[str]:
    """Yield each recipe's name and purpose, the first sentence of its header comment."""
    found = _files()
    width = max(len(name) for name in found)
    for name, path in found.items():
        header = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        yield f"{name:{width}}  {header.partition('. ')[0].partition(': ')[0].rstrip('.')}"


def copy(name: str, to: Path | None) -> Path:
    """Copy a recipe and return the new path; raise RecipeError for an unknown name or an existing file."""
    found = _files()
    if name not in found:
        raise RecipeError(f"{name}: no such recipe; {unknown(name, list(found))}")
    to = to or Path(f"{found[name].stem}.yaml")
    if to.exists():
        raise RecipeError(f"{to}: exists already: give another file with -o, or remove it")
    to.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(found[name], to))


def _files() -> dict[str, Path]:
    """Return the recipes by their paths without suffix, in order."""
    root = next((place for place in PLACES if place.is_dir()), None)
    if root is None:
        raise RecipeError(f"recipes: found neither in {PLACES[0]} nor in {PLACES[1]}: reinstall the package")
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.yaml"))]
    return {str(path.with_suffix("")): root / path for path in paths if path.parts[0] not in ("search", "studies")}
