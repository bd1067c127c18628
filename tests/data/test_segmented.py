"""Images with masks: found, read, seen under one view, refused in a sentence."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batched import eval_batches, train_batches
from photographs import SETTINGS, augmentation, write_photo
from PIL import Image
from torchvision.datasets import voc

from compress.data import dataset as dataset_module
from compress.data.batches import Batch
from compress.data.dataset import Dataset
from compress.data.segmented import open_masks, write_masks
from compress.data.settings import DataSettings
from compress.data.views import Boxes, cut_each, cut_nearest
from export.errors import DataError
from export.images.masks import list_masks, mask_examples
from export.images.preprocess import IGNORED

CLASSES = ("ground", "cat", "dog")


def write_pairs(root: Path, *, train: int = 6, val: int = 3, width: int = 24, height: int = 20) -> Path:
    """Write photographs whose masks follow their brightness, so that a mask can be told from its image."""
    for first, part, count in ((0, "train", train), (train, "val", val)):
        for index in range(count):
            file = root / "images" / part / f"{index}.png"
            photo = write_photo(file, width=width, height=height, seed=first + index)
            write_mask(root, part, index, mask_of(np.asarray(Image.open(photo))))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def write_mask(root: Path, part: str, index: int, mask: np.ndarray) -> None:
    write_mask_at(root / "masks" / part / f"{index}.png", mask)


def write_mask_at(file: Path, mask: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if mask.ndim == 2:
        image.putpalette(list(range(256)) * 3)
    image.save(file)


def halves(*values: int) -> np.ndarray:
    """Return a mask of 24 x 20 pixels with a stripe for each value."""
    return np.array(values, np.uint8)[np.arange(24) * len(values) // 24][None].repeat(20, axis=0)


def mask_of(pixels: np.ndarray) -> np.ndarray:
    brightness: np.ndarray = pixels[..., :3].astype(float).mean(-1)
    return (brightness > 100).astype(np.uint8) + (brightness > 150).astype(np.uint8)


def opened(root: Path | None, *, name: str = "imagefolder", crop: Any = "none", **changes: Any) -> Dataset:
    memory = (root or Path()) / ".memory"
    flip = changes.pop("flip", False)
    settings = SETTINGS | {"task": "segmentation", "mean": (0.0,) * 3, "std": (1.0,) * 3, "memory": memory} | changes
    return open_masks(DataSettings(name, root, **settings), augmentation(crop=crop, flip=flip))


def batch_of(data: Dataset, *, epoch: int = 0, **changes: Any) -> Batch:
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "workers": 0}
    return next(train_batches(data, augmentation=augmentation(**changes), epoch=epoch, view=epoch, **options))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("crop", ["none", "pad", "random_resized"])
def test_a_mask_is_seen_as_its_image_is(
    root: Path, crop: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(dataset_module, "MEMORY_BYTES", 0)
    data = opened(root, crop=crop, flip=True)
    images, masks = batch_of(data, crop=crop, flip=True, min_area=0.5)[:2]
    pixels = (images * 255).round().numpy().transpose(0, 2, 3, 1)
    inside = masks.numpy() != IGNORED
    assert masks.shape == (4, 16, 16)
    assert ((pixels.sum(-1) > 0) == inside).mean() > 0.99  # what is beyond the image is black, and not judged
    assert (mask_of(pixels) == masks.numpy())[inside].mean() > 0.85  # but for what resizing mixes


def test_the_same_views_come_from_memory_and_from_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for memory in (10**9, 0):
        monkeypatch.setattr(dataset_module, "MEMORY_BYTES", memory)
        seen.append(batch_of(opened(root, crop="random_resized"), crop="random_resized").targets)
    assert torch.equal(seen[0], seen[1])


def test_the_cut_of_a_mask_is_that_of_its_image() -> None:
    random = np.random.default_rng(0)
    values = torch.from_numpy(random.integers(0, 2, (6, 20, 30)).astype(np.uint8)).repeat_interleave(1, 0)
    coarse = values[:, ::5, ::5].repeat_interleave(5, 1).repeat_interleave(5, 2)
    boxes = Boxes(
        torch.tensor([0, 3, -2, 0, 5, 1]), torch.tensor([0, 4, 1, -3, 0, 2]), torch.tensor([20, 12, 15, 20, 15, 18]),
        torch.tensor([30, 20, 25, 30, 30, 20]), torch.tensor([False, True, False, True, False, True]),
    )  # fmt: skip
    masks = cut_nearest(coarse, boxes, (40, 40))
    images = cut_each((coarse * 255)[:, None].expand(-1, 3, -1, -1).contiguous(), boxes, (40, 40))[:, 0]
    sure = ((images < 20) | (images > 235)) & (masks != IGNORED)
    assert sure.float().mean() > 0.6
    assert torch.equal((images > 127)[sure], (masks == 1)[sure])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("crop", ["none", "pad", "random_resized"])
def test_masks_follow_their_images_into_a_size_that_is_no_square(
    root: Path, crop: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(dataset_module, "MEMORY_BYTES", 0)
    data = opened(root, crop=crop, image_size=(12, 18))
    images, masks = batch_of(data, crop=crop, min_area=0.5)[:2]
    pixels = (images * 255).round().numpy().transpose(0, 2, 3, 1)
    inside = masks.numpy() != IGNORED
    assert (pixels.shape, masks.shape) == ((4, 12, 18, 3), (4, 12, 18))
    assert ((pixels.sum(-1) > 0) == inside).mean() > 0.99
    assert (mask_of(pixels) == masks.numpy())[inside].mean() > 0.85


def test_validation_masks_are_what_the_files_hold(root: Path) -> None:
    data = opened(root, image_size=(20, 20))
    (batch,) = eval_batches(data.val, data.preprocess, batch_size=9)
    stored = [np.asarray(Image.open(root / f"masks/val/{index}.png"))[:, 2:22] for index in range(3)]
    assert np.array_equal(batch.targets.numpy(), np.stack(stored))


def test_without_a_validation_split_images_are_held_out_by_seed(tmp_path: Path) -> None:
    root = write_pairs(tmp_path, train=8, val=0)
    data = opened(root, val_fraction=0.25)
    assert (len(data.train), len(data.val)) == (6, 2)
    assert len(opened(root, val_fraction=0.25, limit_per_class=4).train) == 4


def test_a_tuning_split_comes_out_of_the_training_images(root: Path) -> None:
    data = opened(root, tuning=True, val_fraction=0.5)
    assert (len(data.train), len(data.val)) == (3, 3)
    assert all("/train/" in data.held_out.name(index) for index in range(3))


def test_the_written_validation_images_are_read_back_with_their_masks(root: Path, tmp_path: Path) -> None:
    data = opened(root)
    assert write_masks(data, tmp_path / "out") == 3
    found = mask_examples(tmp_path / "out", data.preprocess, CLASSES)
    (batch,) = eval_batches(data.val, data.preprocess, batch_size=9)
    assert np.array_equal(found.truths, batch.targets.numpy())
    assert found.digests() == data.validation_digests()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros((9, 24), np.uint8), "its mask has 24 x 9 pixels, the image 24 x 20"),
        (np.full((20, 24), 7, np.uint8), r"has the class 7, but there are 3 \(0 to 2\).*data.ignore_index: 7"),
        (np.zeros((20, 24, 3), np.uint8), "its mask is RGB: it must have one class index per pixel"),
        (None, "1 of 2 images have no mask of the same name in masks/: images/train/0.png"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named_in_one_sentence(
    tmp_path: Path, mask: np.ndarray | None, said: str
) -> None:
    write_pairs(tmp_path, train=2)
    (tmp_path / "masks/train/0.png").unlink()
    if mask is not None:
        write_mask(tmp_path, "train", 0, mask)
    with pytest.raises(DataError, match=said):
        opened(tmp_path)


def test_an_index_that_the_recipe_names_is_not_judged(tmp_path: Path) -> None:
    write_pairs(tmp_path, train=2)
    write_mask(tmp_path, "train", 0, np.full((20, 24), 7, np.uint8))
    data = opened(tmp_path, ignore_index=7)
    assert (data.train.placed.still(torch.tensor([0])) == IGNORED).all()  # type: ignore[union-attr]


def test_a_broken_mask_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    write_pairs(tmp_path, train=3)
    (tmp_path / "masks/train/1.png").write_bytes(b"no image")
    assert len(opened(tmp_path, skip_broken=True).train) == 2


def test_other_layouts_and_changes_that_masks_would_not_share_are_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="has no masks/: put images into images/train/"):
        list_masks(tmp_path)
    with pytest.raises(DataError, match=r"digits: has no masks; use scenes, .*voc, oxford_pets"):
        opened(None, name="digits", memory=tmp_path)
    settings = SETTINGS | {"task": "segmentation", "memory": tmp_path}
    with pytest.raises(DataError, match=r"data\.augment\.mixup: changes images but not their masks"):
        open_masks(DataSettings("scenes", None, **settings), replace(augmentation(), mixup=0.2))
    with pytest.raises(DataError, match="its 3 classes are not the 2 of the bundle"):
        mask_examples(root, opened(root).preprocess, ("a", "b"))


def write_voc(root: Path) -> Path:
    """Write two training and one validation image in Pascal VOC's layout, of classes 0 and 15."""
    for part, names in (("train", ("2007_1", "2007_2")), ("val", ("2008_1",))):
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            write_photo(root / "JPEGImages" / f"{name}.jpg", width=24, height=20)
            file = root / "SegmentationClass" / f"{name}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(halves(0, 15)).save(file)
    return root


