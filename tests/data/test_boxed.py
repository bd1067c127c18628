"""Boxes move with the view of their image, come from scenes and folders, and are written as COCO's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batched import eval_batches, train_batches
from drawn import HEIGHT, WIDTH, bright, coco, voc, yolo
from photographs import SETTINGS
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from compress.data.augment import Augmentation
from compress.data.batches import Batch
from compress.data.boxed import PlacedBoxes, open_boxes, write_boxes
from compress.data.digest import Given, dataset_digest
from compress.data.settings import DataSettings
from compress.data.stored import Stored
from compress.data.views import Boxes
from export.errors import DataError
from export.images.annotations import box_examples, list_boxes
from export.images.decode import ORIENTATION
from export.images.preprocess import Look

STILL = Augmentation("none", 0.125, 0.5, False, 0, 0.0, 0.0)
CPU = torch.device("cpu")


def settings(folder: Path, *, name: str = "scenes", path: Path | None = None) -> DataSettings:
    own = {"image_size": (64, 64), "val_fraction": 0.2, "limit_per_class": 12, "task": "detection", "memory": folder}
    return DataSettings(name, path, **SETTINGS | own)


@pytest.mark.parametrize("size", [[32, 32], [24, 40]])
@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_move_as_torchvisions_do(mirrored: bool, size: list[int]) -> None:
    """A crop of a 40 x 50 image, resized and mirrored: by torchvision's transforms of its own boxes."""
    pixels = torch.tensor([[6.0, 8, 30, 24], [12, 4, 48, 38], [0, 0, 9, 7]])
    expected = BoundingBoxes(pixels, format=BoundingBoxFormat.XYXY, canvas_size=(40, 50))
    expected = F.resize(F.crop(expected, 4, 8, 30, 36), size)
    expected = F.horizontal_flip(expected) if mirrored else expected
    inside = v2.ClampBoundingBoxes()(expected) / torch.tensor(size[::-1] * 2)
    boxes = torch.cat([torch.arange(3.0)[:, None], pixels / torch.tensor([50, 40, 50, 40]), torch.zeros(3, 1)], dim=1)
    frame = Stored(torch.empty(1, 3, 2000), torch.tensor([[40, 50]]), torch.tensor([[40, 50]]))
    top, left, height, width = (torch.tensor([float(one)]) for one in (4, 8, 30, 36))
    view = Boxes(top, left, height, width, torch.tensor([mirrored]))
    found = PlacedBoxes(boxes[None], boxes[None], None, (None, frame)).seen(
        torch.tensor([0]), view, (size[0], size[1]), whole=True
    )[0]
    assert found[:, 0].tolist() == [0, 1, -1]  # the middle of the last one is not in the view
    assert torch.allclose(found[:2, 1:5], inside.as_subclass(torch.Tensor)[:2], atol=1e-6)


def test_a_view_shows_its_boxes(tmp_path: Path) -> None:
    """Mirrored or not, the pixels inside a box of a scene are those inside the box of its view."""
    flipped = replace(STILL, flip=True)
    data = open_boxes(settings(tmp_path), flipped)
    plain = next(eval_batches(data.train, data.preprocess, batch_size=12))
    shown = next(train_batches(data, batch_size=12, augmentation=flipped, seed=1))
    assert shown.views is not None
    turned = 0
    for place, index in enumerate(shown.views.indices.tolist()):
        image, boxes = plain.images[index], plain.targets[index]
        if not torch.equal(image, shown.images[place]):
            turned += 1
            image = image.flip(2)
            boxes = boxes.clone()
            real = boxes[:, 0] >= 0
            boxes[real, 1], boxes[real, 3] = 1 - plain.targets[index][real, 3], 1 - plain.targets[index][real, 1]
        assert torch.equal(image, shown.images[place])
        assert torch.allclose(boxes[boxes[:, 0] >= 0], shown.targets[place][shown.targets[place][:, 0] >= 0], atol=1e-6)
    assert 0 < turned < 12


def test_distorted_colours_leave_the_boxes_where_they_are(tmp_path: Path) -> None:
    changed = replace(STILL, distort=True)
    data = open_boxes(settings(tmp_path), changed)
    plain = next(eval_batches(data.train, data.preprocess, batch_size=12))
    shown = next(train_batches(data, batch_size=12, augmentation=changed, seed=1))
    assert shown.views is not None
    assert torch.equal(shown.targets, plain.targets[shown.views.indices])
    apart = (shown.images - plain.images[shown.views.indices]).abs().mean(dim=(1, 2, 3))
    assert (apart > 0.01).all()


