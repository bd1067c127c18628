"""The rows of docs/design.md: a module imports from its own row or a lower one."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = (
    ("compress.errors", "export"),
    ("compress.artifact", "compress.data", "compress.logs", "compress.ranks"),
    ("compress.pruning", "compress.quant", "compress.recipe"),
    ("compress.models",),
    ("compress.distillation", "compress.run", "compress.tasks", "compress.training"),
    ("compress.calibration", "compress.rehearsal", "compress.scoring"),
    ("compress.stages",),
    ("compress.pipeline", "compress.report"),
    ("compress.api", "compress.cli", "compress.commands"),
)
LONGEST = 400  # lines of a file
# These take plain arguments, never a recipe's section.
ALGORITHMS = ("compress.data", "compress.models", "compress.pruning", "compress.quant", "compress.tasks")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for folder in ("compress", "export") for path in sorted((ROOT / folder).rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Yield what a module imports anywhere in it, also inside functions; of `from package import name` the full path."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def is_within(module: str, *parents: str) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def row(module: str) -> int:
    (found,) = (index for index, parents in enumerate(ROWS) if is_within(module, *parents))
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "compress"])
def test_module_imports_from_its_own_row_or_lower(module: str) -> None:
    higher = [name for name in imports(module) if name in MODULES and name != "compress" and row(name) > row(module)]
    assert higher == []


@pytest.mark.parametrize("module", [name for name in MODULES if is_within(name, "export")])
def test_export_stands_alone(module: str) -> None:
    forbidden = ["compress"] if module == "export.onnx_file.to_onnx" else ["compress", "torch", "torchvision", "timm"]
    assert [name for name in imports(module) if is_within(name, *forbidden)] == []


@pytest.mark.parametrize(
    "module", [name for name in MODULES if is_within(name, "compress.stages") and name != "compress.stages"]
)
def test_stages_never_import_each_other(module: str) -> None:
    assert [name for name in imports(module) if is_within(name, "compress.stages")] == []


@pytest.mark.parametrize("module", [name for name in MODULES if is_within(name, "compress.report.judge")])
def test_what_judges_never_imports_what_draws(module: str) -> None:
    assert [name for name in imports(module) if is_within(name, "compress.report.page")] == []


@pytest.mark.parametrize("module", [name for name in MODULES if is_within(name, *ALGORITHMS)])
def test_algorithms_know_nothing_of_recipes(module: str) -> None:
    assert [name for name in imports(module) if is_within(name, "compress.recipe")] == []


def rooms() -> dict[str, set[str]]:
    """Return every folder and module directly below the two packages, each with those that it imports."""

    def room_of(module: str) -> str:
        return ".".join(module.split(".")[:2])

    found: dict[str, set[str]] = {room_of(module): set() for module in MODULES if "." in module}
    for module in filter(lambda name: "." in name, MODULES):
        found[room_of(module)] |= {room_of(name) for name in imports(module)} & found.keys() - {room_of(module)}
    return found


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert [(name, length) for name, length in lengths.items() if length > LONGEST] == []


def test_no_room_imports_in_a_circle() -> None:
    left = rooms()
    while free := [room for room, reads in left.items() if not reads & left.keys()]:
        left = {room: reads for room, reads in left.items() if room not in free}
    assert left == {}