def test_pascal_vocs_layout_is_read_as_it_is_unpacked(tmp_path: Path) -> None:
    write_voc(tmp_path)
    write_photo(tmp_path / "JPEGImages" / "unlisted.jpg", width=24, height=20)
    data = opened(tmp_path)
    assert (len(data.train), len(data.val), len(data.classes)) == (2, 1, 21)
    assert data.classes[15] == "person"
    assert set(data.val.placed.still(torch.tensor([0])).unique().tolist()) == {0, 15}  # type: ignore[union-attr]
    (tmp_path / "SegmentationClass" / "2007_2.png").unlink()
    with pytest.raises(DataError, match=r"train\.txt: names 1 files that do not exist: SegmentationClass/2007_2\.png"):
        list_masks(tmp_path)


def test_pascal_voc_2007_trains_on_trainval_and_validates_on_test(tmp_path: Path) -> None:
    lists = write_voc(tmp_path) / "ImageSets" / "Segmentation"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").rename(lists / "test.txt")
    data = opened(tmp_path)
    assert (len(data.train), len(data.val)) == (2, 1)
    said = "has no lists of train and val: trainval is used for training, test for validation"
    assert data.notes[0] == f"{tmp_path}: {said}"
    assert mask_examples(tmp_path, data.preprocess, data.classes).notes == data.notes[:1]


