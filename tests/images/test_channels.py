"""Images of one and four channels, of 16 bits, and of sizes that are no squares: read, resized, cropped, normalized."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.bundle.read import preprocess_of
from export.errors import DataError
from export.images.decode import Pixel, read_pixels_of
from export.images.preprocess import Look, Preprocess
from export.images.read import archive_examples, read_pixels

GREY16 = Preprocess((4, 6), (4, 6), (0.5,), (0.25,), bits=16)
FOUR = Preprocess((4, 6), (4, 6), (0.0,) * 4, (1.0,) * 4)


def write_png(file: Path, values: np.ndarray, *, colour_type: int) -> Path:
    """Write 16 bits a channel, big-endian, which Pillow cannot for colours; values (height, width, channels)."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return file


def test_all_sixteen_bits_reach_the_network(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (4, 6, 1), dtype=np.uint16)
    file = write_png(tmp_path / "depth.png", values, colour_type=0)
    assert read_pixels_of(file)[1] == Pixel(1, 16)
    pixels = read_pixels(file, GREY16)
    assert np.array_equal(pixels, values)
    np.testing.assert_allclose(GREY16.normalize(pixels[None])[0, 0], (values[..., 0] / 65535 - 0.5) / 0.25, atol=1e-6)


def test_a_fourth_channel_is_data_and_no_opacity(tmp_path: Path) -> None:
    """Pillow's own resize would weigh colours by the fourth channel, and lose them where it is 0."""
    values = np.random.default_rng(1).integers(0, 256, (8, 12, 4), dtype=np.uint8)
    values[..., 3] = 0
    Image.fromarray(values).save(tmp_path / "near_infrared.png")
    pixels = read_pixels(tmp_path / "near_infrared.png", FOUR)
    bands = [
        np.asarray(Image.fromarray(values[..., index]).resize((6, 4), Image.Resampling.BILINEAR)) for index in range(4)
    ]
    assert np.array_equal(pixels, np.stack(bands, axis=2))
    assert pixels[..., :3].min() > 0


@pytest.mark.parametrize(("height", "width"), [(96, 320), (320, 96), (50, 50), (96, 400), (200, 330), (31, 97)])
def test_a_size_that_is_no_square_is_covered_and_cropped(height: int, width: int) -> None:
    """The smallest image of its own proportions that covers `resize_to`, found by trying; the centre of it."""
    given = Image.fromarray(np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8))
    preprocess = Preprocess((30, 90), (32, 96), (0.0,) * 3, (1.0,) * 3)
    candidates = [(32, 32 * width // height), (96 * height // width, 96)]
    rows, columns = next(size for size in candidates if size[0] >= 32 and size[1] >= 96)
    whole = np.asarray(given.resize((columns, rows), Image.Resampling.BILINEAR))
    top, left = (rows - 30) // 2, (columns - 90) // 2
    assert np.array_equal(preprocess.pixels(given), whole[top : top + 30, left : left + 90])


@pytest.mark.parametrize(
    "preprocess",
    [
        GREY16,
        FOUR,
        Preprocess((8, 8), (9, 9), (0.5,), (0.2,)),
        Preprocess((4, 6), (5, 7), (0.1,) * 3, (0.2,) * 3),
        Preprocess((4, 6), (4, 6), (0.0,) * 3, (1 / 255,) * 3, look=Look("corner", 0, "bicubic", False, True)),
        Preprocess((4, 6), (4, 6), (0.1,) * 3, (0.2,) * 3, stretch=True, look=Look(antialias=False)),
    ],
)
def test_what_a_bundle_says_is_read_back(preprocess: Preprocess) -> None:
    assert preprocess_of(json.loads(json.dumps(preprocess.to_json()))) == preprocess


@pytest.mark.parametrize(
    ("colour_type", "channels", "preprocess", "sentence"),
    [
        (2, 3, GREY16, r"has 3 channels of 16 bits, not 1 channel of 16 bits"),
        (
            6,
            4,
            FOUR,
            r"has 4 channels of 16 bits, not 4 channels of 8 bits; Pillow reads 8 bits of 16-bit colours: save it with 8",
        ),
        (0, 1, FOUR, r"has 1 channel of 16 bits, not 4 channels of 8 bits"),
    ],
)
def test_other_channels_and_bits_are_refused(
    tmp_path: Path, colour_type: int, channels: int, preprocess: Preprocess, sentence: str
) -> None:
    file = write_png(tmp_path / "a.png", np.zeros((4, 6, channels), np.uint16), colour_type=colour_type)
    with pytest.raises(DataError, match=sentence):
        read_pixels(file, preprocess)


def test_an_archive_holds_the_networks_own_kind(tmp_path: Path) -> None:
    images = np.random.default_rng(3).integers(0, 2**16, (2, 4, 6, 1), dtype=np.uint16)
    np.savez(tmp_path / "depths.npz", images=images, labels=np.array([0, 1]))
    found = archive_examples(tmp_path / "depths.npz", GREY16, ["a", "b"])
    assert np.array_equal(np.stack([found.pixels(index) for index in range(2)]), images)
    with pytest.raises(DataError, match=r"must be uint8 \(n, height, width, 4\) and labels \(n,\), got uint16"):
        archive_examples(tmp_path / "depths.npz", FOUR, ["a", "b"])
