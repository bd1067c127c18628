"""The same boxes in three formats, and what holds for boxes in each of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn import DRAWN, HEIGHT, WIDTH, coco, image, voc, yolo

from export.errors import DataError
from export.images.annotations import box_examples, list_boxes
from export.images.preprocess import Preprocess

Write = Callable[[Path], None]
every_format = pytest.mark.parametrize("write", [coco, yolo, voc])


@every_format
def test_the_same_boxes_are_read_from_each_format(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    found = list_boxes(tmp_path)
    assert found.classes == ("cat", "dog")
    assert found.val is not None
    assert found.notes == ()
    for files, split in ((found.train, "train"), (found.val, "val")):
        expected = [DRAWN[name] for name in DRAWN if name.startswith(split)]
        assert [Path(path).stem for path, _ in files] == [name[-1] for name in DRAWN if name.startswith(split)]
        table = found.truths(files)
        for row, boxes in zip(table, expected, strict=True):
            real = row[row[:, 0] >= 0]
            pixels = [
                (label, x / WIDTH, y / HEIGHT, right / WIDTH, bottom / HEIGHT, 0)
                for label, x, y, right, bottom in boxes
            ]
            assert np.allclose(real, np.array(pixels).reshape(-1, 6), atol=1e-6)
    assert all((tmp_path / name).is_file() for name in found.names())


def add_test_split(root: Path, *, boxes: bool) -> None:
    """Add two images of a split `test` to a folder of any format."""
    names = ["y", "z"]
    if (root / "annotations").is_dir():
        document = json.loads((root / "annotations/instances_train.json").read_text())
        document["images"] = [{**document["images"][0], "id": n, "file_name": f"{n}.png"} for n in names]
        document["annotations"] = [{**document["annotations"][0], "image_id": n} for n in names if boxes]
        (root / "annotations/instances_test.json").write_text(json.dumps(document))
    if (root / "Annotations").is_dir():
        shutil.copy(root / "Annotations/a.xml", root / "Annotations/y.xml")
        (root / "Annotations/z.xml").write_text((root / "Annotations/d.xml").read_text())
        (root / "ImageSets/Main/test.txt").write_text("y\nz\n")
    if (root / "labels").is_dir():
        (root / "labels/test").mkdir()
        if boxes:
            shutil.copy(root / "labels/train/a.txt", root / "labels/test/y.txt")
    for name in names:
        for folder in ("test", "images/test", "JPEGImages"):
            image(root / folder / f"{name}.png")


@every_format
def test_val_is_validation_where_there_is_a_test_split_too(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    before = list_boxes(tmp_path)
    add_test_split(tmp_path, boxes=False)
    assert list_boxes(tmp_path).val == before.val
    assert list_boxes(tmp_path).train == before.train


@pytest.mark.parametrize(("write", "val"), [(coco, "val"), (yolo, "images/val"), (voc, "ImageSets/Main/val.txt")])
def test_a_test_split_is_validation_where_there_is_no_val(write: Write, val: str, tmp_path: Path) -> None:
    write(tmp_path)
    add_test_split(tmp_path, boxes=True)
    (tmp_path / val).rename(tmp_path / "gone")
    (tmp_path / "annotations/instances_val.json").unlink(missing_ok=True)
    found = list_boxes(tmp_path)
    assert [Path(path).stem for path, _ in found.val or ()] == ["y", "z"]
    assert found.notes == (f"{tmp_path}: has no val split: its test split is used for validation",)


def test_roboflows_folders_keep_their_splits_apart(tmp_path: Path) -> None:
    coco(tmp_path)
    add_test_split(tmp_path, boxes=True)
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        if split != folder:
            (tmp_path / split).rename(tmp_path / folder)
        (tmp_path / f"annotations/instances_{split}.json").rename(tmp_path / folder / "_annotations.coco.json")
    found = list_boxes(tmp_path)
    assert [path for path, _ in found.train] == ["train/a.png", "train/b.png"]
    assert [path for path, _ in found.val or ()] == ["valid/c.png", "valid/d.png"]


@every_format
def test_validation_images_without_any_box_are_refused(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    if write is coco:
        document = json.loads((tmp_path / "annotations/instances_val.json").read_text())
        (tmp_path / "annotations/instances_val.json").write_text(json.dumps(document | {"annotations": []}))
    elif write is yolo:
        (tmp_path / "labels/val/c.txt").write_text("")
    else:
        shutil.copy(tmp_path / "Annotations/d.xml", tmp_path / "Annotations/c.xml")
    with pytest.raises(DataError, match="none of its 2 validation images has a box"):
        list_boxes(tmp_path)


@every_format
def test_hidden_files_are_no_images(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    before = list_boxes(tmp_path)
    for file in [*tmp_path.rglob("*.*")]:
        if file.is_file():
            file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")  # what macOS leaves on other disks
            file.with_name(".DS_Store").write_bytes(b"\0")
    assert list_boxes(tmp_path).names() == before.names()


@every_format
def test_text_may_begin_with_utf8s_mark(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    before = list_boxes(tmp_path)
    for file in [*tmp_path.rglob("*")]:
        if file.suffix in (".txt", ".yaml", ".json", ".xml"):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert list_boxes(tmp_path).train == before.train


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (coco, "annotations/instances_train.json"),
        (yolo, "data.yaml"),
        (yolo, "classes.txt"),
        (yolo, "labels/train/a.txt"),
        (voc, "ImageSets/Main/train.txt"),
        (voc, "Annotations/a.xml"),
    ],
)
def test_text_in_another_encoding_is_refused(write: Write, name: str, tmp_path: Path) -> None:
    write(tmp_path)
    content = (tmp_path / name).read_bytes() if (tmp_path / name).is_file() else b"cat\ndog\n"
    (tmp_path / name).write_bytes(content + "é".encode("latin-1"))
    with pytest.raises(DataError, match=rf"{name}: byte {len(content):,} is not UTF-8 .*: save the file as UTF-8"):
        list_boxes(tmp_path)


@every_format
def test_boxes_without_an_area_are_counted(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    for file in [*tmp_path.rglob("*")]:  # the first box of a.png: 8, 6, 40, 30
        if file.suffix == ".json":
            file.write_text(file.read_text().replace("[8, 6, 32, 24]", "[8, 6, 0, 24]"))
        elif file.suffix == ".xml":
            file.write_text(file.read_text().replace("<xmax>40</xmax>", "<xmax>8</xmax>"))
        elif file.parent.name == "train" and file.name == "a.txt":
            file.write_text(file.read_text().replace(f"{32 / WIDTH}", "0"))
    found = list_boxes(tmp_path)
    path, source = found.train[0]
    assert len(found.boxes[path]) == 1
    assert found.notes == (f"{tmp_path}: 1 boxes without an area are left out: {source}",)
    examples = box_examples(tmp_path, Preprocess((8, 8), (8, 8), (0.5,) * 3, (0.5,) * 3, stretch=True), ("cat", "dog"))
    assert examples.notes == found.notes


def test_a_folder_without_boxes_says_what_it_needs(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"has no boxes in a known layout: give COCO's annotations/\*\.json"):
        list_boxes(tmp_path)
