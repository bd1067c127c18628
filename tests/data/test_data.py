import gzip
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batched import eval_batches, train_batches
from photographs import STILL, augmentation, opened, write_classes, write_imagenet_layout, write_photo
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torchvision.transforms.v2 import RandomResizedCrop, functional

from compress.data import dataset as dataset_module
from compress.data import named
from compress.data.batches import Batch, steps_per_epoch
from compress.data.dataset import Dataset
from compress.data.images import ArrayImages, FileImages, MemoryImages
from compress.data.loader import loaded
from compress.data.stored import Stored
from compress.data.views import Boxes, cut_all, cut_each, draw
from compress.recipe.schema import Augment
from export.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every data set too large for memory."""
    monkeypatch.setattr(dataset_module, "MEMORY_BYTES", 0)


def training(data: Dataset, *, batch_size: int = 4, epoch: int = 0, seed: int = 0, **options: Any) -> list[Batch]:
    changes = {key: options.pop(key) for key in tuple(options) if key in STILL}
    options = {"workers": 0} | options
    return list(
        train_batches(
            data,
            batch_size=batch_size,
            augmentation=augmentation(**changes),
            seed=seed,
            epoch=epoch,
            view=options.pop("view", epoch),
            **options,
        )
    )


def evaluation(data: Dataset, *, train: bool = False, **options: Any) -> Batch:
    images = data.train if train else data.val
    options = {"batch_size": 5, "workers": 0} | options
    batches = list(eval_batches(images, data.preprocess, **options))
    return Batch(torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches]))


def reference_input(file: Path, facts: dict[str, Any]) -> np.ndarray:
    """Compute the network's input from the bundle's facts with Pillow and numpy alone."""
    image = Image.open(file).convert("RGB")
    shorter = min(image.size)
    size = [facts["resize_to"] * length // shorter for length in image.size]
    pixels = np.asarray(image.resize((size[0], size[1]), Image.Resampling.BILINEAR))
    left, top = ((length - facts["image_size"]) // 2 for length in size)
    pixels = pixels[top : top + facts["image_size"], left : left + facts["image_size"]]
    scaled = pixels.astype(np.float32) / np.float32(255)
    normal = (scaled - np.float32(facts["mean"])) / np.float32(facts["std"])
    return normal.transpose(2, 0, 1)


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in zip(left, right, strict=True)
    )


# Preprocessing


@pytest.mark.parametrize("resize", [1.0, 1.143, 1.3])
@pytest.mark.parametrize("part", ["train", "val"])
def test_evaluation_is_what_pillow_and_numpy_compute_from_the_bundles_facts(
    tmp_path: Path, part: str, resize: float
) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path), resize=resize)
    facts = json.loads(json.dumps(data.preprocess.to_json()))
    expected = [reference_input(file, facts) for file in sorted((tmp_path / part).rglob("*.png"))]
    assert np.array_equal(evaluation(data, train=part == "train").images.numpy(), np.stack(expected))


def test_evaluation_is_the_same_whether_images_are_in_memory_or_not(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = write_imagenet_layout(tmp_path)
    in_memory = opened("imagefolder", root, resize=1.143)
    request.getfixturevalue("no_memory")
    on_disk = opened("imagefolder", root, resize=1.143)
    assert isinstance(in_memory.val, MemoryImages)
    assert isinstance(on_disk.val, FileImages)
    assert same([evaluation(in_memory)], [evaluation(on_disk)])


@pytest.mark.usefixtures("no_memory")
def test_a_named_set_too_large_for_memory_is_resized_when_asked_for() -> None:
    data = opened("digits", image_size=(8, 8))
    assert isinstance(data.train, ArrayImages)
    assert same(
        training(data, batch_size=64, crop="pad", workers=0), training(data, batch_size=64, crop="pad", workers=2)
    )


def test_batches_are_float_channels_last_and_labels_int64(tmp_path: Path) -> None:
    for batch in (evaluation(opened("digits")), training(opened("digits"), crop="pad", flip=True)[0]):
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.targets.dtype == torch.int64


def test_limited_evaluation_is_spread_over_the_classes(tmp_path: Path) -> None:
    data = opened("imagefolder", write_classes(tmp_path, per_class=8))
    found = evaluation(data, train=True, limit=6).targets.tolist()
    assert (sorted(found), sorted(found[:3])) == ([0, 0, 1, 1, 2, 2], [0, 1, 2])


def test_a_limit_above_the_size_takes_each_image_once(tmp_path: Path) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    assert sorted(evaluation(data, limit=100).targets.tolist()) == [0, 0, 1, 1, 2, 2]


# Data sets and splits


def test_digits_are_scikit_learns_with_grey_levels_spread_over_a_byte() -> None:
    data = opened("digits", image_size=(8, 8))
    bunch = load_digits()
    assert isinstance(data.train, MemoryImages)
    assert isinstance(data.val, MemoryImages)
    found = torch.cat([data.train.still.pixels, data.val.still.pixels]).unflatten(2, (8, 8))
    expected = torch.from_numpy(np.rint(bunch.images * 255 / 16)).to(torch.uint8)
    assert torch.equal(found[:, 0].flatten(1).unique(dim=0), expected.flatten(1).unique(dim=0))


def test_digits_come_at_their_own_size_when_the_recipe_leaves_it_open() -> None:
    assert opened("digits", image_size=None).preprocess.image_size == (32, 32)


def test_a_held_out_split_takes_the_fraction_of_every_class() -> None:
    data = opened("digits", val_fraction=0.2)
    counts = np.bincount(load_digits().target)
    assert np.bincount(data.val.labels.numpy()).tolist() == [round(0.2 * count) for count in counts]
    assert (np.bincount(data.train.labels.numpy()) + np.bincount(data.val.labels.numpy())).tolist() == counts.tolist()


@pytest.mark.usefixtures("no_memory")
def test_a_held_out_split_shares_no_image_with_training(tmp_path: Path) -> None:
    data = opened("imagefolder", write_classes(tmp_path))
    train, val = names(data.train), names(data.val)
    assert not train & val
    assert len(train | val) == 12


def test_a_tuning_split_comes_out_of_the_training_images_and_leaves_validation_unseen(tmp_path: Path) -> None:
    write_imagenet_layout(tmp_path)
    for name, path in (("digits", None), ("imagefolder", tmp_path)):
        whole, tuning = (opened(name, path, val_fraction=0.25, tuning=tuning) for tuning in (False, True))
        assert len(tuning.train) + len(tuning.val) == len(whole.train)
        assert set(tuning.val.labels.tolist()) == set(whole.train.labels.tolist())
        assert tuning.digest != whole.digest
        judged = set(whole.validation_digests())
        assert not judged & set(tuning.validation_digests())


@pytest.mark.usefixtures("no_memory")
def test_a_held_out_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    root = write_classes(tmp_path, per_class=12)
    splits = [names(opened("imagefolder", root, seed=seed).val) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.usefixtures("no_memory")
def test_a_new_class_leaves_the_split_of_the_others_alone(tmp_path: Path) -> None:
    root = write_classes(tmp_path)
    before = names(opened("imagefolder", root).val)
    write_classes(tmp_path, classes=("zebra",))
    assert before < names(opened("imagefolder", root).val)


def test_a_limit_per_class_leaves_validation_whole(tmp_path: Path) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path), limit_per_class=3)
    assert np.bincount(data.train.labels.numpy()).tolist() == [3, 3, 3]
    assert len(data.val) == 6


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_a_validation_folder_is_found_under_its_usual_names(tmp_path: Path, val: str) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path, val=val))
    assert (len(data.train), len(data.val), data.classes) == (12, 6, ("cat", "dog", "owl"))


@pytest.mark.usefixtures("no_memory")
def test_tiny_imagenets_own_layout_is_read(tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        write_photo(tmp_path / "train" / name / "images" / f"{name}_0.JPEG")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("0 0 63 63\n")
    for index in range(3):
        write_photo(tmp_path / "val" / "images" / f"val_{index}.JPEG")
    rows = ["val_0.JPEG\tn02\t0\t0\t63\t63", "val_1.JPEG\tn01\t0\t0\t63\t63", "val_2.JPEG\tn02\t0\t0\t63\t63"]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    data = opened("imagefolder", tmp_path)
    assert data.val.labels.tolist() == [1, 0, 1]
    assert names(data.train) == {"train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG"}


def test_validation_labels_follow_training_where_validation_lacks_a_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "val", classes=("dog", "owl"), per_class=1)
    assert opened("imagefolder", tmp_path).val.labels.tolist() == [1, 2]
    assert "no image of 1 classes, cat first" in capsys.readouterr().err


def test_fashion_mnist_is_read_from_its_four_files(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    data = opened("fashion_mnist", tmp_path, image_size=(28, 28))
    assert isinstance(data.val, MemoryImages)
    assert torch.equal(data.val.still.pixels, torch.from_numpy(images).flatten(1)[:, None].expand(-1, 3, -1))
    assert data.val.labels.tolist() == labels.tolist()


def test_cifar_comes_from_torchvision_with_its_own_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        n = 20 if train else 10
        return SimpleNamespace(
            data=np.zeros((n, 32, 32, 3), np.uint8), targets=[i % 10 for i in range(n)], classes=list("abcdefghij")
        )

    monkeypatch.setattr("torchvision.datasets.CIFAR10", download)
    data = opened("cifar10", tmp_path)
    assert (len(data.train), len(data.val), data.classes) == (20, 10, tuple("abcdefghij"))


@pytest.mark.parametrize(("name", "kind"), [("cifar100", "CIFAR100"), ("fashion_mnist", "FashionMNIST")])
def test_a_refused_download_says_how_to_bring_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(f"torchvision.datasets.{kind}", refuse)
    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(DataError, match=rf"{name}: could not be downloaded to .*Name or service not known.*DATA="):
        opened(name, tmp_path)


def test_imagenette_on_disk_is_not_downloaded_and_has_english_names(tmp_path: Path) -> None:
    wnids = tuple(f"n0{index}" for index in range(10))
    write_classes(tmp_path / "imagenette2-320" / "train", classes=wnids, per_class=1)
    write_classes(tmp_path / "imagenette2-320" / "val", classes=wnids, per_class=1)
    assert opened("imagenette", tmp_path).classes[0] == "tench"


def test_the_recipe_names_every_augmentation() -> None:
    assert set(Augment.model_fields) == set(STILL)


# Digest


def test_the_digest_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    first, second = (write_classes(tmp_path / name) for name in ("first", "second"))
    assert opened("imagefolder", first).digest == opened("imagefolder", second).digest


def test_the_digest_changes_with_an_image(tmp_path: Path) -> None:
    before = opened("imagefolder", write_classes(tmp_path)).digest
    write_photo(tmp_path / "cat" / "0.png", width=40, height=40, seed=7)
    assert opened("imagefolder", tmp_path).digest != before


@pytest.mark.parametrize(
    "change",
    [{"image_size": (24, 24)}, {"seed": 1}, {"limit_per_class": 9}, {"mean": (0.0, 0.0, 0.0)}, {"resize": 1.5}],
)
def test_the_digest_changes_with_each_setting(change: dict[str, Any]) -> None:
    assert opened("digits", **change).digest != opened("digits").digest


def test_the_digest_needs_no_torch() -> None:
    code = "import sys, compress.data.digest, export.images.read; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Views


def boxes(top: int, left: int, height: int, width: int, *, mirrored: bool = False) -> Boxes:
    one = torch.ones(1)
    return Boxes(one * top, one * left, one * height, one * width, torch.tensor([mirrored]))


def photo(side: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


each_way = pytest.mark.parametrize("cut", [cut_all, cut_each])
Cut = Callable[[torch.Tensor, Boxes, tuple[int, int]], torch.Tensor]


@each_way
@pytest.mark.parametrize(("top", "left"), [(-4, -4), (0, 3), (4, -1)])
def test_a_shifted_view_is_exactly_torchvisions_padded_crop(cut: Cut, top: int, left: int) -> None:
    image = photo(32)
    expected = functional.crop(functional.pad(image, [4]), top + 4, left + 4, 32, 32)
    assert torch.equal(cut(image, boxes(top, left, 32, 32), (32, 32)).float(), expected.float())


@pytest.mark.parametrize(("height", "width"), [(16, 20), (32, 27), (64, 61), (3, 62)])
def test_a_resized_view_is_torchvisions_resized_crop(height: int, width: int) -> None:
    image, box = photo(64), boxes(0, 2, height, width)
    expected = functional.resized_crop(image.float(), 0, 2, height, width, [32, 32], antialias=True)
    assert torch.allclose(cut_all(image, box, (32, 32)), expected, atol=1e-3)
    assert torch.equal(
        cut_each(image, box, (32, 32)), functional.resized_crop(image, 0, 2, height, width, [32, 32], antialias=True)
    )


def test_both_ways_cut_images_of_several_sizes_alike(tmp_path: Path) -> None:
    data = opened("imagefolder", write_classes(tmp_path))
    assert isinstance(data.train, MemoryImages)
    stored, chosen = data.train.stored(whole=True), torch.arange(len(data.train))
    for seed in range(20):
        box = stored.boxes(
            draw(augmentation(crop="random_resized", flip=True), len(chosen), size=(32, 32), seed=seed), chosen
        )
        one, other = (cut(stored.images(chosen, CPU), box, (16, 16)).float() for cut in (cut_all, cut_each))
        assert (one - other).abs().max() < 1.01  # bytes are rounded after each of the two directions


def test_a_box_of_a_shrunk_panorama_keeps_a_pixel_of_it() -> None:
    left = torch.tensor([0.0, 10, 4500, 8867])
    narrow = Boxes(
        torch.zeros(4), left, torch.full((4,), 100.0), torch.full((4,), 133.0), torch.zeros(4, dtype=torch.bool)
    )
    box = narrow.scaled(torch.tensor([[1.0, 23 / 9000]]))
    assert (box.left.tolist(), box.width.tolist()) == ([0, 0, 11, 22], [1, 1, 1, 1])
    white = torch.full((4, 3, 100, 23), 255, dtype=torch.uint8)
    assert cut_all(white, box, (8, 8)).min() > 254
    assert cut_each(white, box, (8, 8)).min() == 255


@each_way
def test_a_mirrored_view_is_the_flipped_view(cut: Cut) -> None:
    image = photo(32)
    plain, mirrored = (cut(image, boxes(0, 3, 20, 24, mirrored=flag), (32, 32)) for flag in (False, True))
    assert torch.equal(mirrored, plain.flip(-1))


def test_random_boxes_keep_the_area_the_aspect_and_the_image() -> None:
    draws = draw(augmentation(crop="random_resized", min_area=0.3, flip=True), 20_000, size=(32, 32), seed=0)
    drawn = draws.boxes(torch.arange(20_000), torch.full((20_000, 2), 64))
    area = drawn.height * drawn.width / 64**2
    assert 0.27 < area.min() < 0.33  # whole pixels: a side of 30 rounds by 2 %
    assert area.max() == 1
    assert (drawn.width / drawn.height).log().abs().max() < np.log(4 / 3) + 0.05
    assert drawn.top.min() == drawn.left.min() == 0
    assert (drawn.top + drawn.height).max() == (drawn.left + drawn.width).max() == 64
    assert drawn.mirrored.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_random_shifts_reach_the_border_and_no_further() -> None:
    draws = draw(augmentation(crop="pad", pad=0.125), 5_000, size=(32, 32), seed=0)
    drawn = draws.boxes(torch.arange(5_000), torch.full((5_000, 2), 32))
    assert sorted(set(drawn.top.tolist())) == sorted(set(drawn.left.tolist())) == list(range(-4, 5))
    assert not drawn.mirrored.any()


@pytest.mark.parametrize("size", [(200, 120), (60, 200), (100, 100), (250, 40)])
def test_random_boxes_have_torchvisions_distribution(size: tuple[int, int]) -> None:
    draws = draw(augmentation(crop="random_resized", min_area=0.3), 2_000, size=(32, 32), seed=0)
    found = draws.boxes(torch.arange(2_000), torch.tensor([size] * 2_000))
    crop, image = RandomResizedCrop(8, scale=(0.3, 1.0)), torch.empty(3, *size)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        expected = [crop.make_params([image]) for _ in range(2_000)]
    for name in ("top", "left", "height", "width"):
        ours, theirs = getattr(found, name).numpy(), np.array([one[name] for one in expected])
        apart = [abs((ours <= value).mean() - (theirs <= value).mean()) for value in np.union1d(ours, theirs)]
        assert max(apart) < 1.95 * np.sqrt(2 / 2_000)  # Kolmogorov and Smirnov's test at p = 0.001


@pytest.mark.parametrize("change", [{"crop": "random_resized"}, {"crop": "pad"}, {"crop": "none"}])
def test_images_in_memory_and_in_files_are_shown_in_the_same_views(
    tmp_path: Path, request: pytest.FixtureRequest, change: dict[str, Any]
) -> None:
    root = write_imagenet_layout(tmp_path)
    in_memory = training(opened("imagefolder", root), batch_size=12, flip=True, **change)
    request.getfixturevalue("no_memory")
    on_disk = training(opened("imagefolder", root), batch_size=12, flip=True, **change)
    assert torch.equal(in_memory[0].images, on_disk[0].images)


@pytest.mark.parametrize("image_size", [32, 64])
def test_views_of_photographs_that_were_shrunk_are_nearly_those_of_the_files(
    tmp_path: Path, request: pytest.FixtureRequest, image_size: int
) -> None:
    for label, pixels in zip("ab", load_sample_images().images, strict=True):
        for index in range(2):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / label / f"{index}.png")
    plain = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "image_size": (image_size, image_size), "val_fraction": 0.5}
    in_memory = opened("imagefolder", tmp_path, **plain)
    request.getfixturevalue("no_memory")
    on_disk = opened("imagefolder", tmp_path, **plain)
    assert isinstance(in_memory.train, MemoryImages)
    assert isinstance(on_disk.train, FileImages)
    first, other = (
        torch.cat([training(data, view=view, crop="random_resized", flip=True)[0].images for view in range(20)])
        for data in (in_memory, on_disk)
    )
    assert (first - other).abs().mean() < 4  # boxes lie on whole pixels of what is stored
    assert float(first.std() / other.std()) == pytest.approx(1, abs=0.01)


def test_an_image_set_says_where_its_images_are(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = write_imagenet_layout(tmp_path)
    assert opened("imagefolder", root).train.place == "in memory, whole"
    assert opened("imagefolder", root).val.place == "in memory"
    request.getfixturevalue("no_memory")
    assert opened("imagefolder", root).train.place == "in files, decoded for each view"


def test_photographs_are_kept_whole_with_the_pixels_that_their_crops_need(tmp_path: Path) -> None:
    for label in ("a", "b"):
        write_photo(tmp_path / label / "wide.png", width=300, height=90)
        write_photo(tmp_path / label / "small.png", width=20, height=30)
    data = opened("imagefolder", tmp_path, val_fraction=0.5)
    assert isinstance(data.train, MemoryImages)
    whole = data.train.whole
    assert whole is not None
    for (height, width), kept in zip(whole.sizes.tolist(), whole.kept.tolist(), strict=True):
        smallest = np.sqrt(0.25 * height * width * 0.75)  # of a crop's sides
        scale = kept[0] / height
        assert kept == [height, width] if width == 20 else smallest * scale == pytest.approx(16, abs=0.5)
        assert scale == pytest.approx(kept[1] / width, rel=0.02)
    sizes = {tuple(size) for size in whole.sizes.tolist()}
    assert sizes <= {(90, 300), (30, 20)}


def test_stored_images_of_several_sizes_come_back_whole(tmp_path: Path) -> None:
    root = write_classes(tmp_path, per_class=3)
    data = opened("imagefolder", root, val_fraction=0.3)
    assert isinstance(data.train, MemoryImages)
    assert data.train.whole is not None
    chosen = torch.arange(len(data.train))
    together = data.train.whole.images(chosen, CPU)
    for row, (height, width) in enumerate(data.train.whole.sizes.tolist()):
        (alone,) = data.train.whole.images(chosen[row : row + 1], CPU)
        assert tuple(alone.shape) == (3, height, width)
        assert torch.equal(together[row, :, :height, :width], alone)
        assert not together[row, :, height:].any()
    files = sorted(file for file in root.rglob("*.png"))
    originals = [np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files]
    images = [together[row, :, :h, :w].numpy() for row, (h, w) in enumerate(data.train.whole.sizes.tolist())]
    assert all(any(np.array_equal(image, original) for original in originals) for image in images)


# Training batches

CHANGES: dict[str, dict[str, Any]] = {
    "pad": {"crop": "pad", "flip": True},
    "random_resized": {"crop": "random_resized", "flip": True},
    "randaugment": {"crop": "pad", "flip": True, "randaugment": 9},
    "distort": {"flip": True, "distort": True},
    "mixed": {"crop": "pad", "mixup": 0.4, "cutmix": 1.0},
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


@each_change
def test_views_repeat_for_the_same_seed_and_epoch_and_differ_otherwise(tmp_path: Path, change: dict[str, Any]) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    first = training(data, **change)
    assert same(first, training(data, **change))
    assert not same(first, training(data, epoch=1, **change))
    assert not same(first, training(data, seed=1, **change))


@each_change
def test_every_image_and_every_epoch_has_views_of_its_own(tmp_path: Path, change: dict[str, Any]) -> None:
    for name in "abcdefgh":  # one photograph eight times: what differs is the views
        write_photo(tmp_path / "train" / name / "0.png", width=40, height=40)
        write_photo(tmp_path / "val" / name / "0.png")
    data = opened("imagefolder", tmp_path)
    views = torch.cat([training(data, batch_size=8, epoch=epoch, **change)[0].images for epoch in range(2)])
    assert len(views.flatten(1).unique(dim=0)) > 12


@each_change
@pytest.mark.usefixtures("no_memory")
def test_views_do_not_depend_on_the_number_of_loader_processes(tmp_path: Path, change: dict[str, Any]) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    alone = training(data, **change)
    assert all(same(alone, training(data, workers=workers, **change)) for workers in (1, 2))


@pytest.mark.parametrize("change", [CHANGES["pad"], CHANGES["randaugment"]], ids=["pad", "randaugment"])
def test_ranks_together_see_what_one_process_sees(tmp_path: Path, change: dict[str, Any]) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    alone = training(data, batch_size=6, **change)
    shares = [training(data, batch_size=6, rank=rank, ranks=2, **change) for rank in range(2)]
    for whole, even, odd in zip(alone, *shares, strict=True):
        assert torch.equal(torch.stack([even.images, odd.images], dim=1).flatten(0, 1), whole.images)
        assert torch.equal(torch.stack([even.targets, odd.targets], dim=1).flatten(), whole.targets)


def test_a_view_does_not_depend_on_the_batch_it_is_in(tmp_path: Path) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    by_three, by_six = (
        torch.cat([batch.images for batch in training(data, batch_size=size, crop="pad", flip=True)]) for size in (3, 6)
    )
    assert torch.equal(by_three, by_six)


@each_change
def test_training_views_leave_the_global_random_state_alone(tmp_path: Path, change: dict[str, Any]) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    before = torch.manual_seed(0).get_state()
    training(data, **change)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_epoch_shows_each_image_once_and_drops_the_ragged_batch(tmp_path: Path) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    still = {tuple(image.flatten().tolist()) for image in evaluation(data, train=True).images}
    batches = training(data, batch_size=5)
    seen = [tuple(image.flatten().tolist()) for batch in batches for image in batch.images]
    assert [len(batch.images) for batch in batches] == [5, 5]
    assert len(set(seen)) == 10
    assert set(seen) < still


def test_a_ragged_batch_stays_where_it_is_the_only_one(tmp_path: Path) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    assert [len(batch.images) for batch in training(data, batch_size=64)] == [12]
    assert steps_per_epoch(12, 64) == 1


def test_more_ranks_than_images_in_a_batch_are_refused(tmp_path: Path) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    with pytest.raises(DataError, match="batch_size: 2 images cannot be shared by 3 ranks"):
        training(data, batch_size=2, rank=2, ranks=3)


@pytest.mark.parametrize("change", [{"mixup": 1.0}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_mixed_targets_are_probabilities_of_two_classes_at_most(change: dict[str, Any]) -> None:
    batch = training(opened("digits"), batch_size=64, **change)[0]
    assert batch.targets.shape == (64, 10)
    assert torch.allclose(batch.targets.sum(dim=1), torch.ones(64))
    assert (batch.targets > 0).sum(dim=1).max() == 2
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_every_batch_and_every_epoch_is_mixed_in_its_own_way() -> None:
    batches = [
        batch for epoch in range(2) for batch in training(opened("digits"), batch_size=64, epoch=epoch, mixup=1.0)
    ]
    assert len({float(batch.targets[batch.targets > 0].min()) for batch in batches}) == len(batches)


@pytest.mark.usefixtures("no_memory")
def test_an_abandoned_epoch_leaves_no_process_behind(tmp_path: Path) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    batches: Iterator[Batch] | None = train_batches(
        data, batch_size=2, augmentation=augmentation(crop="pad"), workers=2
    )
    assert batches is not None
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches = None
    assert not multiprocessing.active_children()


def test_images_in_memory_need_no_process() -> None:
    batches = train_batches(
        opened("digits"),
        batch_size=64,
        augmentation=augmentation(randaugment=9),
        seed=0,
        epoch=0,
        view=0,
        workers=None,
    )
    next(batches)
    assert not multiprocessing.active_children()


def names(images: object) -> set[str]:
    assert isinstance(images, FileImages)
    return {images.name(index) for index in range(len(images))}


def test_the_recipes_resize_is_the_shorter_side_in_pixels() -> None:
    assert opened("digits", image_size=(56, 56), resize=1.143).preprocess.resize_to == (64, 64)


VIEWS: dict[str, dict[str, Any]] = {
    "crops": {"crop": "random_resized", "flip": True},
    "colours": {"crop": "pad", "randaugment": 9},
    "mixed": {"crop": "pad", "mixup": 0.4, "cutmix": 1.0},
}


def shown(batches: list[Batch]) -> dict[int, tuple[bytes, bytes]]:
    """Return every image's bits and target by its index."""
    found = {}
    for batch in batches:
        assert batch.views is not None
        for index, image, target in zip(batch.views.indices.tolist(), batch.images, batch.targets, strict=True):
            found[index] = (image.contiguous().numpy().tobytes(), target.numpy().tobytes())
    return found


