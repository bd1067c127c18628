"""What a network is for, wherever it runs: what its outputs mean, how good they are, and how two networks' answers compare.

A score is a fraction from 0 to 1, and more is better; a task whose natural measure is an error scores one minus it. Everything that is known
of an answer is one row of numbers for each image, so that scores add up, files pair image by image, and a baseline keeps them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from numpy.typing import NDArray
from onnx import ModelProto
from typing_extensions import TypedDict  # pydantic reads a report by these; typing's it takes from Python 3.12 on

from export.images.annotations import BoxListing
from export.images.folders import Listing
from export.images.masks import MaskListing
from export.images.preprocess import Preprocess
from export.images.read import Examples
from export.images.tables import TableListing

Array = NDArray[Any]
Shown = tuple[Sequence[str], Sequence[Sequence[str | float | None]]]
"""Columns, and lines of cells."""


@dataclass(frozen=True)
class Metric:
    """What a score is called: in files, and by readers."""

    name: str  # top1
    title: str  # top-1
    alike: str = "images that both answer alike"  # whose fraction is the agreement of two files
    counts_images: bool = True  # the score is the fraction of images that are right


@dataclass(frozen=True)
class Comparison:
    """Two files on the same images; scores before and now."""

    images: int
    before: float
    now: float
    p_value: float  # how likely files that are equally good differ by this much or more
    changed: float  # the fraction of images that are answered in another way
    detectable: float  # the smallest loss of score that this many images show in four of five cases
    counts: str  # the evidence, in words
    lost: tuple[str, ...] = ()  # parts of the set (classes) that lost for sure, which the whole may hide
    worse: tuple[str, ...] = ()  # parts that lost, be it by chance, the worst first


class FileClasses(TypedDict):
    """One file's right answers and all its answers, by class; mistakes are rows of (class, answered class, images)."""

    correct: list[int]
    answered: list[int]
    mistakes: list[tuple[int, int, int]] | None
    scores: NotRequired[list[float | None]]  # each class's own, where the whole set's is their mean
    by_chance: NotRequired[
        tuple[float, float]
    ]  # the score of one that ignores the images, and how likely it is this good, where counts do not tell


class Classes(TypedDict):
    """How many images each class has, and what every file answers; the mistakes are kept for a few files."""

    names: list[str]
    images: list[int]
    files: dict[str, FileClasses]
    measure: NotRequired[str]  # what those scores are: IoU, AP
    counted: NotRequired[str]  # what has a class, where that is not the image: pixels, objects
    any_number: NotRequired[
        bool
    ]  # a file gives as many predictions as it likes, so that none can be expected by chance


@dataclass(frozen=True)
class OutputTask:
    """One task; arrays have one row for each image."""

    name: str
    metric: Metric
    output_shape: Callable[[int, int], tuple[int | None, ...]]
    """(classes, image size) to the shape of one image's output; None where the network decides."""
    check_output: Callable[[str, tuple[int | None, ...], Sequence[str]], None]
    """(file, shape of its output, labels): raises BundleError where they do not fit."""
    truths: Callable[[Sequence[Any], tuple[int, ...]], Array]
    """The truths that JSON holds, given the shape of one image's output; raises BundleError for what is none."""
    truths_json: Callable[[Array], Sequence[Any]]
    """Truths as JSON holds them, one value for each image."""
    listing: Callable[[Path], Listing | MaskListing | BoxListing | TableListing]
    """The files of a folder with images and their truths; raises DataError where that is none."""
    examples: Callable[[Path, Preprocess, Sequence[str]], Examples]
    """The images of a folder or file with their truths; raises DataError where they do not fit the labels."""
    decode: Callable[[Array], Array]
    """Outputs to answers."""
    finish: Callable[[ModelProto], ModelProto]
    """A model to one that decodes inside its graph, for callers without this package."""
    statistics: Callable[[Array, Array, tuple[int, ...]], Array]
    """(answers, truths, shape of one image's output) to rows (n, k)."""
    total: Callable[[Array], float]
    """Rows (n, k), n > 0, to the score."""
    further: Callable[[Array], Mapping[str, float | None]]
    """Rows to what else is reported of them, by name."""
    by_class: Callable[[Mapping[str, Array], Sequence[str], Collection[str]], Classes | None]
    """(rows by file, labels, files whose mistakes are kept) to what is known class by class; None where there are no classes."""
    agreement: Callable[[Array, Array], Array]
    """Two files' answers to (n,) in [0, 1]."""
    evidence: Callable[[Array], Array]
    """Outputs to what is kept of them for `divergence`, little enough for thousands of images."""
    divergence: Callable[[Array, Array], Array]
    """(evidence, evidence of a reference) to (n,): how far they are apart, 0 for equal ones; needs no truths."""
    compare: Callable[[Array, Array, Sequence[str]], Comparison]
    """(rows before, rows now, labels), n > 0."""
    truth_text: Callable[[Array, Sequence[str]], str]
    """One row's truth in words, by which a baseline knows that an image's truth is what it was."""
    show: Callable[[Array, Sequence[str], int], Shown]
    """One image's output, the labels and how many lines at most, to columns and lines for a person."""
    exclusive: bool = True
    """Whether one class of all is right, so that a softmax makes probabilities of logits; else each class stands alone, under a sigmoid."""
    labelled: bool = True
    """Whether the truths are people's; else they are the teacher's predictions."""
    draw: Callable[[Array, Array, Sequence[str]], Array] | None = None
    """(an image uint8 (height, width, 3), its answer, labels) to the image with the answer drawn on it; None where that shows nothing."""
    draw_truth: Callable[[Array, Array, Sequence[str]], Array] | None = None
    """The same of its truth."""
    meaning: str = "a logit for each line of `labels.txt`"
    """What one image's output is, for a model card."""
    reading: str = "print([labels[index] for index in outputs.argmax(axis=1)])"
    """Lines of Python that make an answer of `outputs` and `labels`."""
