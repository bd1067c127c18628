"""What the tests share."""

import gc
import os
import random
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # read when torch is imported; two workers with all threads each are slower


def pytest_collection_finish() -> None:
    """Spare the collector what the imports made: it is called before every measured block of times."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before any fixture of a test, so that what one draws does not depend on the tests before it."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
