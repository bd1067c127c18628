"""Annotations of images with an EXIF orientation."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from export.images.decode import ORIENTATION, BrokenImage, turned
from export.images.orientation import Header, read_header, turn_of, turned_corners

WIDTH, HEIGHT = 7, 4


def photo(path: Path, orientation: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.new("RGB", size).save(path, exif=exif)
    return path


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels by Pillow's own reading of a file with this orientation."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(stream, "PNG", exif=exif)
    with Image.open(stream) as image:
        return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_the_pixels_that_they_enclose(orientation: int) -> None:
    random = np.random.default_rng(orientation)
    for _ in range(20):
        left, right = sorted(random.choice(WIDTH + 1, 2, replace=False))
        top, bottom = sorted(random.choice(HEIGHT + 1, 2, replace=False))
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[top:bottom, left:right] = 1
        after = upright(pixels, orientation)
        rows, columns = np.nonzero(after)
        height, width = after.shape
        expected = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
        box = np.array([[left / WIDTH, top / HEIGHT, right / WIDTH, bottom / HEIGHT]])
        np.testing.assert_allclose(turned_corners(box, orientation), [expected], atol=1e-12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_turn_as_pillow_turns_the_image(orientation: int) -> None:
    mask = np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    np.testing.assert_array_equal(turned(Image.fromarray(mask), orientation), upright(mask, orientation))


def test_no_boxes_turn_into_no_boxes() -> None:
    assert turned_corners(np.empty((0, 4)), 6).shape == (0, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_header_says_size_and_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    found = read_header(photo(tmp_path / f"a.{suffix}", orientation))
    assert found == Header((WIDTH, HEIGHT), orientation)
    assert found.upright == ((HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT))


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


@pytest.mark.parametrize("is_behind", [False, True])
@pytest.mark.parametrize("kind", ["eXIf", "raw profile", "XMP", "nothing"])
def test_a_png_is_decoded_only_to_look_for_its_orientation(
    kind: str, is_behind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks are written here by hand, before the pixels or behind them."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = {
        "eXIf": chunk(b"eXIf", exif.tobytes()[6:]),
        "raw profile": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n8\n" + exif.tobytes().hex().encode()),
        "XMP": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<a tiff:Orientation="6"/>'),
        "nothing": chunk(b"tIME", bytes(7)),
    }[kind]
    stream = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(stream, "PNG")
    place = stream.getvalue().index(b"IEND" if is_behind else b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(stream.getvalue()[:place] + content + stream.getvalue()[place:])
    if kind == "nothing" or not is_behind:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("the pixels were decoded"))
    assert read_header(tmp_path / "a.png") == Header((WIDTH, HEIGHT), 1 if kind == "nothing" else 6)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_stated_size_decides_what_an_annotation_was_made_on(orientation: int) -> None:
    image = Header((WIDTH, HEIGHT), orientation)
    assert turn_of(image, (WIDTH, HEIGHT)) == orientation
    assert turn_of(image, (HEIGHT, WIDTH)) == 1
    with pytest.raises(BrokenImage, match=r"is for 9 x 9 pixels, the image has 7 x 4 as stored and 4 x 7 upright"):
        turn_of(image, (9, 9))


@pytest.mark.parametrize(
    ("size", "orientation"), [((WIDTH, HEIGHT), 2), ((WIDTH, HEIGHT), 3), ((WIDTH, HEIGHT), 4), ((5, 5), 6)]
)
def test_what_one_size_cannot_decide_is_refused_with_its_repair(size: tuple[int, int], orientation: int) -> None:
    with pytest.raises(BrokenImage, match=rf"has EXIF orientation {orientation} and .*mogrify -auto-orient"):
        turn_of(Header(size, orientation), size)


def test_without_orientation_there_is_nothing_to_decide() -> None:
    assert turn_of(Header((5, 5), 1), (5, 5)) == 1
    with pytest.raises(BrokenImage, match=r"is for 4 x 7 pixels, the image has 7 x 4: export it again"):
        turn_of(Header((WIDTH, HEIGHT), 1), (HEIGHT, WIDTH))