def test_validation_images_are_written_and_read_again(tmp_path: Path) -> None:
    data = open_boxes(settings(tmp_path), STILL)
    folder = tmp_path / "val"
    assert write_boxes(data, folder) == len(data.val)
    again = box_examples(folder, data.preprocess, data.classes)
    batch = next(eval_batches(data.val, data.preprocess, batch_size=8))
    images, truths = next(again.batches(batch_size=8))
    assert np.allclose(images, batch.images.numpy(), atol=1e-5)
    for mine, its in zip(batch.targets.numpy(), truths, strict=True):
        assert np.allclose(mine[mine[:, 0] >= 0], its[its[:, 0] >= 0], atol=1e-6)
    assert sorted(again.digests()) == sorted(data.validation_digests())
    with pytest.raises(DataError, match="exists already"):
        write_boxes(data, folder)


def test_a_folder_is_opened_whole_and_stretched(tmp_path: Path) -> None:
    coco(tmp_path)
    for augmentation in (STILL, replace(STILL, crop="random_resized", flip=True)):
        data = open_boxes(settings(tmp_path / "memory", name="imagefolder", path=tmp_path), augmentation)
        assert data.classes == ("cat", "dog")
        batch = next(eval_batches(data.val, data.preprocess, batch_size=2))
        assert batch.images.shape == (2, 3, 64, 64)
        listing = list_boxes(tmp_path)
        assert np.allclose(batch.targets.numpy(), listing.truths(listing.val or ()))
        shown = next(train_batches(data, batch_size=2, augmentation=augmentation, workers=0))
        assert shown.targets.shape == (2, 2, 6)


@pytest.mark.parametrize("augmentation", [STILL, replace(STILL, crop="random_resized", min_area=0.9)])
@pytest.mark.parametrize("write", ["coco", "voc"])
def test_boxes_lie_on_their_objects_in_letterboxed_views(
    write: str, augmentation: Augmentation, tmp_path: Path
) -> None:
    """In training, whole or cropped, in validation and where the bundle scores."""
    bright(tmp_path / "data", orientation=6, stored=True, write=write)
    given = settings(tmp_path, name="imagefolder", path=tmp_path / "data")
    data = open_boxes(replace(given, look=Look("centre", pad_value=0)), augmentation)
    train = next(train_batches(data, batch_size=1, augmentation=augmentation, workers=0))
    ((images, truths),) = box_examples(tmp_path / "data", data.preprocess, data.classes).batches()
    judged = Batch(torch.from_numpy(images), torch.from_numpy(truths))
    for batch in (train, next(eval_batches(data.val, data.preprocess, batch_size=1)), judged):
        rows, columns = np.nonzero(batch.images[0, 0].numpy() > 0)
        edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        assert np.abs(batch.targets[0, 0, 1:5].numpy() - edges).max() < 2 / 64
    assert not np.allclose(data.train.placed.boxes, data.train.placed.framed)  # type: ignore[union-attr]


