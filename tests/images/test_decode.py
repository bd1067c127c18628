from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from export.images.decode import BrokenImage, read_image

ORIENTATION = 0x0112


def shades() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 16), dtype=np.uint8)


@pytest.mark.parametrize("factor", [256, 257])  # both ways in which programs make 16 bits of 8
def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(tmp_path: Path, factor: int) -> None:
    Image.fromarray(shades().astype(np.uint16) * factor).save(tmp_path / "deep.png")
    read = read_image(tmp_path / "deep.png", upright=True)
    np.testing.assert_array_equal(np.asarray(read), np.repeat(shades()[..., None], 3, axis=2))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_orientation_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = tmp_path / f"photo.{suffix}"
    Image.fromarray(shades()).convert("RGB").save(file, exif=exif)
    stored = Image.open(file)
    expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_image(file, upright=True)), expected)
    np.testing.assert_array_equal(np.asarray(read_image(file, upright=False)), np.asarray(stored.convert("RGB")))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\x01", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x"]
)
def test_damaged_metadata_leave_a_photograph_as_it_is_stored(tmp_path: Path, exif: bytes) -> None:
    Image.fromarray(shades()).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg", upright=True).size == (16, 24)


@pytest.mark.parametrize("suffix", ["gif", "tiff", "ppm"])
def test_other_formats_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(shades()).save(tmp_path / f"image.{suffix}")
    with pytest.raises(BrokenImage, match="not a JPEG, PNG, WEBP or BMP image"):
        read_image(tmp_path / f"image.{suffix}", upright=True)
