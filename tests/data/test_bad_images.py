import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batched import eval_batches, train_batches
from photographs import augmentation, opened, write_classes, write_imagenet_layout, write_photo
from PIL import Image

from compress.data import dataset as dataset_module
from compress.data.dataset import Dataset
from compress.data.images import MemoryImages
from export.errors import DataError
from export.images.decode import BrokenImage, read_image

CPU = torch.device("cpu")
FORTY_THOUSAND = struct.pack(">II", 40_000, 40_000)


def png(header: bytes) -> bytes:
    """Return a PNG of the size that the header says, whose pixels are one row of zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = chunk(b"IDAT", zlib.compress(bytes(120_001)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header + bytes([8, 2, 0, 0, 0])) + pixels + chunk(b"IEND", b"")


def truncated(folder: Path) -> Path:
    file = write_photo(folder / "truncated.jpg", width=64, height=64)
    file.write_bytes(file.read_bytes()[:-200])
    return file


def text(folder: Path) -> Path:
    file = folder / "text.jpg"
    file.write_text("this is no photograph\n")
    return file


def empty(folder: Path) -> Path:
    file = folder / "empty.jpg"
    file.touch()
    return file


def huge(folder: Path) -> Path:
    file = folder / "huge.png"
    file.write_bytes(png(FORTY_THOUSAND))
    return file


def large(folder: Path) -> Path:
    file = folder / "large.png"
    file.write_bytes(png(struct.pack(">II", 10_000, 10_000)))
    return file


def tiff(folder: Path) -> Path:
    write_photo(folder / "photo.tiff").rename(folder / "tiff.jpg")
    return folder / "tiff.jpg"


def damaged(folder: Path) -> Path:
    file = write_photo(folder / "damaged.png", width=64, height=64)
    content = bytearray(file.read_bytes())
    content[60:200] = bytes(140)
    file.write_bytes(content)
    return file


def dangling(folder: Path) -> Path:
    file = folder / "dangling.jpg"
    file.symlink_to(folder / "nowhere.jpg")
    return file


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncated, "truncated"),
    "text": (text, "not a JPEG, PNG, WEBP or BMP image"),
    "empty": (empty, "not a JPEG"),
    "huge": (huge, "more than 89,478,485 pixels"),
    "large": (large, "more than 89,478,485 pixels"),
    "tiff": (tiff, "not a JPEG"),
    "damaged": (damaged, ""),
    "dangling": (dangling, "No such file"),
}
each_broken = pytest.mark.parametrize(("make", "reason"), BROKEN.values(), ids=BROKEN.keys())


@each_broken
def test_a_broken_image_is_named_with_its_reason(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    root = write_imagenet_layout(tmp_path)
    file = make(root / "train" / "dog")
    with pytest.raises(
        DataError, match=rf"1 of 13 images cannot be read: train/dog/{file.name} \(.*{reason}.*skip_broken"
    ):
        opened("imagefolder", root)


@each_broken
def test_a_broken_image_is_left_out_and_logged_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], reason: str
) -> None:
    root = write_imagenet_layout(tmp_path)
    file = make(root / "train" / "dog")
    data = opened("imagefolder", root, skip_broken=True)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert f"train/dog/{file.name}" in capsys.readouterr().err


def test_leaving_out_a_broken_image_keeps_pixels_and_labels_together(tmp_path: Path) -> None:
    root = write_imagenet_layout(tmp_path)
    whole = opened("imagefolder", root)
    text(root / "val" / "cat")
    skipped = opened("imagefolder", root, skip_broken=True)
    assert isinstance(whole.val, MemoryImages)
    assert isinstance(skipped.val, MemoryImages)
    assert torch.equal(whole.val.still.pixels, skipped.val.still.pixels)
    assert torch.equal(whole.val.labels, skipped.val.labels)


def test_many_broken_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    root = write_imagenet_layout(tmp_path)
    for index in range(5):
        (root / "train" / "owl" / f"broken{index}.jpg").touch()
    with pytest.raises(DataError, match=r"5 of 17 .*owl/broken0.jpg .*owl/broken2.jpg \([^)]*\) and 2 more; repair"):
        opened("imagefolder", root)


def test_a_class_that_broken_images_leave_empty_is_refused(tmp_path: Path) -> None:
    root = write_imagenet_layout(tmp_path)
    for file in (root / "train" / "owl").iterdir():
        file.write_text("")
    with pytest.raises(DataError, match="class 'owl': none of its training images can be read"):
        opened("imagefolder", root, skip_broken=True)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("make", [large, huge])
def test_a_huge_image_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    file = make(tmp_path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BrokenImage, match="more than"):
        read_image(file, upright=True)


def test_an_image_that_resizing_would_make_huge_is_refused(tmp_path: Path) -> None:
    root = write_imagenet_layout(tmp_path)
    Image.new("RGB", (1, 60_000)).save(root / "val" / "owl" / "thread.png")
    with pytest.raises(DataError, match=r"thread.png \(1 x 60,000 is too narrow"):
        opened("imagefolder", root, image_size=(64, 64))


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_every_eight_bit_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (20, 20)).save(tmp_path / f"image.{suffix}")
    assert read_image(tmp_path / f"image.{suffix}", upright=True).mode == "RGB"


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    Image.new("P", (20, 20)).save(tmp_path / "image.png", transparency=bytes(range(256)))
    assert read_image(tmp_path / "image.png", upright=True).mode == "RGB"


# Images that are not in memory


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one broken training and one broken validation image, too large for memory."""
    monkeypatch.setattr(dataset_module, "MEMORY_BYTES", 0)
    root = write_imagenet_layout(tmp_path)
    text(root / "train" / "cat")
    text(root / "val" / "cat")
    return root


