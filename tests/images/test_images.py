from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx_files import LABELS, class_folders
from PIL import Image

from compress.data.preprocess import Preprocess as TrainingPreprocess
from compress.data.preprocess import eval_pixels
from export.errors import BundleError
from export.images.read import Preprocess, labelled_batches

PLAIN = Preprocess(16, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def photograph(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(40, 60), (61, 43), (18, 18), (16, 90), (333, 250)])
def test_deployed_pixels_equal_those_of_evaluation_in_training(size: tuple[int, int]) -> None:
    image = photograph(*size)
    trained = TrainingPreprocess(16, 1.143, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    deployed = Preprocess(16, trained.resize_to, trained.mean, trained.std)
    np.testing.assert_array_equal(deployed.pixels(image), eval_pixels(image, trained))


def test_normalized_pixels_by_hand() -> None:
    pixels = np.full((1, 2, 2, 3), 51, np.uint8)
    found = Preprocess(2, 2, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)).normalize(pixels)
    assert found.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(found[0, :, 1, 1], [-1.5, -0.8, -0.2], rtol=1e-6)


def labels_of(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> list[int]:
    return [label for _, labels in batches for label in labels.tolist()]


def test_class_folders_are_matched_by_name(tmp_path: Path) -> None:
    class_folders(tmp_path, ["gnu", "cat"])
    assert labels_of(labelled_batches(tmp_path, PLAIN, LABELS)) == [0, 0, 2, 2]


def test_class_folders_of_other_names_are_matched_in_sorted_order(tmp_path: Path) -> None:
    class_folders(tmp_path / "val", ["n01", "n02", "n03"])
    (tmp_path / "train" / "n01").mkdir(parents=True)
    images, labels = next(labelled_batches(tmp_path, PLAIN, LABELS))
    assert labels.tolist() == images.mean(axis=(2, 3)).argmax(axis=1).tolist() == [0, 0, 1, 1, 2, 2]


def test_class_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat", "yak"])
    with pytest.raises(BundleError, match=r"2 class folders .*3 labels: yak"):
        next(labelled_batches(tmp_path, PLAIN, LABELS))


def test_batches_hold_every_image_once(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat", "dog", "gnu"])
    sizes = [len(labels) for _, labels in labelled_batches(tmp_path, PLAIN, LABELS, batch_size=4)]
    assert sizes == [4, 2]


@pytest.mark.parametrize("data", [b"not an image", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, b""])
def test_a_broken_image_is_named(tmp_path: Path, data: bytes) -> None:
    class_folders(tmp_path, ["cat"])
    (tmp_path / "cat" / "1.png").write_bytes(data)
    with pytest.raises(BundleError, match=r"cat/1\.png: cannot be read as an image"):
        list(labelled_batches(tmp_path, PLAIN, LABELS))


def test_an_image_too_narrow_to_resize_is_refused() -> None:
    with pytest.raises(BundleError, match="too narrow"):
        Preprocess(224, 256, (0.0,) * 3, (1.0,) * 3).pixels(Image.new("RGB", (1, 60_000)))


def test_an_archive_is_read_in_order(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([2, 0, 1]))
    ((found, labels),) = labelled_batches(tmp_path / "d.npz", PLAIN, LABELS)
    np.testing.assert_allclose(found, images.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    assert labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), [0, 1]),
        (np.zeros((2, 3, 16, 16), np.uint8), [0, 1]),
        (np.zeros((2, 16, 16, 3), np.uint8), [0]),
        (np.zeros((2, 16, 16, 3), np.uint8), [0, 3]),
        (np.zeros((2, 16, 16, 3), np.uint8), [0.0, 1.0]),
        (np.array([{}, {}]), [0, 1]),  # a pickle
    ],
)
def test_an_archive_that_does_not_fit_is_refused(tmp_path: Path, images: np.ndarray, labels: list[float]) -> None:
    np.savez(tmp_path / "d.npz", images=images, labels=np.array(labels))
    with pytest.raises(BundleError, match=r"d\.npz: "):
        next(labelled_batches(tmp_path / "d.npz", PLAIN, LABELS))


@pytest.mark.parametrize("name", ["missing.npz", "missing", "text.npz", "text.csv"])
def test_data_that_are_neither_folder_nor_archive_are_refused(tmp_path: Path, name: str) -> None:
    for text in ("text.npz", "text.csv"):
        (tmp_path / text).write_text("1,2,3")
    with pytest.raises(BundleError, match=name):
        next(labelled_batches(tmp_path / name, PLAIN, LABELS))


def test_the_bundles_preprocessing_reaches_the_network(tmp_path: Path) -> None:
    found = Preprocess(16, 18, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    class_folders(tmp_path, ["cat"])
    images, _ = next(labelled_batches(tmp_path, found, LABELS))
    np.testing.assert_allclose(images.mean(axis=(2, 3))[0], [2.5, -1.6, -1.0], rtol=1e-5)
