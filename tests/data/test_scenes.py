"""Scenes of digits: the same by seed, their masks and boxes true to them."""

import numpy as np
import pytest
from drawn import few_scenes

from compress.data.scenes import draw_scenes, scene
from export.images.preprocess import IGNORED


def test_scenes_come_again_by_their_seed_and_number() -> None:
    few = few_scenes("scenes", train=4, val=2)
    first, again, other = (draw_scenes(few, "train", size=32, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.masks, again.masks)
    assert not np.array_equal(first.masks, other.masks)
    assert np.array_equal(first.images[3], scene(few, "train", size=32, seed=(3, 0, 3)).image)
    assert len(draw_scenes(few, "val", size=32, seed=3).images) == 2


@pytest.mark.parametrize("name", ["scenes", "scenes_plain", "scenes_hard"])
def test_every_box_holds_its_digit_and_nothing_is_drawn_outside_of_boxes(name: str) -> None:
    for number in range(20):
        image, mask, boxes = scene(few_scenes(name), "val", size=64, seed=(0, 1, number))
        assert (image.shape, mask.shape) == ((64, 64, 3), (64, 64))
        digit, outside = (mask > 0) & (mask != IGNORED), np.ones_like(mask, bool)
        for left, top, right, bottom, label in boxes.astype(int):
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            inside = mask[top:bottom, left:right]
            assert (inside == label).mean() > 0.1  # what another digit hides is at most a third
            outside[top:bottom, left:right] = False
        assert len(boxes) >= 1
        assert not (digit & outside).any()
