"""Images with any number of labels: what a labels.csv may hold, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.errors import DataError
from export.images.preprocess import Preprocess
from export.images.tables import list_table, table_examples

SEEN = Preprocess((8, 8), (8, 8), (0, 0, 0), (1, 1, 1))


def folder_of(root: Path, tables: dict[str, str], images: list[str]) -> Path:
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), len(name), np.uint8)).save(root / name)
    for place, text in tables.items():
        (root / place / "labels.csv").write_text(text, encoding="utf-8")
    return root


def test_a_table_in_each_split_lists_labels(tmp_path: Path) -> None:
    tables = {
        "train": "\ufefffile,labels\na.png,cat; dog\nsub/b.png,\n",
        "val": 'file,labels\nc.png,dog\n"d,e.png","cat"\n',
    }
    root = folder_of(tmp_path, tables, ["train/a.png", "train/sub/b.png", "val/c.png", "val/d,e.png"])
    found = list_table(root)
    assert found.classes == ("cat", "dog")
    assert [path for path, _ in found.train] == ["train/a.png", "train/sub/b.png"]
    assert found.truths(found.train).tolist() == [[1, 1], [0, 0]]
    assert found.val is not None
    assert found.truths(found.val).tolist() == [[0, 1], [1, 0]]
    assert "train/labels.csv" in found.names()
    examples = table_examples(root, SEEN, ("hat", "dog", "cat"))
    assert examples.truths.tolist() == [[0, 1, 0], [0, 0, 1]]
    assert examples.pixels(0).shape == (8, 8, 3)


def test_one_table_has_a_column_for_each_class_and_folders_split(tmp_path: Path) -> None:
    text = "file,dog,cat\ntrain/a.png,1,0\nvalid/b.png,0,0\n"
    found = list_table(folder_of(tmp_path, {"": text}, ["train/a.png", "valid/b.png"]))
    assert (found.classes, len(found.train), found.val) == (("dog", "cat"), 1, (("valid/b.png", "labels.csv"),))
    together = folder_of(tmp_path / "one", {"": "file,labels\na.png,x\nb.png,\n"}, ["a.png", "b.png"])
    found = list_table(together)
    assert (found.classes, len(found.train), found.val) == (("x",), 2, None)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"train": "a.png,cat\n"}, r"train/labels\.csv: its first line must be `file,labels`, or .*, got 'a\.png,cat'"),
        ({"train": ""}, r"labels\.csv: cannot be read .*: save it as UTF-8 text with commas"),
        ({"train": "file,cat,cat\na.png,1,0\n"}, r"each class's name once"),
        (
            {"train": "file,labels\na.png,cat\nb.png,\n"},
            r"train/labels\.csv: 1 image missing: train/b\.png: add them",
        ),
        (
            {"train": "file,labels\n"},
            r"train/labels\.csv: 1 of 1 images have no row: train/a\.png: add rows, empty where",
        ),
        ({"train": "file,labels\na.png,cat\na.png,dog\n"}, r"line 3: names a\.png again: correct it"),
        ({"train": "file,labels\na.png,cat,dog\n"}, r"line 2: has 3 cells, the first line 2"),
        ({"train": "file,cat\na.png,yes\n"}, r"line 2: a class's column must hold 0 or 1, got 'yes'"),
        ({"train": "file,labels\na.png,\n"}, r"not one image has a label"),
        (
            {"train": "file,labels\na.png,cat\n", "val": "file,labels\nv.png,cow\n"},
            r"val/labels\.csv: val/v\.png: 'cow' is none of the 1 classes \(cat\): correct it, or label a training image",
        ),
        (
            {"train": "file,cat\na.png,1\n", "val": "file,dog\nv.png,1\n"},
            r"val/labels\.csv: its columns are not the 1 classes of .*train/labels\.csv: give both the same",
        ),
        ({"train": "file,labels\n../val/v.png,cat\na.png,cat\n"}, r"1 image missing: val/v\.png"),
    ],
)
def test_what_is_no_table_of_the_images_is_refused(tmp_path: Path, tables: dict[str, str], message: str) -> None:
    root = folder_of(tmp_path, {}, ["train/a.png", "val/v.png"])
    with pytest.raises(DataError, match=message):
        list_table(folder_of(root, tables, []))


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no labels\.csv: put one beside the images, or into train/ and val/"):
        list_table(folder_of(tmp_path, {}, ["train/a.png"]))