def test_a_class_without_a_training_box_is_named(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = [one for one in document["annotations"] if one["category_id"] == 90]

    coco(tmp_path, change=change)
    data = open_boxes(settings(tmp_path / "memory", name="imagefolder", path=tmp_path), STILL)
    assert data.notes[-1] == "no training image has a box of 1 class: cat"


def test_pascal_voc_by_name_has_its_boxes_and_pets_have_none(tmp_path: Path) -> None:
    (tmp_path / "VOCdevkit" / "VOC2012").mkdir(parents=True)
    voc(tmp_path / "VOCdevkit" / "VOC2012")
    data = open_boxes(settings(tmp_path / "memory", name="voc", path=tmp_path), STILL)
    assert (len(data.train), len(data.val), data.classes) == (2, 2, ("cat", "dog"))
    with pytest.raises(DataError, match=r"oxford_pets: has no boxes; use scenes, .*voc, or DATA="):
        open_boxes(settings(tmp_path / "memory", name="oxford_pets", path=tmp_path), STILL)


@pytest.mark.parametrize(
    "changed",
    [replace(STILL, randaugment=9), replace(STILL, mixup=0.2), replace(STILL, cutmix=1.0)],
    ids=["randaugment", "mixup", "cutmix"],
)
def test_changes_that_would_leave_the_boxes_behind_are_refused(changed: Augmentation, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"changes images but not their boxes"):
        open_boxes(settings(tmp_path), changed)


def test_a_tuning_split_leaves_validation_unseen(tmp_path: Path) -> None:
    data = open_boxes(replace(settings(tmp_path), tuning=True, limit_per_class=None), STILL)
    assert (len(data.train), len(data.val)) == (640, 160)


def test_boxes_that_are_read_otherwise_are_other_data(tmp_path: Path) -> None:
    coco(tmp_path)
    asked = settings(tmp_path / "memory", name="imagefolder", path=tmp_path)
    listing = list_boxes(tmp_path)
    moved = {path: boxes / np.float32(2) for path, boxes in listing.boxes.items()}
    digests = [dataset_digest(asked, Given(one, {})) for one in (listing, replace(listing, boxes=moved))]
    assert digests[0] != digests[1]


def seen(image: np.ndarray) -> list[float]:
    """Return the box of the bright pixels (channels, height, width) as fractions."""
    rows, columns = np.nonzero(image.mean(axis=0) > 0)
    height, width = image.shape[1:]
    return [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]


@pytest.mark.parametrize("write", ["coco", "voc"])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "upright"])
@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_boxes_are_where_their_objects_are_in_turned_photographs(
    orientation: int, stored: bool, write: str, tmp_path: Path
) -> None:
    """In training, whole and in views, in the gate's examples, and in the images that are written for it."""
    bright(tmp_path / "data", orientation=orientation, stored=stored, write=write)
    moving = replace(STILL, crop="random_resized", flip=True)
    data = open_boxes(settings(tmp_path, name="imagefolder", path=tmp_path / "data"), moving)
    write_boxes(data, tmp_path / "written")
    found = [box_examples(tmp_path / name, data.preprocess, ("cat",)) for name in ("data", "written")]
    pairs = [
        (one.images[0].numpy(), one.targets[0].numpy()) for one in eval_batches(data.val, data.preprocess, batch_size=1)
    ]
    pairs += [(images[0], truths[0]) for one in found for images, truths in one.batches(batch_size=1)]
    for seed in range(8):
        batch = next(train_batches(data, batch_size=1, augmentation=moving, seed=seed))
        pairs.append((batch.images[0].numpy(), batch.targets[0].numpy()))
    for image, boxes in pairs:
        if (boxes[:, 0] >= 0).any():  # its centre is in the view
            assert boxes[0, 1:5] == pytest.approx(seen(image), abs=1.5 / 64)
    turned = orientation != 1 and stored
    assert found[0].notes == data.notes
    assert len(data.notes) == turned
    assert not turned or "the boxes of 2 of 2 images were turned upright with them" in found[0].notes[0]
    assert found[1].notes == ()


@pytest.mark.parametrize("write", [coco, yolo, voc])
def test_images_with_damaged_exif_are_as_they_are_stored(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    for file in [*tmp_path.rglob("a.png")]:
        Image.open(file).save(file, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x0f\0\x02\0\0\0\xff\0\0\0\xff")
    assert list_boxes(tmp_path).notes == ()


def rotate(root: Path, orientation: int) -> None:
    """Give every image an EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for file in [*root.rglob("*.png")]:
        Image.open(file).save(file, exif=exif)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_boxes_that_could_be_of_stored_or_upright_pixels_are_refused(orientation: int, tmp_path: Path) -> None:
    for write in (coco, voc, yolo):
        write(tmp_path / write.__name__)
        rotate(tmp_path / write.__name__, orientation)
        with pytest.raises(
            DataError, match=rf"boxes of 3 of 4 images may not .*EXIF orientation {orientation}.*mogrify"
        ):
            list_boxes(tmp_path / write.__name__)


def test_yolos_boxes_of_turned_photographs_are_refused(tmp_path: Path) -> None:
    yolo(tmp_path)
    rotate(tmp_path, 6)
    with pytest.raises(DataError, match=r"a\.txt does not say if its boxes are for the stored or the upright pixels"):
        list_boxes(tmp_path)


@pytest.mark.parametrize("write", [coco, voc])
def test_images_of_another_size_than_their_boxes_are_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    for file in [*tmp_path.rglob("a.png")]:
        Image.new("RGB", (HEIGHT, WIDTH)).save(file)
    with pytest.raises(
        DataError, match=r"1 of 4 images .*a\.png \(its annotation is for 80 x 60 pixels, the image has 60 x 80: export"
    ):
        list_boxes(tmp_path)
