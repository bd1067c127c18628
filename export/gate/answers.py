"""A file's answer to each labelled image, kept by the image's digest so that another file's answers can be paired with them later."""

from dataclasses import dataclass, field
from pathlib import Path

from export.bundle.read import Bundle
from export.runtime.accuracy import score


@dataclass(frozen=True)
class Answers:
    """For each image, by digest, the names of its class and of the class that was answered; `notes` on the images are not kept."""

    classes: tuple[str, ...]
    rows: dict[str, tuple[str, str]]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def top1(self) -> float:
        """The fraction of images that were answered right."""
        return sum(label == answer for label, answer in self.rows.values()) / len(self.rows)

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return labels and predictions by digest, as positions in the list of classes."""
        place = {name: index for index, name in enumerate(self.classes)}
        return {
            "labels": {digest: place[label] for digest, (label, _) in self.rows.items()},
            "predictions": {digest: place[answer] for digest, (_, answer) in self.rows.items()},
        }


def answers_from_json(classes: tuple[str, ...], document: dict[str, dict[str, int]]) -> Answers:
    """Read what `to_json` wrote."""
    labels, predictions = document["labels"], document["predictions"]
    return Answers(
        classes, {digest: (classes[labels[digest]], classes[answer]) for digest, answer in predictions.items()}
    )


def ask(bundle: Bundle, file: str, data: Path) -> Answers:
    """Run one file of the bundle on every image of `data`; an image that lies there twice counts once.

    Raises BundleError for data that do not fit the bundle.
    """
    examples = bundle.examples(data)
    found = score({file: bundle.files[file]}, examples.batches())[file]
    rows: dict[str, tuple[str, str]] = {}
    for digest, label, answer in zip(examples.digests(), found.labels, found.predictions, strict=True):
        rows.setdefault(digest, (bundle.labels[label], bundle.labels[answer]))
    return Answers(bundle.labels, rows, examples.notes)
