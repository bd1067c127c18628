from pathlib import Path

import numpy as np
import pytest
from onnx_files import LABELS, class_folders
from PIL import Image

from export.errors import DataError
from export.images.preprocess import Preprocess
from export.images.read import Examples, digest, find_examples, read_pixels, spread

PLAIN = Preprocess((16, 16), (16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def found(data: Path, preprocess: Preprocess = PLAIN) -> Examples:
    return find_examples(data, preprocess, LABELS)


def test_normalized_pixels_by_hand() -> None:
    pixels = np.full((1, 2, 2, 3), 51, np.uint8)
    normal = Preprocess((2, 2), (2, 2), (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)).normalize(pixels)
    assert normal.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(normal[0, :, 1, 1], [-1.5, -0.8, -0.2], rtol=1e-6)


def labels_of(examples: Examples) -> list[int]:
    return [label for _, labels in examples.batches() for label in labels.tolist()]


def test_class_folders_are_matched_by_name(tmp_path: Path) -> None:
    class_folders(tmp_path, ["gnu", "cat"])
    assert labels_of(found(tmp_path)) == [0, 0, 2, 2]
    assert found(tmp_path).notes == ()


def test_class_folders_none_of_which_is_a_label_are_taken_in_order_and_that_is_said(tmp_path: Path) -> None:
    class_folders(tmp_path / "val", ["n01", "n02", "n03"])
    examples = found(tmp_path)
    images, labels = next(examples.batches())
    assert labels.tolist() == images.mean(axis=(2, 3)).argmax(axis=1).tolist() == [0, 0, 1, 1, 2, 2]
    assert (
        "no class folder is a label, so they are matched in order: n01 is cat, n02 is dog, n03 is gnu"
        in examples.notes[0]
    )


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (["cat", "yak"], "1 of 2 class folders not in the 3 labels of the bundle: yak: rename or remove them"),
        (["dog", "gnu", "horse"], "1 of 3 class folders not in the 3 labels of the bundle: horse: rename"),
        (["n01", "n02"], r"none of its 2 class folders \(n01, n02\) is one of the 3 labels"),
    ],
)
def test_class_folders_that_do_not_fit_are_named(tmp_path: Path, folders: list[str], sentence: str) -> None:
    class_folders(tmp_path, folders)
    with pytest.raises(DataError, match=sentence):
        found(tmp_path)


def test_few_of_many_images_are_spread_over_the_folder_and_so_is_their_beginning(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat", "dog", "gnu"])
    assert sorted(labels_of(found(tmp_path).spread(3))) == [0, 1, 2]
    picked = spread(1000, 256)
    assert len(set(picked.tolist())) == 256
    assert np.bincount(picked[:64] // 100).min() >= 5  # of ten classes
    assert sorted(spread(5, 9).tolist()) == [0, 1, 2, 3, 4]


def test_batches_hold_every_image_once(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat", "dog", "gnu"])
    sizes = [len(labels) for _, labels in found(tmp_path).batches(batch_size=4)]
    assert sizes == [4, 2]


@pytest.mark.parametrize("data", [b"not an image", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, b""])
def test_a_broken_image_is_named(tmp_path: Path, data: bytes) -> None:
    class_folders(tmp_path, ["cat"])
    (tmp_path / "cat" / "1.png").write_bytes(data)
    with pytest.raises(DataError, match=r"cat/1\.png: cannot be read as an image"):
        list(found(tmp_path).batches())


def test_an_image_too_narrow_to_resize_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (1, 60_000)).save(tmp_path / "thread.png")
    with pytest.raises(DataError, match=r"thread\.png: .*1 x 60,000 is too narrow"):
        read_pixels(tmp_path / "thread.png", Preprocess((224, 224), (256, 256), (0.0,) * 3, (1.0,) * 3))


def test_an_archive_is_read_in_order(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([2, 0, 1]))
    ((read, labels),) = found(tmp_path / "d.npz").batches()
    np.testing.assert_allclose(read, images.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
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
    with pytest.raises(DataError, match=r"d\.npz: "):
        found(tmp_path / "d.npz")


@pytest.mark.parametrize("name", ["missing.npz", "missing", "text.npz", "text.csv"])
def test_data_that_are_neither_folder_nor_archive_are_refused(tmp_path: Path, name: str) -> None:
    for text in ("text.npz", "text.csv"):
        (tmp_path / text).write_text("1,2,3")
    with pytest.raises(DataError, match=name):
        found(tmp_path / name)


def test_the_bundles_preprocessing_reaches_the_network(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat"])
    images, _ = next(found(tmp_path, Preprocess((16, 16), (18, 18), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))).batches())
    np.testing.assert_allclose(images.mean(axis=(2, 3))[0], [2.5, -1.6, -1.0], rtol=1e-5)


def test_only_images_that_the_network_was_judged_by_are_scored_and_the_others_are_counted(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat", "dog", "gnu"])
    (tmp_path / "gnu" / "broken.png").symlink_to(tmp_path / "nowhere")
    known = [digest((tmp_path / name).read_bytes()) for name in ("cat/1.png", "gnu/0.png")]
    judged = found(tmp_path).judged([*known, "0" * 16])
    assert labels_of(judged) == [0, 2]
    assert judged.notes == (
        "2 of 7 images are the network's validation images; the other 5 are left out: it may have been trained on them",
        "1 of the network's 3 validation images are not here",
    )


def test_a_copy_of_a_judged_image_counts_as_often_as_it_was_judged(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat", "dog"])
    (tmp_path / "dog" / "copy.png").write_bytes((tmp_path / "dog" / "0.png").read_bytes())
    twice = [digest((tmp_path / "dog" / "0.png").read_bytes())] * 2
    assert [len(found(tmp_path).judged(twice[:n])) for n in (1, 2)] == [1, 2]


def test_where_no_image_was_judged_by_all_are_scored_and_that_is_said(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat"])
    judged = found(tmp_path).judged(["0" * 16])
    assert (len(judged), len(judged.notes)) == (2, 1)
    assert "none of the 2 images is one of the network's 1 validation images: all are scored" in judged.notes[0]


def test_an_archives_images_are_known_by_their_pixels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([2, 0, 1]))
    assert labels_of(found(tmp_path / "d.npz").judged([digest(images[1].tobytes())])) == [0]
