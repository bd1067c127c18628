"""Names of classes that are too long are refused, wherever they come in."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn import coco, voc, yolo
from photographs import write_classes, write_photo

from compress.models.digest import class_names
from export.errors import DataError
from export.images.annotations import list_boxes
from export.images.folders import list_folder
from export.images.masks import list_masks
from export.images.tables import list_table

LONG = "x" * 201


def folder(root: Path) -> object:
    return list_folder(write_classes(root, classes=("cat", LONG), per_class=1))


def masks(root: Path) -> object:
    for name in ("images", "masks"):
        write_photo(root / name / "0.png")
    (root / "classes.txt").write_text(f"cat\n{LONG}\n")
    return list_masks(root)


def boxes_of_coco(root: Path) -> object:
    def change(document: dict[str, Any]) -> None:
        document["categories"][0]["name"] = LONG

    coco(root, change=change)
    (root / "annotations" / "instances_val.json").unlink()
    return list_boxes(root)


def boxes_of_yolo(root: Path) -> object:
    yolo(root)
    (root / "data.yaml").write_text(f"names: [cat, {LONG}]")
    return list_boxes(root)


def boxes_of_voc(root: Path) -> object:
    voc(root)
    file = root / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("cat", LONG))
    return list_boxes(root)


def table(root: Path) -> object:
    write_photo(root / "0.png")
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "labels"], ["0.png", f"cat;{LONG}"]])
    return list_table(root)


def names(root: Path) -> object:
    (root / "classes.txt").write_text(f"cat\n{LONG}\n")
    return class_names(root / "classes.txt")


@pytest.mark.parametrize("read", [folder, masks, boxes_of_coco, boxes_of_yolo, boxes_of_voc, table, names])
def test_a_class_name_of_more_than_200_characters_is_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the class name 'x{40}' … has 201 characters, at most 200 are allowed: shorten"
    ):
        read(tmp_path)
