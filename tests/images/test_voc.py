"""Pascal VOC's XML: names with spaces, and what is wrong with it, one sentence each."""

from pathlib import Path

import pytest
from drawn import image, voc

from export.errors import DataError
from export.images.annotations import list_boxes


@pytest.mark.parametrize(
    ("box", "complaint"),
    [
        ("<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>", "object 1: the box .* has values that are not finite"),
        ("<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>400</ymax>", "leaves the image of 80 x 60"),
        ("<xmin>9</xmin><ymin>1</ymin><xmax>1</xmax><ymax>4</ymax>", "has a negative width or height"),
        ("<xmin>left</xmin>", "cannot be read as Pascal VOC's XML"),
        ("<xmin>é</xmin>", "cannot be read as Pascal VOC's XML"),
    ],
)
def test_voc_files_that_cannot_be_used_are_refused(box: str, complaint: str, tmp_path: Path) -> None:
    voc(tmp_path, box=box)
    with pytest.raises(DataError, match=complaint):
        list_boxes(tmp_path)


@pytest.mark.parametrize("side", ["nan", "inf", "0", "-80"])
def test_sizes_that_are_none_are_refused(side: str, tmp_path: Path) -> None:
    voc(tmp_path)
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<width>80", f"<width>{side}"))
    with pytest.raises(DataError, match=f"size: must be the image's width and height, got {side} x 60"):
        list_boxes(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_not_expanded(encoding: str, tmp_path: Path) -> None:
    voc(tmp_path)
    content = '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'
    (tmp_path / "Annotations" / "a.xml").write_text(content, encoding=encoding)
    with pytest.raises(DataError, match="without entities"):
        list_boxes(tmp_path)


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text('<?xml version="1.0" encoding="nothing"?><annotation/>')
    with pytest.raises(DataError, match="cannot be read as Pascal VOC's XML"):
        list_boxes(tmp_path)


def test_a_declared_encoding_is_used(tmp_path: Path) -> None:
    voc(tmp_path)
    file = tmp_path / "Annotations" / "a.xml"
    text = '<?xml version="1.0" encoding="ISO-8859-1"?>' + file.read_text().replace("cat", "café")
    file.write_bytes(text.encode("latin-1"))
    assert list_boxes(tmp_path).classes == ("café", "cat", "dog")


@pytest.mark.parametrize("mark", ["", " 1", "  -1", " 0", "\t1"])
def test_names_may_have_spaces(mark: str, tmp_path: Path) -> None:
    voc(tmp_path)
    for old, new in (("a", "a photo 2"), ("b", "b 1")):
        (tmp_path / f"Annotations/{old}.xml").rename(tmp_path / f"Annotations/{new}.xml")
        (tmp_path / f"JPEGImages/{old}.png").rename(tmp_path / f"JPEGImages/{new}.png")
    file = tmp_path / "Annotations/a photo 2.xml"
    file.write_text(file.read_text().replace("cat", "traffic light"))
    (tmp_path / "ImageSets/Main/train.txt").write_text(f"a photo 2{mark}\nb 1{mark}\n")
    found = list_boxes(tmp_path)
    assert [path for path, _ in found.train] == ["JPEGImages/a photo 2.png", "JPEGImages/b 1.png"]
    assert found.classes == ("cat", "dog", "traffic light")


@pytest.mark.parametrize("test", [True, False])
def test_trainval_and_test_stand_in_for_train_and_val(tmp_path: Path, test: bool) -> None:
    voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").rename(lists / ("test.txt" if test else "unused.txt"))
    found = list_boxes(tmp_path)
    assert [path for path, _ in found.train] == ["JPEGImages/a.png", "JPEGImages/b.png"]
    assert (
        found.val is None
        if not test
        else [path for path, _ in found.val or ()]
        == [
            "JPEGImages/c.png",
            "JPEGImages/d.png",
        ]
    )
    assert found.notes == (
        f"{tmp_path}: has no lists of train and val: trainval is used for training{', test for validation' if test else ''}",
    )


def test_two_images_of_the_same_file_are_refused(tmp_path: Path) -> None:
    voc(tmp_path)
    image(tmp_path / "JPEGImages/a.jpg")
    with pytest.raises(DataError, match=r"JPEGImages: a\.jpg and a\.png have the same boxes: rename or remove one"):
        list_boxes(tmp_path)


def test_a_name_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\na\n")
    with pytest.raises(
        DataError, match=r"lists the image JPEGImages/a\.png twice \(train, train; Annotations/a\.xml\)"
    ):
        list_boxes(tmp_path)
