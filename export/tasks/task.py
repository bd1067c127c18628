"""The interface of a task: how outputs are decoded and scored, and how two files' predictions are compared.

A score is a fraction from 0 to 1, and more is better; a task with an error scores one minus the error. All that scoring needs of a
prediction is one row of statistics per image, so that scores add up, files pair image by image, and a baseline can store them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NotRequired

from numpy.typing import NDArray
from onnx import ModelProto
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from export.errors import BundleError
from export.images.preprocess import Preprocess
from export.images.read import Examples
from export.images.size import Size
from export.onnx_file.outputs import Output
from export.tasks.listing import Listing

Array = NDArray[Any]
Shown = tuple[Sequence[str], Sequence[Sequence[str | float | None]]]
"""Columns, and lines of cells."""


@dataclass(frozen=True)
class Metric:
    """The name of a score, in files and for readers."""

    name: str  # top1
    title: str  # top-1
    alike: str = "images that both predict alike"  # the agreement of two files is their fraction
    counts_images: bool = True  # the score is the fraction of images that are right


@dataclass(frozen=True)
class Comparison:
    """Two files compared on the same images, with their scores before and now."""

    images: int
    before: float
    now: float
    p_value: float  # probability that equally good files differ by this much or more
    changed: float  # fraction of images with another prediction
    detectable: float  # the smallest loss that this many images detect in four of five cases
    counts: str  # the evidence, in words
    lost: tuple[str, ...] = ()  # classes with a significant loss, which the total may hide
    worse: tuple[str, ...] = ()  # classes that lost, maybe by chance, the worst first


class FileClasses(TypedDict):
    """One file's right predictions and all its predictions, by class; mistakes are rows of (class, predicted class, images)."""

    correct: list[int]
    answered: list[int]
    mistakes: list[tuple[int, int, int]] | None
    scores: NotRequired[list[float | None]]  # each class's score, if the total is their mean
    by_chance: NotRequired[tuple[float, float]]  # expected score without the images, and p-value, if counts cannot tell


class Classes(TypedDict):
    """Each class's number of images, and every file's predictions; mistakes are kept for a few files."""

    names: list[str]
    images: list[int]
    files: dict[str, FileClasses]
    measure: NotRequired[str]  # the name of the classes' scores: IoU, AP
    counted: NotRequired[str]  # what the classes count, if not images: pixels, objects
    any_number: NotRequired[bool]  # a file may predict any number of objects, so chance cannot be computed


