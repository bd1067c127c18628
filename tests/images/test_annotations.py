"""The same boxes in three formats, and what is wrong with boxes, one sentence each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import DRAWN, HEIGHT, WIDTH, coco, image, voc, yolo

from export.errors import DataError
from export.images.annotations import list_boxes
from export.images.box_listing import BoxListing


@pytest.mark.parametrize("write", [coco, yolo, voc])
def test_the_same_boxes_are_read_from_each_format(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    found = list_boxes(tmp_path)
    assert found.classes == ("cat", "dog")
    assert found.val is not None
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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.update(images=[]), "images: is empty"),
        (lambda d: d.pop("categories"), "categories: must be a list of objects"),
        (lambda d: d["annotations"][0].update(bbox=[8, 6, float("nan"), 3]), "has values that are not finite"),
        (lambda d: d["annotations"][0].update(bbox=[70, 6, 30, 30]), r"\(70, 6, 100, 36\) leaves the image of 80 x 60"),
        (lambda d: d["annotations"][0].update(bbox=[8, 6]), "needs bbox as four numbers"),
        (lambda d: d["annotations"][0].update(image_id=1), "image_id: no entry has the id 1"),
        (lambda d: d["annotations"][0].update(category_id=5), "category_id: no entry has the id 5"),
        (lambda d: d["images"][0].update(file_name="gone.png"), "names the image 'gone.png', which does not exist"),
        (lambda d: d["images"][0].update(file_name="../../../etc/hostname"), "which does not exist"),
        (lambda d: d.update(annotations=[]), "none of its 2 training images has a box"),
    ],
)
def test_coco_files_that_cannot_be_used_are_refused(
    change: Callable[[dict[str, Any]], None], complaint: str, tmp_path: Path
) -> None:
    coco(tmp_path, change=change)
    with pytest.raises(DataError, match=complaint):
        list_boxes(tmp_path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("0 0.5 0.5 0.2", r"line 1: must be `class x y width height`, got 4 numbers"),
        ("cat 0.5 0.5 0.2 0.2", r"must be `class x y width height`, got 'cat"),
        ("2 0.5 0.5 0.2 0.2", r"names the class 2, but there are 2 \(0 to 1\)"),
        ("0 0.5 0.5 nan 0.2", "has values that are not finite"),
        ("0 0.9 0.5 0.4 0.2", "leaves the image of 1 x 1"),
    ],
)
def test_yolo_lines_that_cannot_be_used_are_refused(line: str, complaint: str, tmp_path: Path) -> None:
    yolo(tmp_path, line=line)
    with pytest.raises(DataError, match=complaint):
        list_boxes(tmp_path)


@pytest.mark.parametrize(
    ("box", "complaint"),
    [
        ("<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>", "object 1: the box .* has values that are not finite"),
        ("<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>400</ymax>", "leaves the image of 80 x 60"),
        ("<xmin>left</xmin>", "cannot be read as Pascal VOC's XML"),
    ],
)
def test_voc_files_that_cannot_be_used_are_refused(box: str, complaint: str, tmp_path: Path) -> None:
    voc(tmp_path, box=box)
    with pytest.raises(DataError, match=complaint):
        list_boxes(tmp_path)


def test_entities_are_not_expanded(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>')
    with pytest.raises(DataError, match="without entities"):
        list_boxes(tmp_path)


def test_a_box_without_an_area_is_left_out(tmp_path: Path) -> None:
    coco(tmp_path, change=lambda document: document["annotations"][0].update(bbox=[8, 6, 0, 10]))
    found: BoxListing = list_boxes(tmp_path)
    assert len(found.boxes["train/a.png"]) == 1


def test_a_folder_without_boxes_says_what_it_needs(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"has no boxes in a known layout: give COCO's annotations/\*\.json"):
        list_boxes(tmp_path)
