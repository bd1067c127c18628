"""What the gate's trials plant is what they say."""

import re
import time
from collections import Counter

import numpy as np
from trials import BEGIN, CLASSES, DOCUMENT, END, Row, planted, slowed

from export.gate.predictions import Predictions, pair
from export.tasks.classification import CLASSIFICATION


def predictions(right: int, wrong: int) -> Predictions:
    rows: dict[str, tuple[str, tuple[float, ...]]] = {
        f"{index:016x}": (CLASSES[0], (0.0, float(index >= right))) for index in range(right + wrong)
    }
    return Predictions(CLASSIFICATION, CLASSES, rows)


def counts(before: Predictions, now: Predictions) -> tuple[int, int, int]:
    """Return how many predictions were lost, gained and flipped."""
    found = pair(before, now)
    assert found is not None
    lost, gained, flipped = re.findall(r"(\d+) (?:lost|gained|flipped)", found.counts)
    return int(lost), int(gained), int(flipped)


def test_the_planted_loss_is_of_images_that_were_right() -> None:
    before = predictions(900, 100)
    assert counts(before, planted(before, np.random.default_rng(0), loss=0.01, churn=0.0)) == (10, 0, 10)


def test_churn_goes_both_ways_alike() -> None:
    before = predictions(4500, 500)
    pairs = [counts(before, planted(before, np.random.default_rng(seed), loss=0, churn=0.02)) for seed in range(20)]
    lost, gained = sum(found[0] for found in pairs), sum(found[1] for found in pairs)
    assert 900 < lost < 1100
    assert 900 < gained < 1100


def test_a_slowed_session_takes_its_factor() -> None:
    run = slowed(lambda: lambda: time.sleep(0.02), 1.5)()
    start = time.perf_counter()
    run()
    assert time.perf_counter() - start >= 0.03


def test_a_false_alarm_or_a_missed_plant_does_not_hold() -> None:
    assert Row("", None, Counter({"pass": 30, "inconclusive": 1})).holds
    assert not Row("", None, Counter({"pass": 29, "fail": 1})).holds
    assert Row("", 29, Counter({"fail": 29, "pass": 1})).holds
    assert not Row("", 29, Counter({"fail": 28, "pass": 2})).holds


def test_the_document_has_a_place_for_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.index(BEGIN) < text.index(END)
