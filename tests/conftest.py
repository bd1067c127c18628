"""What the tests share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # read when torch is imported; two workers with all threads each are slower

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