@pytest.mark.parametrize("change", VIEWS.values(), ids=VIEWS)
def test_a_view_replayed_in_other_batches_is_the_same_to_the_bit_and_another_one_is_not(change: dict[str, Any]) -> None:
    data = opened("digits", limit_per_class=30)
    first = shown(training(data, batch_size=64, epoch=0, view=2, **change))
    again = shown(training(data, batch_size=48, epoch=5, view=2, **change))
    other = shown(training(data, batch_size=48, epoch=5, view=1, **change))
    both = first.keys() & again.keys()  # the ragged last batch is left out
    assert len(both) > 200
    assert all(first[index] == again[index] for index in both)
    assert sum(again[index] == other[index] for index in again) < 0.2 * len(again)


@pytest.mark.usefixtures("no_memory")
def test_files_are_replayed_as_well(tmp_path: Path) -> None:
    data = opened("imagefolder", write_imagenet_layout(tmp_path))
    change: dict[str, Any] = {"crop": "random_resized", "flip": True, "mixup": 1.0}
    first, again = (shown(training(data, batch_size=n, epoch=n, view=1, **change)) for n in (3, 4))
    both = first.keys() & again.keys()
    assert len(both) >= 6
    assert all(first[index] == again[index] for index in both)


def test_a_batch_splits_into_parts_that_know_their_images() -> None:
    (batch, *_) = training(opened("digits"), batch_size=10)
    parts = list(batch.split(4))
    assert [len(part.images) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert batch.views is not None
    assert torch.equal(torch.cat([part.views.indices for part in parts if part.views]), batch.views.indices)


def test_later_batches_are_read_as_bytes_while_a_step_runs(tmp_path: Path) -> None:
    def view(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        (tmp_path / str(index)).touch()
        return torch.full((3, 4, 4), index, dtype=torch.uint8), torch.tensor(index)

    sizes = torch.full((40, 2), 4)
    images = MemoryImages(Stored(torch.empty(40, 3, 16, dtype=torch.uint8), sizes, sizes), torch.arange(40))
    raws = loaded(images, view, torch.arange(40).split(10), workers=1, device=CPU)
    assert next(raws).pixels.dtype == torch.uint8
    deadline = time.monotonic() + 30
    while not (tmp_path / "19").exists():  # the second batch, which nobody has asked for
        assert time.monotonic() < deadline
        time.sleep(0.01)
    raws.close()  # type: ignore[attr-defined]
