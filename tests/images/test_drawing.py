"""Masks and boxes on images: what is painted, and what stays as it was."""

import numpy as np

from export.images.drawing import COLOURS, OPAQUE, with_boxes, with_mask
from export.images.preprocess import IGNORED


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
