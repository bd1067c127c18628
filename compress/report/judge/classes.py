"""The files' predictions class by class, and reasons to doubt a verdict on them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from compress.report.numbers import loss, percent, significant
from export.errors import first
from export.onnx_file.roles import TEACHER
from export.runtime.intervals import clopper_pearson
from export.tasks.paired import MAX_CHANCE, chance
from export.tasks.task import Classes

NOTABLE = 0.05  # a class is lost if a file as good as the teacher would miss all of its images with a lower probability
NAMED = 3  # classes that a sentence lists by name


class ClassLine(NamedTuple):
    """One class: its images, and how many of them the teacher and the deployed file predict right."""

    name: str
    images: int
    teacher: int
    student: int

    @property
    def drop(self) -> float:
        """The teacher's recall minus the deployed file's."""
        return (self.teacher - self.student) / self.images


def worst_first(classes: Classes, file: str) -> list[ClassLine]:
    """Return the classes that have images, the largest drop of recall from the teacher to the file first."""
    teacher, student = (classes["files"][name]["correct"] for name in (TEACHER, file))
    lines = map(ClassLine, classes["names"], classes["images"], teacher, student)
    return sorted((line for line in lines if line.images), key=lambda line: (-line.drop, line.student / line.images))


def at_chance(classes: Classes, files: Iterable[str]) -> dict[str, str]:
    """Return a sentence for each file that predicts no better than chance; files that were not scored are left out.

    So are files that predict any number of objects, as the number of boxes that are right by chance cannot be computed.
    """
    found: dict[str, str] = {}
    for name in [name for name in files if name in classes["files"]]:
        if classes.get("any_number") and "by_chance" not in classes["files"][name]:
            continue
        expected, probability = chance(classes["images"], classes["files"][name])
        if probability > MAX_CHANCE:
            repair = (
                "check its weights, the order of its classes, data.mean and data.std, or train it longer"
                if name == TEACHER
                else "the stages' scores tell where the accuracy was lost"
            )
            found[name] = (
                f"{name} predicts at chance: {_beside(expected, classes, name)} by guessing (p = {significant(probability, digits=2)}); {repair}"
            )
    return found


def _beside(expected: float, classes: Classes, name: str) -> str:
    """Return what a file scores, and what it is expected to score by chance."""
    found = classes["files"][name]
    if "by_chance" in found:
        scores = [score for score in found["scores"] if score is not None]
        return f"its mean {classes['measure']} is {percent(sum(scores) / max(len(scores), 1))}, and would be {percent(expected)}"
    right, counted = sum(found["correct"]), classes.get("counted", "images")
    return f"{right:,} of {sum(classes['images']):,} validation {counted} are right, {expected:,.0f} would be"


def doubts(classes: Classes, file: str, targets: Mapping[str, float | None]) -> Iterator[str]:
    """Yield a sentence for each reason to doubt the deployed file's numbers."""
    names, images, lines = classes["names"], classes["images"], worst_first(classes, file)
    total, largest = sum(images), max(range(len(images)), key=images.__getitem__)
    right, knows = sum(classes["files"][TEACHER]["correct"]), not at_chance(classes, [TEACHER])
    counted, one_each = classes.get("counted", "images"), not classes.get("any_number")
    if one_each and knows and clopper_pearson(right, total)[0] <= images[largest] / total:
        yield (
            f'{TEACHER} is right on {percent(right / total)} of {total:,} validation {counted}, always predicting "{names[largest]}" '
            f"on {percent(images[largest] / total)}: the score says little here, see balanced accuracy and set targets.max_class_drop"
        )
    for name, found in classes["files"].items():
        if one_each and max(found["answered"]) == total:
            yield f'{name} predicts "{names[found["answered"].index(total)]}" for all {total:,} validation {counted}'
    lost = [
        f'"{line.name}" (0 of {line.images:,}, the teacher {line.teacher:,})'
        for line in lines
        if line.student == 0 < line.teacher and (1 - line.teacher / line.images) ** line.images < NOTABLE
    ]
    if knows and lost:
        yield f"{file} never predicts {_count(lost)} right that the teacher does: {first(lost, NAMED)}"
    missing = [f'"{name}"' for name, count in zip(names, images, strict=True) if not count]
    if missing:
        yield f"{_count(missing)} without a validation image, so without a score: {first(missing, NAMED)}"
    smallest = min(lines, key=lambda line: line.images)
    for target, count, where in (
        ("max_drop", total if one_each else math.inf, ""),
        ("max_class_drop", smallest.images, f' of class "{smallest.name}"'),
    ):
        wanted = targets[target]
        if wanted is not None and 1 / count > wanted:
            yield (
                f"targets.{target}: one of the {count:,} validation {counted}{where} is worth {loss(1 / count)}, more than the allowed "
                f"{loss(wanted)}: a single one decides"
            )


def _count(found: list[str]) -> str:
    return f"{len(found):,} {'class' if len(found) == 1 else 'classes'}"
