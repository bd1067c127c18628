"""What the tests share."""

import functools
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from torch import Tensor

# Read when torch is imported; two workers with all threads each are slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the whole chains, which take minutes each: a worker that got one last would be waited for."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


def pytest_collection_finish() -> None:
    """Time candidates briefly, and spare the collector what the imports made.

    A bench measures the memory of its first file, in a process of half a second, and says the same of all; `test_bench.py` measures each.
    """
    if "compress.pipeline" in sys.modules:
        from compress import scoring

        scoring.LATENCY_SECONDS = 0.05
    if "export.runtime.measure" in sys.modules:
        from export.runtime import measure, memory

        measure.peak_memory_mb = functools.partial(_first, memory.peak_memory_mb, [])  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()


def _first(measure: Callable[..., float | None], found: list[float | None], *given: Any, **named: Any) -> float | None:
    """Return what the first call measured."""
    if not found:
        found.append(measure(*given, **named))
    return found[0]


@pytest.fixture(scope="module")
def unrehearsed() -> Iterator[None]:
    """For chains of a network whose stages other tests rehearse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.rehearsal.rehearse", lambda *_: None)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before any fixture of a test, so that what one draws does not depend on the tests before it."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


LEARNED = """
name: learned
data: {dataset: digits, image_size: 16}
model: {arch: "NETWORKS:small"}
stages: [{stage: source, fit: {epochs: 4, lr: 0.05}}]
""".replace("NETWORKS", str(Path(__file__).with_name("networks.py")))


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> "dict[str, Tensor]":
    """The weights of `networks.small` that learned the digits; of several workers the first trains it for all."""
    from safetensors.torch import load_file

    from compress.artifact import turn
    from compress.pipeline import run_recipe
    from compress.recipe.read import read_recipe

    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    folder.mkdir(exist_ok=True)
    (recipe := folder / f"{os.getpid()}.yaml").write_text(LEARNED)
    with turn(folder / "learned"):
        run_recipe(
            read_recipe(recipe, [f"out={folder}"]), trust_code=True, until=None, verbose=False, command="compress run"
        )
    return load_file(next(folder.glob("learned/00-source-*/weights.safetensors")))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command's `main` on words, in this process, and return its exit code."""

    def run(main: Callable[[], int], *words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        return main()

    return run


TINY_RECIPE = """\
name: tiny
model: {arch: "torchvision:resnet18"}
stages:
  - stage: source
    fit: {epochs: 1}
  - stage: prune
    keep_macs: 0.5
  - stage: ptq
  - stage: qat
    fit: {epochs: 1, lr: 1e-3}
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    """A small legal recipe in a file of its own."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files in folders of their classes."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("photos")
    found = load_digits()
    for index, (image, label) in enumerate(zip(found.images[:240], found.target, strict=False)):
        place = folder / str(label)
        place.mkdir(exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((20, 20)).convert("RGB").save(
            place / f"{index:03d}.png"
        )
    return folder
