"""What training validates on is what the bundle's preprocess.json says: against a resize and crop written out here."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batched import eval_batches
from photographs import SETTINGS, augmentation
from PIL import Image

from compress.data import dataset as dataset_module
from compress.data.labelled import open_dataset
from compress.data.settings import DataSettings
from export.images.preprocess import Preprocess
from export.images.read import find_examples


def weights(before: int, after: int) -> np.ndarray:
    """Return the matrix (after, before) of a triangle filter that is as wide as a shrunk pixel."""
    scale = before / after
    middle = (np.arange(after)[:, None] + 0.5) * scale - 0.5
    found = np.maximum(0, 1 - abs(np.arange(before) - middle) / max(scale, 1))
    return np.asarray(found / found.sum(axis=1, keepdims=True))


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    across = np.einsum("hwc,xw->hxc", pixels.astype(float), weights(pixels.shape[1], width))
    return np.asarray(np.einsum("hxc,yh->yxc", across, weights(pixels.shape[0], height)))


def expected(pixels: np.ndarray, size: tuple[int, int], cover: tuple[int, int]) -> np.ndarray:
    """Return the centre of the image that covers `cover`, in levels."""
    height, width = pixels.shape[:2]
    if cover[0] / height >= cover[1] / width:
        found = resized(pixels, cover[0], int(cover[0] * width / height + 1e-9))
    else:
        found = resized(pixels, int(cover[1] * height / width + 1e-9), cover[1])
    top, left = (found.shape[0] - size[0]) // 2, (found.shape[1] - size[1]) // 2
    return found[top : top + size[0], left : left + size[1]]


SIZES = [(41, 41), (37, 61), (61, 37), (16, 16), (20, 19), (9, 13), (120, 33), (17, 128)]


def write(root: Path, dtype: Any, channels: int) -> Iterator[np.ndarray]:
    """Write validation images and yield them, in the order of their names."""
    for part in ("train", "val"):
        for number, (height, width) in enumerate(SIZES):
            random = np.random.default_rng((number, part == "val"))
            pixels = random.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)
            file = root / part / "ab"[number // 4] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file)
            if part == "val":
                yield pixels


@pytest.mark.parametrize("memory", [10**9, 0])
@pytest.mark.parametrize(("size", "resize"), [((16, 16), 1.0), ((16, 16), 1.15), ((15, 28), 1.1), ((31, 17), 1.0)])
@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 3), (np.uint8, 1), (np.uint16, 1), (np.uint8, 4)])
def test_validation_sees_the_resized_centre(
    tmp_path: Path, dtype: Any, channels: int, size: tuple[int, int], resize: float, memory: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dataset_module, "MEMORY_BYTES", memory)
    originals = list(write(tmp_path / "data", dtype, channels))
    given = SETTINGS | {"image_size": size, "resize": resize, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    settings = DataSettings("imagefolder", tmp_path / "data", **given, memory=tmp_path)
    data = open_dataset(settings, augmentation())
    (batch,) = eval_batches(data.val, data.preprocess, batch_size=9)
    largest = np.iinfo(dtype).max
    seen = batch.images.numpy().transpose(0, 2, 3, 1) * largest
    by_hand = np.stack([expected(one, size, settings.resize_to) for one in originals])
    assert abs(seen - by_hand).max() < 1.01  # levels: Pillow rounds after each direction
    ((deployed, _),) = find_examples(tmp_path / "data", data.preprocess, data.classes).batches(batch_size=9)
    assert abs(deployed - batch.images.numpy()).max() < 1e-6


@pytest.mark.parametrize("size", [(16, 16), (15, 28)])
def test_a_detector_sees_the_stretched_image(size: tuple[int, int]) -> None:
    preprocess = replace(Preprocess(size, size, (0.0,) * 3, (1.0,) * 3), stretch=True)
    for number, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found = preprocess.pixels(Image.fromarray(pixels)).astype(float)
        assert abs(found - resized(pixels, *size)).max() < 1.01
