"""Letterboxes, kernels and orders of colours, against OpenCV (where it is installed), arithmetic by hand and planted pixels."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from export.images.preprocess import Kernel, Letterbox, Look, Preprocess, sampled

PLAIN = Preprocess((40, 64), (40, 64), (0.0,) * 3, (1.0,) * 3)
SIZES = [(30, 90), (90, 30), (40, 64), (37, 53), (7, 5), (200, 333)]


def photograph(size: tuple[int, int]) -> np.ndarray:
    """Return smooth colours with noise."""
    rng = np.random.default_rng(sum(size))
    waves = np.add.outer(np.sin(np.arange(size[0]) / 7), np.cos(np.arange(size[1]) / 5))[..., None] * [40, 30, 20]
    return (128 + waves + rng.normal(0, 20, (*size, 3))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("style", ["centre", "corner"])
def test_a_letterbox_is_opencvs_within_a_level(style: Literal["centre", "corner"], size: tuple[int, int]) -> None:
    """The two functions by which YOLO and YOLOX are trained, as their papers' repositories describe them."""
    cv2 = pytest.importorskip("cv2")
    pixels, (rows, columns) = photograph(size), PLAIN.image_size
    ratio = min(rows / size[0], columns / size[1])
    fit = round if style == "centre" else int
    height, width = (fit(side * ratio) for side in size)
    top = left = 0
    if style == "centre":
        top, left = round((rows - height) / 2 - 0.1), round((columns - width) / 2 - 0.1)
    expected = np.full((rows, columns, 3), 114, np.uint8)
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    expected[top : top + height, left : left + width] = resized
    found = replace(PLAIN, look=Look(style, antialias=False)).pixels(Image.fromarray(pixels))
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_the_bicubic_kernel_is_opencvs_within_a_level(size: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = photograph(size)
    expected = cv2.resize(pixels, (64, 40), interpolation=cv2.INTER_CUBIC)
    assert np.abs(sampled(pixels, (40, 64), "bicubic").astype(int) - expected).max() <= 1


def test_bilinear_values_by_hand() -> None:
    """Four pixels in a row become two and eight; each output is at (i + 1/2) * scale - 1/2."""
    row = np.array([[0, 100, 200, 40]], np.uint8)[..., None]
    assert sampled(row, (1, 2), "bilinear").ravel().tolist() == [50, 120]
    assert sampled(row, (1, 8), "bilinear").ravel().tolist() == [0, 25, 75, 125, 175, 160, 80, 40]
    assert sampled(row, (1, 4), "bicubic").ravel().tolist() == [0, 100, 200, 40]


@pytest.mark.parametrize(
    ("kernel", "antialias", "pillow"), [("bilinear", True, Image.Resampling.BILINEAR), ("bicubic", True, Image.Resampling.BICUBIC)]
)  # fmt: skip
def test_an_antialiased_kernel_is_pillows(kernel: Kernel, antialias: bool, pillow: Image.Resampling) -> None:
    given = Image.fromarray(photograph((90, 120)))
    found = replace(PLAIN, stretch=True, look=Look(interpolation=kernel, antialias=antialias)).pixels(given)
    assert np.array_equal(found, np.asarray(given.resize((64, 40), pillow)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("letterbox", ["centre", "corner"])
def test_boxes_lie_on_their_objects_in_the_letterbox_and_return(letterbox: Letterbox, size: tuple[int, int]) -> None:
    """A white rectangle's edges in the input are where its box says, within the pixel that resizing blurs."""
    height, width = size
    box = np.array([0.2, 0.4, 0.8, 0.8])
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = (int(one) for one in np.rint(box * [width, height, width, height]))
    pixels[top:bottom, left:right] = 255
    preprocess = replace(PLAIN, look=Look(letterbox, pad_value=0, antialias=False))
    exact = np.array([left / width, top / height, right / width, bottom / height])
    seen = preprocess.boxes(exact, size)
    rows, columns = np.nonzero(preprocess.pixels(Image.fromarray(pixels))[..., 0] > 127)
    edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(seen * [64, 40, 64, 40] - edges).max() <= 1
    assert np.allclose(preprocess.boxes(seen, size, back=True), exact)


def test_pixels_in_other_orders_and_ranges() -> None:
    """A red image for a network of BGR from 0 to 255, as YOLOX's."""
    given = replace(PLAIN, std=(1 / 255,) * 3, look=Look(bgr=True))
    red = np.zeros((1, 40, 64, 3), np.uint8)
    red[..., 0] = 200
    assert np.allclose(given.normalize(red)[0, :, 0, 0], [0, 0, 200])
    assert given.to_json()["color"] == "BGR"


def test_a_masks_letterbox_is_ignored() -> None:
    found = replace(PLAIN, look=Look("centre")).mask(Image.fromarray(np.ones((40, 32), np.uint8)))
    assert (found[:, 16:48] == 1).all()
    assert (found[:, :16] == 255).all()
    assert (found[:, 48:] == 255).all()