def seen(data: Dataset, workers: int, *, batch_size: int = 4) -> list[int]:
    """Return the labels of an epoch and of validation."""
    train = train_batches(data, batch_size=batch_size, augmentation=augmentation(), workers=workers)
    val = eval_batches(data.val, data.preprocess, batch_size=batch_size, workers=workers)
    return [label for batches in (train, val) for batch in batches for label in batch.targets.tolist()]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_loader_with_one_sentence(on_disk: Path, workers: int) -> None:
    with pytest.raises(DataError, match=r"^\S+: 1 of 13 images cannot be read: train/cat/text.jpg \(.*\); repair"):
        seen(opened("imagefolder", on_disk), workers, batch_size=13)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_leaves_out_a_broken_image_where_that_is_asked_for(on_disk: Path, workers: int) -> None:
    labels = seen(opened("imagefolder", on_disk, skip_broken=True), workers, batch_size=13)
    assert sorted(labels) == [0] * 6 + [1] * 6 + [2] * 6


def test_the_loader_logs_a_broken_image_once(on_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = opened("imagefolder", on_disk, skip_broken=True)
    for _ in range(2):
        seen(data, 0)
    assert capsys.readouterr().err.count("train/cat/text.jpg") == 1


def test_a_training_batch_without_one_image_is_refused(on_disk: Path) -> None:
    with pytest.raises(DataError, match="no image of a batch can be read"):
        seen(opened("imagefolder", on_disk, skip_broken=True), 0, batch_size=1)


# Folders


def test_a_missing_folder_is_named_with_one_that_looks_like_it(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    with pytest.raises(DataError, match=r"photograhps: there is no such folder; did you mean \S+/photographs\?"):
        opened("imagefolder", tmp_path / "photograhps")


def test_a_folder_missing_higher_up_is_named_there(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    with pytest.raises(DataError, match=r"did you mean \S+/photographs\?"):
        opened("imagefolder", tmp_path / "photograph" / "imagenet" / "2012")


def test_an_archive_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "tin20.tar").touch()
    with pytest.raises(DataError, match=r"tin20\.tar: is a file, not a folder; unpack it"):
        opened("imagefolder", tmp_path / "tin20.tar")


def test_no_folder_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="needs a folder: give DATA="):
        opened("imagefolder")


def test_the_folder_above_the_data_set_is_refused_with_the_right_one(tmp_path: Path) -> None:
    write_imagenet_layout(tmp_path / "tin20")
    with pytest.raises(DataError, match=r"/tin20 has; give that folder"):
        opened("imagefolder", tmp_path)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    root = write_imagenet_layout(tmp_path)
    (root / "train" / "yak").mkdir()
    (root / "train" / "yak" / "notes.txt").touch()
    with pytest.raises(DataError, match="train: 1 class folder without an image: yak; add images or remove"):
        opened("imagefolder", root)


def test_classes_in_validation_that_training_lacks_are_named(tmp_path: Path) -> None:
    root = write_imagenet_layout(tmp_path)
    write_classes(root / "val", classes=("wolf", "yak"))
    with pytest.raises(DataError, match="val: 2 classes that training lacks: wolf, yak; add training images"):
        opened("imagefolder", root)


def test_validation_without_training_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "val")
    with pytest.raises(DataError, match="has a validation split but no train/"):
        opened("imagefolder", tmp_path)


