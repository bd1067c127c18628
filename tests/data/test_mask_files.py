"""Mask files as they come: stored or upright, of 0 and 255, without one of the classes; the same on every path."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batched import eval_batches
from PIL import Image, ImageOps
from test_segmented import halves, mask_of, opened, write_mask, write_pairs

from compress.data import dataset as dataset_module
from compress.data import segmented as segmented_module
from compress.data.dataset import Dataset
from compress.data.segmented import write_masks
from export.bundle.read import preprocess_of
from export.errors import BundleError, DataError
from export.images import masks as masks_module
from export.images.decode import ORIENTATION
from export.images.masks import list_masks, mask_examples
from export.images.preprocess import Preprocess

SQUARE = (20, 20)


def turn(root: Path, orientation: int, *, upright_masks: bool, width: int = 24) -> Path:
    """Write pairs whose images have an orientation, and masks for their stored or their upright pixels."""
    write_pairs(root, width=width)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for file in sorted((root / "images").rglob("*.png")):
        stored = Image.open(file).copy()
        stored.save(file, exif=exif)
        mask = root / "masks" / file.relative_to(root / "images")
        drawn_on = ImageOps.exif_transpose(Image.open(file)) if upright_masks else stored
        Image.fromarray(mask_of(np.asarray(drawn_on))).save(mask)
    return root


def expected(root: Path, preprocess: Preprocess) -> np.ndarray:
    """Return the validation masks, made from the upright images."""
    photos = [ImageOps.exif_transpose(Image.open(file)) for file in sorted((root / "images/val").iterdir())]
    return np.stack([preprocess.mask(Image.fromarray(mask_of(np.asarray(photo)))) for photo in photos])


def validation(data: Dataset) -> np.ndarray:
    (batch,) = eval_batches(data.val, data.preprocess, batch_size=9)
    found: np.ndarray = batch.targets.numpy()
    return found


@pytest.mark.parametrize("upright_masks", [False, True])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_turned_photograph_has_the_same_mask_on_every_path(
    tmp_path: Path, orientation: int, upright_masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = turn(tmp_path / "data", orientation, upright_masks=upright_masks)
    found = {}
    for path, memory in (("memory", 10**9), ("files", 0)):
        monkeypatch.setattr(dataset_module, "MEMORY_BYTES", memory)
        data = opened(root, image_size=(20, 16), memory=tmp_path / ".memory")
        found[path] = validation(data)
        note = "9 of 9 masks were turned upright with their images, whose stored pixels they fit"
        assert data.notes == (() if upright_masks else (note,))
    write_masks(data, tmp_path / "written")
    for path in ("data", "written"):
        examples = mask_examples(tmp_path / path, data.preprocess, data.classes)
        found[path] = examples.truths
        assert any("3 of 3 masks were turned" in note for note in examples.notes) == (not upright_masks)
    whole = expected(root, data.preprocess)
    assert len(np.unique(whole)) == 3
    for path, truths in found.items():
        assert np.array_equal(truths, whole), path


@pytest.mark.parametrize("orientation", [2, 6])
@pytest.mark.parametrize("memory", [10**9, 0])
def test_a_mask_that_fits_both_ways_is_refused_with_its_repair(
    tmp_path: Path, memory: int, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = turn(tmp_path, orientation, upright_masks=True, width=24 if orientation == 2 else 20)
    said = rf"has EXIF orientation {orientation} and the same size stored and upright.*mogrify -auto-orient"
    monkeypatch.setattr(dataset_module, "MEMORY_BYTES", memory)
    with pytest.raises(DataError, match=said):
        validation(opened(root))
    with pytest.raises(DataError, match=said):
        mask_examples(root, Preprocess(SQUARE, SQUARE, (0.0,) * 3, (1.0,) * 3), list_masks(root).classes)


def test_a_network_that_saw_images_as_stored_is_scored_on_stored_masks(tmp_path: Path) -> None:
    root = turn(tmp_path, 6, upright_masks=False)
    preprocess = Preprocess(SQUARE, SQUARE, (0.0,) * 3, (1.0,) * 3, upright=False)
    stored = [Image.open(root / f"masks/val/{index}.png") for index in range(3)]
    found = mask_examples(root, preprocess, list_masks(root).classes)
    assert np.array_equal(found.truths, np.stack([preprocess.mask(one) for one in stored]))
    assert found.notes == ()


def two(root: Path, foreground: int) -> Path:
    """Write pairs of two classes, of which the second is `foreground` in the masks."""
    write_pairs(root)
    for part, number in (("train", 6), ("val", 3)):
        for index in range(number):
            write_mask(root, part, index, halves(0, foreground))
    (root / "classes.txt").write_text("ground\ncat\n")
    return root


@pytest.mark.parametrize("memory", [10**9, 0])
def test_masks_of_0_and_255_have_two_classes_in_training_and_scoring(
    tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "MEMORY_BYTES", memory)
    plain, data = (opened(two(tmp_path / str(one), one)) for one in (1, 255))
    assert set(np.unique(validation(plain))) == {0, 1}
    assert np.array_equal(validation(data), validation(plain))
    assert plain.notes == ()
    assert data.notes == (
        "the masks have only 0 and 255, read as ground and cat; set data.ignore_index: 255 if 255 is to be ignored",
    )
    bundled = preprocess_of(json.loads(json.dumps(data.preprocess.to_json())))
    assert bundled == data.preprocess
    found = mask_examples(tmp_path / "255", bundled, data.classes)
    assert np.array_equal(found.truths, validation(plain))
    with pytest.raises(DataError, match=r"its mask has 1, but 0 and 255 are read as the two classes"):
        mask_examples(tmp_path / "1", bundled, data.classes)
    with pytest.raises(DataError, match=r"only 0 and 255, .*bundle ignores 255.* would be ground: write 1 in place of"):
        mask_examples(tmp_path / "255", plain.preprocess, data.classes)


def test_a_1_among_masks_of_0_and_255_makes_255_ignored(tmp_path: Path) -> None:
    two(tmp_path, 255)
    write_mask(tmp_path, "train", 4, halves(0, 1, 255))
    data = opened(tmp_path)
    assert not data.preprocess.binary_masks
    assert set(data.train.placed.still(torch.tensor([4])).unique().tolist()) == {0, 1, 255}  # type: ignore[union-attr]


def test_a_1_beyond_the_masks_that_decided_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "SAMPLE", 1)
    two(tmp_path, 255)
    write_mask(tmp_path, "train", 4, halves(0, 1, 255))
    with pytest.raises(DataError, match=r"train/4\.png \(its mask has 1, but 0 and 255 are read as the two classes"):
        opened(tmp_path)


@pytest.mark.parametrize("memory", [10**9, 0])
def test_training_masks_of_a_single_class_stop_the_run(
    tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "MEMORY_BYTES", memory)
    two(tmp_path, 255)
    with pytest.raises(DataError, match="the 6 training masks that count are of 'ground' alone, so there is nothing"):
        opened(tmp_path, ignore_index=255)


@pytest.mark.parametrize("memory", [10**9, 0])
def test_a_class_without_a_training_pixel_is_named(
    tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "MEMORY_BYTES", memory)
    two(tmp_path, 1)
    (tmp_path / "classes.txt").write_text("ground\ncat\ndog\nowl\n")
    assert opened(tmp_path).notes == ("no training pixel is of 2 classes: dog, owl",)


def test_of_masks_in_files_a_sample_is_read_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "MEMORY_BYTES", 0)
    monkeypatch.setattr(segmented_module, "SAMPLE", 2)
    two(tmp_path, 1)
    (tmp_path / "classes.txt").write_text("ground\ncat\ndog\n")
    assert opened(tmp_path).notes == ("no training pixel is of 1 class in 2 of the 6 training masks: dog",)


def test_other_mask_values_in_a_bundle_are_refused() -> None:
    document = replace(Preprocess(SQUARE, SQUARE, (0.0,), (1.0,)), binary_masks=True).to_json()
    with pytest.raises(BundleError, match=r"mask_values: must be \[0, 255\] or missing, got list of 2"):
        preprocess_of(document | {"mean": [0.0], "std": [1.0], "mask_values": [0, 7]})