@dataclass(frozen=True)
class OutputTask:
    """One task; arrays have one row per image."""

    name: str
    metric: Metric
    output_shape: Callable[[int, Size], tuple[int | None, ...]]
    """(classes, image size) to the shape of one image's output; None for a size that depends on the network."""
    check_output: Callable[[str, tuple[int | None, ...], Sequence[str]], None]
    """(file, shape of its output, labels): raises BundleError if they do not fit."""
    truths: Callable[[Sequence[Any], tuple[int, ...]], Array]
    """(truths as JSON values, shape of one image's output) to truths; raises BundleError for invalid ones."""
    truths_json: Callable[[Array], Sequence[Any]]
    """Truths to JSON values, one per image."""
    listing: Callable[[Path], Listing]
    """A folder to its images and truths; raises DataError if it is not a data set for this task."""
    examples: Callable[[Path, Preprocess, Sequence[str]], Examples]
    """(folder or file, preprocessing, labels) to images with truths; raises DataError if they do not fit the labels."""
    decode: Callable[[Array], Array]
    """Outputs to predictions."""
    statistics: Callable[[Array, Array, tuple[int, ...]], Array]
    """(predictions, truths, shape of one image's output) to rows (n, k)."""
    total: Callable[[Array], float]
    """Rows (n, k), n > 0, to the score."""
    further: Callable[[Array], Mapping[str, float | None]]
    """Rows to further metrics by name, fractions."""
    by_class: Callable[[Mapping[str, Array], Sequence[str], Collection[str]], Classes | None]
    """(rows by file, labels, files whose mistakes are kept) to results by class; None if there are no classes."""
    agreement: Callable[[Array, Array], Array]
    """Two files' predictions to their agreement (n,) in [0, 1]."""
    divergence: Callable[[Array, Array], Array]
    """(evidence, a reference's evidence) to their divergence (n,), 0 if equal; needs no truths."""
    compare: Callable[[Array, Array, Sequence[str]], Comparison]
    """(rows before, rows now, labels), n > 0, to their comparison."""
    truth_text: Callable[[Array, Sequence[str]], str]
    """(one row, labels) to its truth in words, by which a baseline detects a changed truth."""
    show: Callable[[Array, Sequence[str], int], Shown]
    """(one image's output, labels, most lines) to columns and lines to print."""
    together: Callable[[Array, Array, Sequence[str]], Mapping[str, float | None]] | None = None
    """(predictions, the teacher's, each image's folder) to further metrics of all images together; None if every image counts for itself."""
    resampled: Callable[[Array, Array], Array] | None = None
    """(rows, how often each image counts (draws, n)) to the scores (draws, classes) whose mean is the score; None if it is a mean over images."""
    measures: Callable[[Array], Mapping[str, float | None]] = lambda _: {}
    """Rows to metrics in units of their own, by name; more is better."""
    finish: Callable[[ModelProto], ModelProto] = lambda model: model
    """A model to one that decodes inside the graph, for callers without this package."""
    of_whole: Callable[["OutputTask", Preprocess, Size], "OutputTask"] | None = None
    """(task, preprocessing, an image's height and width) to the task whose places are fractions of the image, not of the network's input."""
    evidence: Callable[[Array], Array] = lambda outputs: outputs
    """Outputs to the part to keep for `divergence`, small enough for thousands of images."""
    kept: Callable[[Array], Array] = lambda predictions: predictions
    """Predictions to the part to keep for `agreement` and `together`, small enough for thousands of images."""
    split: Callable[[Array], Sequence[Any]] = list
    """Outputs (n, ...) to what a person's own metric gets of each image: its output, or its outputs by name."""
    exclusive: bool = True
    """Whether exactly one class is right (softmax); otherwise each class is judged alone (sigmoid)."""
    by_class_axis: bool = True
    """Whether an output's first axis is the classes, so that outputs of several networks can be averaged and their classes reordered."""
    labelled: bool = True
    """Whether truths are labels by people; otherwise they are what `taught` makes of the teacher's predictions."""
    taught: Callable[[Array], Array] = itemgetter((slice(None), 0))
    """The teacher's predictions (n, ...) to truths, where nobody labelled the images; by default the likeliest class."""
    has_classes: bool = True
    """Whether an output is a logit for each class; otherwise any values, for whose channels `labels.txt` has names."""
    several: Callable[[Sequence[Output]], "OutputTask"] | None = None
    """Several outputs, packed side by side, to the task for them; None if the task reads one output."""
    draw: Callable[[Array, Array, Sequence[str]], Array] | None = None
    """(image uint8 (height, width, 3), its prediction, labels) to the image with the prediction drawn; None if there is nothing to draw."""
    draw_truth: Callable[[Array, Array, Sequence[str]], Array] | None = None
    """The same for its truth; None if that is not drawn."""
    legend: Callable[[Array], Sequence[int]] | None = None
    """A prediction to the classes whose colours need a legend in a drawing; None if it has none."""
    drawn: Callable[[Array], Mapping[str, Array]] = lambda predictions: {"": predictions}
    """Some files' predictions (files, n, ...), the teacher's first, to what `draw` takes, by output where there are several; empty if there is nothing to draw."""
    worst: Callable[[Array], Array] | None = None
    """Rows to how wrong each image is (n,), where the report draws the worst images; else it draws some."""
    hub: tuple[str, str] = ("image-classification", "accuracy")
    """The names of the task and of its metric on Hugging Face's hub."""
    meaning: str = "a logit for each line of `labels.txt`"
    """One image's output in words, for the model card."""
    reading: str = "print([labels[index] for index in outputs.argmax(axis=1)])"
    """Lines of Python for the model card that turn `outputs` and `labels` into a prediction."""

    def of(self, outputs: Sequence[Output]) -> "OutputTask":
        """Return the task for several outputs, itself for none; BundleError if it reads one output only."""
        if outputs and self.several is None:
            names = ", ".join(one.name for one in outputs)
            raise BundleError(
                f"task {self.name}: reads one output, got {names}: export the one to serve", defect="wrong_shape"
            )
        return self.several(outputs) if outputs and self.several else self