def test_validation_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "train")
    write_photo(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(
        DataError, match="val: has 1 images and no class folder; put each class's images into a folder of its own"
    ):
        opened("imagefolder", tmp_path)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has one class folder \(cat\)"):
        opened("imagefolder", write_classes(tmp_path, classes=("cat",)))


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_classes(tmp_path)
    write_photo(tmp_path / "yak" / "only.png")
    with pytest.raises(DataError, match="class 'yak': has 1 image, and one must be held out"):
        opened("imagefolder", tmp_path)


@pytest.mark.parametrize("row", ["val_0.JPEG", "../../etc/passwd\tn01"])
def test_a_damaged_annotation_is_named(tmp_path: Path, row: str) -> None:
    write_classes(tmp_path / "train", classes=("n01", "n02"))
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "val_annotations.txt").write_text(row + "\n")
    with pytest.raises(DataError, match=r"val_annotations.txt: .* is not `file<TAB>class`"):
        opened("imagefolder", tmp_path)


def test_damaged_fashion_mnist_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        opened("fashion_mnist", tmp_path)


@pytest.mark.parametrize("channels", [1, 4])
def test_files_of_other_channels_than_the_recipes_stop_a_training_by_name(tmp_path: Path, channels: int) -> None:
    root = write_classes(tmp_path / "photos")
    sentence = (
        rf"9 of 9 images cannot be read: cat/0\.png \(has 3 channels of 8 bits, not {channels} channels? of 8 bits\)"
    )
    with pytest.raises(DataError, match=sentence):
        opened("imagefolder", root, mean=(0.5,) * channels, std=(0.25,) * channels)


def test_one_file_of_eight_bits_among_depths_is_left_out_or_stops_a_training(tmp_path: Path) -> None:
    for name in ("near", "far", "f"):
        (tmp_path / "depths" / name).mkdir(parents=True)
        for index in range(4):
            kind = np.uint8 if (name, index) == ("f", 3) else np.uint16
            Image.fromarray(np.full((9, 11), 40 + index, kind)).save(tmp_path / "depths" / name / f"{index}.png")
    settings: dict[str, Any] = {"mean": (0.5,), "std": (0.25,)}
    with pytest.raises(DataError, match=r"f/3\.png \(has 1 channel of 8 bits, not 1 channel of 16 bits\)"):
        opened("imagefolder", tmp_path / "depths", **settings)
    found = opened("imagefolder", tmp_path / "depths", skip_broken=True, **settings)
    assert found.preprocess.bits == 16
    assert len(found.train) + len(found.val) == 11
