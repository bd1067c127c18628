"""YOLO's text files: the names in YAML, and what is wrong with them, one sentence each."""

import sys
from pathlib import Path

import pytest
from drawn import image, yolo

from export.errors import DataError
from export.images.annotations import list_boxes


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("0 0.5 0.5 0.2", r"line 1: must be `class x y width height`, got 4 numbers"),
        ("cat 0.5 0.5 0.2 0.2", r"must be `class x y width height`, got 'cat"),
        ("2 0.5 0.5 0.2 0.2", r"names the class 2, but there are 2 \(0 to 1\)"),
        ("1e400 0.5 0.5 0.2 0.2", r"names the class inf, but there are 2"),
        ("0 0.5 0.5 nan 0.2", "has values that are not finite"),
        ("0 0.9 0.5 0.4 0.2", "leaves the image of 1 x 1"),
        ("0 0.5 0.5 -0.2 0.2", r"\(0.6, 0.4, 0.4, 0.6\) has a negative width or height"),
        ("", "none of its 2 training images has a box"),
    ],
)
def test_yolo_lines_that_cannot_be_used_are_refused(line: str, complaint: str, tmp_path: Path) -> None:
    yolo(tmp_path, line=line)
    with pytest.raises(DataError, match=complaint):
        list_boxes(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "names:\n  1: dog  # woof\n  0: cat\n",
        "names: {1: dog, 0: cat}\n",
        "names: [cat, dog]  # two\n",
        'names:\n- "cat"  # the first\n- dog\n',
        "nc: 2\nnames:\n    - cat\n\n    # the second\n    - 'dog'\n",
        "names: ['cat',\n  'dog']\n",
    ],
)
@pytest.mark.parametrize("name", ["data.yaml", "data.yml"])
def test_names_are_read_as_yaml_is(text: str, name: str, tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "a.yaml").write_text("train: elsewhere\n")
    (tmp_path / name).write_text(text)
    assert list_boxes(tmp_path).classes == ("cat", "dog")


def test_names_are_texts_as_they_are_written(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [no, 'cat, small', \"it's # 1\", 007, ~]\n")
    assert list_boxes(tmp_path).classes == ("no", "cat, small", "it's # 1", "007", "~")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("names: {0: cat, 2: dog}", r"data\.yaml: names: has no index 1, but 2 names"),
        ("names: {0: cat, 0: dog}", r"names: has no index 1, but 2 names"),
        ("names: {cat: 0, dog: 1}", r"names: has no index 0"),
        ("names: {0: cat, [1]: dog}", r"names: has no index 1"),
        ("names: other.names", "names: must be a list of names"),
        ("names: [[cat], dog]", "names: must be a list of names"),
        ("names: [cat, cat]", "must name its classes, each once and on one line, got cat, cat"),
        ("names: []", "does not name its classes"),
        ("names: [", r"data\.yaml: cannot be read as YAML"),
        ("[" * 100_000, r"data\.yaml: cannot be read as YAML"),
        ("train: images", "does not name its classes: write them into classes.txt"),
        ("", "does not name its classes"),
    ],
)
def test_names_that_cannot_be_used_are_refused(text: str, complaint: str, tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=complaint):
        list_boxes(tmp_path)


def test_files_that_name_other_classes_are_refused(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "more.yaml").write_text("names: [dog, cat]\n")
    with pytest.raises(DataError, match=r"data\.yaml and more\.yaml name other classes: remove the one that is wrong"):
        list_boxes(tmp_path)


def test_yaml_needs_a_package_and_classes_txt_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yolo(tmp_path)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(DataError, match=r"data\.yaml: reading YAML needs PyYAML: pip install pyyaml"):
        list_boxes(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert list_boxes(tmp_path).classes == ("cat", "dog")


def test_two_folders_of_a_split_are_refused(tmp_path: Path) -> None:
    yolo(tmp_path)
    image(tmp_path / "images/valid/e.png")
    (tmp_path / "labels/valid").mkdir()
    with pytest.raises(DataError, match=r"has 2 val splits \(images/val, images/valid\): keep one"):
        list_boxes(tmp_path)


def test_two_images_of_the_same_labels_are_refused(tmp_path: Path) -> None:
    yolo(tmp_path)
    image(tmp_path / "images/train/a.jpg")
    with pytest.raises(DataError, match=r"images/train/a\.jpg and images/train/a\.png have the same labels"):
        list_boxes(tmp_path)