def test_pascal_voc_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_voc(tmp_path / "unpacked" / "VOCdevkit" / "VOC2012")
    archive = Path(shutil.make_archive(str(tmp_path / "voc"), "tar", tmp_path / "unpacked"))
    found = {"url": archive.as_uri(), "filename": "voc.tar", "md5": hashlib.md5(archive.read_bytes()).hexdigest()}
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", lambda _, file: shutil.copy(archive, file))
    monkeypatch.setitem(voc.DATASET_YEAR_DICT, "2012", voc.DATASET_YEAR_DICT["2012"] | found)
    data = opened(tmp_path / "here", name="voc")
    assert (len(data.train), len(data.val), data.classes[15]) == (2, 1, "person")
    archive.unlink()
    (tmp_path / "here" / "voc.tar").unlink()
    assert opened(tmp_path / "here", name="voc").digest == data.digest
    with pytest.raises(DataError, match=r"voc: could not be downloaded to .*DATA=/path/to/it"):
        opened(tmp_path / "elsewhere", name="voc")


def test_oxfords_pets_are_read_as_they_are_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "oxford-iiit-pet"
    for part, name in (("trainval", "Bombay_1"), ("test", "pug_1")):
        write_photo(root / "images" / f"{name}.jpg", width=24, height=20)
        write_mask_at(root / "annotations" / "trimaps" / f"{name}.png", halves(1, 2, 3))
        (root / "annotations" / f"{part}.txt").write_text(f"{name} 1 1 1\n")
    data = opened(tmp_path, name="oxford_pets")
    assert (len(data.train), len(data.val), data.classes[1:]) == (1, 1, ("pet", "background", "border"))
    for ignore, seen in ((None, {1, 2, 3}), (3, {1, 2, IGNORED})):
        data = opened(tmp_path, name="oxford_pets", ignore_index=ignore)
        assert set(data.val.placed.still(torch.tensor([0])).unique().tolist()) == seen  # type: ignore[union-attr]


def test_cityscapes_layout_is_read_by_its_training_indices(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_photo(tmp_path / "leftImg8bit" / part / "bern" / "bern_0_leftImg8bit.png", width=24, height=20)
        file = tmp_path / "gtFine" / part / "bern" / "bern_0_gtFine_labelTrainIds.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(halves(0, 13)).save(file)
    data = opened(tmp_path)
    assert (len(data.train), len(data.val), data.classes[13]) == (1, 1, "car")
    file.unlink()
    with pytest.raises(DataError, match=r"1 masks do not exist: gtFine/val/bern.*csCreateTrainIdLabelImgs"):
        list_masks(tmp_path)
