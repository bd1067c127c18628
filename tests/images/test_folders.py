"""One rule for training and for export: the same odd folder gives both the same images under the same labels."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from photographs import opened, write_classes, write_imagenet_layout, write_photo
from PIL import Image

from compress.data.images import MemoryImages
from export.errors import DataError
from export.images.folders import list_folder
from export.images.read import find_examples

CLASSES = ("cat", "dog", "owl")


def litter(root: Path) -> None:
    """Leave what archives, cameras and file managers leave."""
    for folder in (root / "train" / "cat", root / "val" / "dog", root):
        (folder / ".thumbnails").mkdir()
        write_photo(folder / ".thumbnails" / "0.png")
        write_photo(folder / "__MACOSX" / "0.png")
        write_photo(folder / "@eaDir" / "0.png")
        write_photo(folder / "x.png").rename(folder / "._x.png")
        for name in ("Thumbs.db", ".DS_Store", "notes.txt", "desktop.ini"):
            (folder / name).write_bytes(b"?")


def link(root: Path) -> None:
    """Put a class, and a part of another, elsewhere; and lead a link back up."""
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("train/cat", "val/owl"):
        (root / name).rename(elsewhere / name.replace("/", "-"))
        (root / name).symlink_to(elsewhere / name.replace("/", "-"))
    write_photo(elsewhere / "more" / "9.png", seed=9)
    (root / "val" / "dog" / "more").symlink_to(elsewhere / "more")
    (root / "val" / "dog" / "round").symlink_to(root / "val")
    (elsewhere / "more" / "round").symlink_to(elsewhere / "more")


def deepen(root: Path) -> None:
    """Store photographs with 16 bits, turned on their side, in a palette, and with an upper-case suffix."""
    deep = np.random.default_rng(0).integers(0, 2**16, (20, 24), dtype=np.uint16)
    Image.fromarray(deep).save(root / "val" / "cat" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(write_photo(root / "val" / "cat" / "a.png", seed=1)).save(root / "val" / "cat" / "turned.JPG", exif=exif)
    palette = Image.open(write_photo(root / "val" / "cat" / "b.png", seed=2)).quantize(16)
    palette.save(root / "val" / "cat" / "palette.png", transparency=bytes(range(16)))


@pytest.mark.parametrize(("odd", "n"), [(litter, 6), (link, 7), (deepen, 11)])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Test"])
def test_training_and_export_see_the_same(tmp_path: Path, val: str, odd: Callable[[Path], None], n: int) -> None:
    root = write_imagenet_layout(tmp_path / "set")
    odd(root)
    (root / "val").rename(root / "renamed")
    (root / "renamed").rename(root / val)
    data = opened("imagefolder", root)
    (images, labels), *more = find_examples(root, data.preprocess, data.classes).batches()
    assert (more, data.classes) == ([], CLASSES)
    assert isinstance(data.val, MemoryImages)
    assert labels.tolist() == data.val.labels.tolist()
    pixels = data.val.still.pixels.unflatten(2, (16, 16)).permute(0, 2, 3, 1)
    trained = data.preprocess.normalize(pixels.numpy())
    np.testing.assert_array_equal(images, trained)
    assert len(labels) == n


def test_two_classes_beside_a_split_are_not_taken_for_it(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", classes=("cat", "dog"))
    write_classes(tmp_path / "valid", classes=("cat", "dog"), per_class=1)
    data = opened("imagefolder", tmp_path)
    assert find_examples(tmp_path, data.preprocess, data.classes).truths.tolist() == data.val.labels.tolist() == [0, 1]


def test_classes_may_be_called_like_a_split(tmp_path: Path) -> None:
    write_classes(tmp_path, classes=("bus", "test", "train"))
    listing = list_folder(tmp_path)
    assert (listing.classes, listing.val) == (("bus", "test", "train"), None)


@pytest.mark.parametrize("names", [("training", "testing"), ("seg_train", "seg_test", "seg_pred")])
def test_a_split_under_other_names_is_not_taken_for_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_classes(tmp_path / name, per_class=1)
    with pytest.raises(DataError, match="look like a split, not like classes; name them train and val"):
        list_folder(tmp_path)


def test_a_validation_split_alone_can_be_scored_but_not_trained_on(tmp_path: Path) -> None:
    write_classes(tmp_path / "test", per_class=1)
    assert len(list_folder(tmp_path).val or ()) == 3
    with pytest.raises(DataError, match="has a validation split but no train/"):
        opened("imagefolder", tmp_path)


@pytest.mark.parametrize("suffix", ["gif", "tiff"])
def test_an_image_of_a_format_that_is_not_read_is_refused_on_both_sides(tmp_path: Path, suffix: str) -> None:
    root = write_imagenet_layout(tmp_path)
    write_photo(root / "val" / "cat" / f"x.{suffix}")
    with pytest.raises(DataError, match=rf"val/cat/x\.{suffix} \(not a JPEG, PNG, WEBP or BMP image\)"):
        opened("imagefolder", root)
    data = opened("imagefolder", root, skip_broken=True)
    with pytest.raises(DataError, match=rf"val/cat/x\.{suffix}: .*not a JPEG, PNG, WEBP or BMP image"):
        list(find_examples(tmp_path, data.preprocess, data.classes).batches())


def test_a_class_that_no_label_can_name_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, classes=("cat", "dog\n"))
    with pytest.raises(DataError, match=r"class folder 'dog\\n': must be one printable line; rename it"):
        list_folder(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path)
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(DataError, match=r"dog: cannot be listed: Permission denied; check its permissions"):
        list_folder(tmp_path)


def grouped(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        write_photo(root / path / f"{number}.png", seed=number)
    return root


@pytest.mark.parametrize("inside", ["", "train/"])
def test_class_folders_that_may_only_group_are_refused(tmp_path: Path, inside: str) -> None:
    root = grouped(tmp_path, *(f"{inside}{year}/{kind}" for year in (2021, 2022) for kind in ("cat", "dog")))
    said = (
        rf"{inside.strip('/')}: 2021, 2022 have no images of their own but the same subfolders \(cat, dog\), so either may be "
        r"the classes: if cat is one, gather its images in one folder cat; if 2021 is, move its images up into .*2021"
    )
    with pytest.raises(DataError, match=said):
        list_folder(root)


@pytest.mark.parametrize(
    "paths",
    [
        ("cat", "cat/left", "cat/right", "dog/left", "dog/right"),  # a class with images of its own
        ("cat/images", "dog/images"),  # Tiny-ImageNet's
        ("cat/tabby", "cat/siamese", "dog/poodle", "dog/terrier"),  # subclasses
    ],
)
def test_nested_class_folders_are_classes(tmp_path: Path, paths: tuple[str, ...]) -> None:
    found = list_folder(grouped(tmp_path, *paths))
    assert (found.classes, len(found.train)) == (("cat", "dog"), len(paths))
