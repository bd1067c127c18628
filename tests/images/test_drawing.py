"""Masks and boxes on images: what is painted, and what stays as it was."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.images.drawing import COLOURS, OPAQUE, with_boxes, with_legend, with_mask
from export.images.preprocess import IGNORED, Letterbox, Look, Preprocess
from export.predict import draw
from export.tasks.segmentation import SEGMENTATION


def test_a_mask_of_another_size_tints_its_classes_and_leaves_what_is_ignored() -> None:
    image = np.full((4, 6, 3), 100, np.uint8)
    mask = np.array([[0, 2, IGNORED]], np.uint8)
    drawn = with_mask(image, mask)
    for column, label in ((0, 0), (2, 2)):
        assert np.allclose(drawn[:, column], (1 - OPAQUE) * 100 + OPAQUE * COLOURS[label].astype(float), atol=0.5)
    assert np.array_equal(drawn[:, 4:], image[:, 4:])


def test_boxes_keep_their_colours_beyond_the_last_one_and_the_image_its_inside() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    boxes = np.array([[0.25, 0.5, 0.75, 0.9], [0.5, 0.3, 0.4, 0.3]])  # the second is inside out, and is no crash
    drawn = with_boxes(image, boxes, [len(COLOURS), 0], ["", ""])
    assert drawn[45, 16].tolist() == COLOURS[1].tolist()
    assert not drawn[40:50, 20:46].any()
    assert not image.any()


def network(size: tuple[int, int], letterbox: Letterbox, *, stretch: bool) -> Preprocess:
    return Preprocess(size, size, (0.5,) * 3, (0.2,) * 3, stretch=stretch, look=Look(letterbox=letterbox))


@pytest.mark.parametrize(
    ("size", "letterbox", "stretch", "hidden"),
    [
        ((16, 24), "none", True, 0),
        ((16, 16), "none", False, 4),  # of 12 columns, two on each side
        ((24, 24), "centre", False, 0),
        ((24, 24), "corner", False, 0),
    ],
)
def test_a_mask_comes_back_to_where_the_network_saw_it(
    size: tuple[int, int], letterbox: Letterbox, stretch: bool, hidden: int
) -> None:
    preprocess = network(size, letterbox, stretch=stretch)
    truth = np.random.default_rng(0).integers(0, 5, (8, 12), np.uint8)
    found = preprocess.whole_mask(preprocess.mask(Image.fromarray(truth)), (8, 12))
    assert (found == IGNORED).sum() == 8 * hidden
    assert np.array_equal(found[found != IGNORED], truth[found != IGNORED])
    assert not hidden or (found[:, :2] == IGNORED).all()


def test_a_mask_is_drawn_on_the_whole_photograph_above_a_legend(tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), (100, 100, 100)).save(tmp_path / "a.png")
    preprocess = network((16, 16), "none", stretch=False)
    assert SEGMENTATION.of_whole is not None
    task = SEGMENTATION.of_whole(SEGMENTATION, preprocess, (60, 90))
    logits = np.eye(3)[np.repeat([[0], [2]], 8, 0).repeat(16, 1)].transpose(2, 0, 1)  # class 0 above class 2
    draw(logits, task, ["a", "b", "c"], preprocess, tmp_path / "a.png", tmp_path / "out")
    drawn = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert drawn.shape[1] == 90
    assert (drawn[:60, :15] == 100).all()
    assert (drawn[:60, 75:] == 100).all()
    assert np.abs(drawn[50, 45] - ((1 - OPAQUE) * 100 + OPAQUE * COLOURS[2])).max() < 1
    named = drawn[60:].reshape(-1, 3).tolist()
    assert [COLOURS[label].tolist() in named for label in range(3)] == [True, False, True]


def test_a_legend_has_a_line_more_where_names_are_long() -> None:
    image = np.zeros((20, 60, 3), np.uint8)
    lines = [len(with_legend(image, range(count), ["pavement", "bicyclist", "motorway"])) for count in (1, 2, 3)]
    assert lines[0] < lines[1] < lines[2]
