"""COCO's JSON: categories by name, the files of a split, and what is wrong with it, one sentence each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn import coco, image

from export.errors import DataError
from export.images.annotations import list_boxes
from export.images.box_listing import BoxListing

Change = Callable[[dict[str, Any]], None]


def numbered(document: dict[str, Any], ids: dict[object, object]) -> None:
    """Give the categories other ids."""
    for entry in document["categories"]:
        entry["id"] = ids.get(entry["id"], entry["id"])
    for entry in document["annotations"]:
        entry["category_id"] = ids.get(entry["category_id"], entry["category_id"])


def labels(found: BoxListing) -> dict[str, list[str]]:
    return {path: [found.classes[int(row[0])] for row in boxes] for path, boxes in found.boxes.items()}


def rewrite(root: Path, split: str, change: Change) -> None:
    file = root / "annotations" / f"instances_{split}.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.update(images=[]), "images: is empty"),
        (lambda d: d.pop("categories"), "categories: must be a list of objects"),
        (lambda d: d["annotations"][0].update(bbox=[8, 6, float("nan"), 3]), "has values that are not finite"),
        (lambda d: d["annotations"][0].update(bbox=[70, 6, 30, 30]), r"\(70, 6, 100, 36\) leaves the image of 80 x 60"),
        (lambda d: d["annotations"][0].update(bbox=[8, 6]), "needs bbox as four numbers"),
        (lambda d: d["annotations"][0].update(bbox=[8, 6, -3, 5]), r"\(8, 6, 5, 11\) has a negative width or height"),
        (lambda d: d["annotations"][0].update(bbox=[8, 6, 10**400, 5]), "has values that are not finite"),
        (
            lambda d: d["images"][0].update(width=10**400),
            "annotation 0: its image 0 needs a width and a height above 0",
        ),
        (lambda d: d["images"][0].update(width=float("nan")), "its image 0 needs a width and a height above 0"),
        (lambda d: d["annotations"][0].update(iscrowd="0"), "iscrowd: must be 0 or 1, got '0'"),
        (lambda d: d["annotations"][0].update(image_id=1), "image_id: no entry has the id 1"),
        (lambda d: d["annotations"][0].update(image_id=[1]), r"image_id: must be a number or a text, got \[1\]"),
        (lambda d: d["annotations"][0].update(category_id=5), "category_id: no entry has the id 5"),
        (lambda d: d["annotations"][0].update(category_id="17"), "category_id: no entry has the id '17'"),
        (lambda d: d["annotations"][0].update(category_id=[17]), "category_id: must be a number or a text"),
        (lambda d: d["categories"][0].update(id=[1]), r"categories: id: must be a number or a text, got \[1\]"),
        (lambda d: d["categories"][0].update(id=float("inf")), "categories: id: must be a number or a text, got inf"),
        (lambda d: d["categories"][0].update(name=None), "categories: the id 90 needs a name, got None"),
        (lambda d: d["categories"][0].update(id=17), "categories: the id 17 is dog and cat: give each its own"),
        (lambda d: d["categories"][0].update(name="cat"), "categories: 17 and 90 are both called cat"),
        (lambda d: d["images"][1].update(id=0), "images: 'a.png' and 'b.png' have the same id 0"),
        (lambda d: d["images"][1].update(file_name="./a.png"), r"lists the image train/a.png twice \(train, train"),
        (lambda d: d["images"][0].update(file_name="gone.png"), "names the image 'gone.png', which does not exist"),
        (lambda d: d["images"][0].update(file_name="a" * 5000), "names the image 'aaa.*, which does not exist"),
        (lambda d: d["images"][0].update(file_name="\ud800\0"), "names the image .*, which does not exist"),
        (lambda d: d["images"][0].update(file_name="../../../etc/hostname"), "which does not exist"),
        (lambda d: d.update(annotations=[]), "none of its 2 training images has a box"),
        (lambda d: d["categories"].pop(0), "category_id: no entry has the id 90"),
    ],
)
def test_coco_files_that_cannot_be_used_are_refused(change: Change, complaint: str, tmp_path: Path) -> None:
    coco(tmp_path, change=change)
    with pytest.raises(DataError, match=complaint):
        list_boxes(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, '{"images": 1e400', "", "[]"])
def test_files_that_are_not_cocos_are_refused(content: str, tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").write_text(content)
    with pytest.raises(DataError, match=r"instances_train\.json: (cannot be read as JSON|must be COCO's object)"):
        list_boxes(tmp_path)


@pytest.mark.parametrize(
    "ids", [{17: 90, 90: 17}, {17: "c", 90: "d", 3: "u"}, {17: "90", 90: 17, 3: 2.5}], ids=["swapped", "texts", "mixed"]
)
def test_categories_match_by_name_across_files(ids: dict[object, object], tmp_path: Path) -> None:
    coco(tmp_path)
    before = list_boxes(tmp_path)
    for split in ("train", "val"):
        rewrite(tmp_path, split, lambda document: numbered(document, ids))
        found = list_boxes(tmp_path)
        assert labels(found) == labels(before)
        assert {*found.classes} == {"cat", "dog"}


def test_a_class_that_training_does_not_name_is_refused(tmp_path: Path) -> None:
    coco(tmp_path)
    rewrite(tmp_path, "val", lambda document: document["categories"][1].update(name="Cat"))
    with pytest.raises(DataError, match=r"instances_val\.json: has boxes of Cat, a category that .*train\.json lacks"):
        list_boxes(tmp_path)


def test_the_name_of_the_root_says_nothing_of_the_split(tmp_path: Path) -> None:
    root = tmp_path / "my_train"
    root.mkdir()
    coco(root)
    before = list_boxes(root)
    (root / "notes.json").write_text("[]")
    found = list_boxes(root)
    assert (found.train, found.val) == (before.train, before.val)
    assert found.notes == (
        f"{root}: boxes are read from annotations/instances_train.json, annotations/instances_val.json, not from notes.json",
    )


def test_of_two_files_without_a_split_none_is_chosen(tmp_path: Path) -> None:
    coco(tmp_path)
    for split, name in (("train", "first"), ("val", "second")):
        (tmp_path / f"annotations/instances_{split}.json").rename(tmp_path / f"annotations/{name}.json")
        (tmp_path / split).rename(tmp_path / name)
    with pytest.raises(DataError, match=r"2 of annotations/first\.json, annotations/second\.json have boxes: keep one"):
        list_boxes(tmp_path)


def test_the_files_beside_cocos_instances_are_left_aside(tmp_path: Path) -> None:
    coco(tmp_path)
    before = list_boxes(tmp_path)
    for split in ("train", "val"):
        content = json.loads((tmp_path / f"annotations/instances_{split}.json").read_text())
        (tmp_path / f"annotations/person_keypoints_{split}.json").write_text(json.dumps(content | {"annotations": []}))
        del content["categories"]
        (tmp_path / f"annotations/captions_{split}.json").write_text(json.dumps(content))
    found = list_boxes(tmp_path)
    assert (found.train, found.val, found.classes) == (before.train, before.val, before.classes)
    assert "not from annotations/captions_train.json, annotations/captions_val.json" in found.notes[0]
    for split in ("train", "val"):
        (tmp_path / f"annotations/instances_{split}.json").rename(tmp_path / f"annotations/boxes_{split}.json")
        (tmp_path / f"annotations/captions_{split}.json").write_text("[]")
    assert [path for path, _ in list_boxes(tmp_path).train] == [path for path, _ in before.train]


def test_names_may_be_absolute_within_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco(tmp_path)
    rewrite(tmp_path, "train", lambda d: d["images"][0].update(file_name=str(tmp_path / "train/a.png")))
    monkeypatch.chdir(tmp_path.parent)
    assert [path for path, _ in list_boxes(Path(tmp_path.name)).train] == ["train/a.png", "train/b.png"]


def test_an_image_of_both_splits_is_refused(tmp_path: Path) -> None:
    coco(tmp_path)
    image(tmp_path / "a.png")
    for split in ("train", "val"):
        rewrite(tmp_path, split, lambda document: document["images"][0].update(file_name="images/a.png"))
    image(tmp_path / "images/a.png")
    with pytest.raises(DataError, match=r"lists the image images/a.png twice \(train, val"):
        list_boxes(tmp_path)
