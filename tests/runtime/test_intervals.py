"""Intervals of agreements and scores, against simulated sets of images."""

import numpy as np
import pytest

from export.runtime.accuracy import Score
from export.runtime.intervals import clopper_pearson, mean_interval, score_interval
from export.tasks.segmentation import SEGMENTATION
from export.tasks.task import Array


@pytest.mark.parametrize("agreement", [0.9975, 0.9995, 0.9999])
def test_pixels_that_agree_are_not_counted_as_images(agreement: float) -> None:
    random = np.random.default_rng(0)
    values = 1 - 2 * (1 - agreement) * random.random(78)
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert high - low < 1 - agreement < clopper_pearson(78, 78)[1] - clopper_pearson(78, 78)[0]


@pytest.mark.parametrize(("same", "images"), [(78, 78), (0, 5), (70, 78), (1, 400)])
def test_of_counted_images_the_interval_is_exact(same: int, images: int) -> None:
    values = (np.arange(images) < same).astype(float)
    assert mean_interval(values) == clopper_pearson(same, images)
    if 0 < same < images:  # nearly counts: the bound by resampling goes over into the exact one
        assert mean_interval(np.clip(values, 1e-9, 1)) == pytest.approx(clopper_pearson(same, images), abs=4e-3)


def detections_shared(random: np.random.Generator, images: int) -> Array:
    objects = 1 + random.poisson(5, images)
    return np.asarray(random.binomial(objects, 0.95) / objects)


@pytest.mark.parametrize("kind", ["pixels", "detections"])
def test_the_interval_of_an_agreement_has_the_truth_as_often_as_it_claims(kind: str) -> None:
    random = np.random.default_rng(0)
    truth = 1 - 0.5 / 60.5 if kind == "pixels" else 0.95
    found = []
    for _ in range(150):
        values = 1 - random.beta(0.5, 60, 78) if kind == "pixels" else detections_shared(random, 78)
        low, high = mean_interval(values)
        found.append(low <= truth <= high)
    assert 0.91 <= np.mean(found) <= 0.99


def masks(random: np.random.Generator, images: int) -> Array:
    """Return confusion matrices of two classes: each image is segmented as well as its own luck has it."""
    rows = np.zeros((images, 4), np.int64)
    for row in rows:
        pixels = random.multinomial(1000, random.dirichlet([0.5, 0.5]))
        right = random.binomial(pixels, random.beta(8, 2))
        row[:] = right[0], pixels[0] - right[0], pixels[1] - right[1], right[1]
    return rows


def test_the_interval_of_a_mean_iou_has_the_truth_as_often_as_it_claims() -> None:
    random = np.random.default_rng(0)
    everything = masks(random, 5000)
    truth, found = SEGMENTATION.total(everything), []
    for _ in range(150):
        rows = everything[random.integers(0, 5000, 80)]
        low, high = Score(SEGMENTATION, rows, rows).score_ci95
        found.append(low <= truth <= high)
    assert 0.9 <= np.mean(found) <= 0.99


def test_a_score_that_does_not_vary_has_the_interval_of_a_count() -> None:
    assert score_interval(1.0, np.ones(10), 78) == clopper_pearson(78, 78)
    assert score_interval(0.0, np.zeros(10), 78) == clopper_pearson(0, 78)
