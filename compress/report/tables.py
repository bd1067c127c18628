"""Tables as plain data, which the page, the terminal and the model card draw: accuracy, the classes, what is taken for what."""

from collections.abc import Sequence
from typing import NamedTuple

from compress.report import summary
from compress.report.classes import worst_first
from compress.report.numbers import UNKNOWN, heading, percent, points
from compress.report.shape import Report
from compress.report.verdict import any_row, judged_classes
from export.onnx_file.roles import TEACHER

MATRIX_CLASSES = 20  # of more, only the most confused pairs are shown
PAIRS = 20


class Table(NamedTuple):
    """Cells in words under their columns; the first `text` columns are no numbers, `note` says what the rest means."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text: int
    note: str


def accuracy(report: Report) -> list[Table]:
    """Return every file's score and what else its task reports."""
    if judged_classes(report) is None:
        return []
    names = sorted({row["name"] for row in report["deployed"]}, key=summary.order)
    found = [row for name in names if (row := any_row(report, name))]
    digits = summary.decimals(report)
    cells = [("File", *(row["name"] for row in found))]
    for title, values in (
        (heading(report["metric"]["title"]), [row["score"] for row in found]),
        *((heading(name), [row.get("further", {}).get(name) for row in found]) for name in found[0].get("further", {})),
    ):
        if set(values) != {None}:
            cells.append((title, *(percent(value, digits) for value in values)))
    columns, *rows = zip(*cells, strict=True)
    note = "Balanced accuracy is the mean recall of the classes: each counts the same, however many images it has."
    return [Table("Accuracy", columns, rows, 1, note)]


def recalls(report: Report) -> list[Table]:
    """Return the recall of teacher and deployed file in each class, the worst loss first, those without images last."""
    judged = judged_classes(report)
    if judged is None:
        return []
    classes, file, digits = *judged, summary.decimals(report)
    rows = [
        (
            line.name,
            f"{line.images:,}",
            percent(line.teacher / line.images, digits),
            percent(line.student / line.images, digits),
            points(-line.drop),
        )
        for line in worst_first(classes, file)
    ]
    pairs = zip(classes["names"], classes["images"], strict=True)
    rows += [(name, "0", UNKNOWN, UNKNOWN, UNKNOWN) for name, images in pairs if not images]
    columns = ("Class", "Images", "Teacher", "Deployed", "Change")
    note = f"Recall: how many of a class's validation images {TEACHER} and {file} answer with it, in ONNX Runtime."
    return [Table("Recall of each class, worst loss first", columns, rows, 1, note)]


def confusion(report: Report) -> list[Table]:
    """Return what the deployed file takes for what: a matrix, or of many classes the most confused pairs."""
    judged = judged_classes(report)
    if judged is None:
        return []
    classes, file = judged
    names, images = classes["names"], classes["images"]
    teacher, own = (
        {(truth, answer): count for truth, answer, count in classes["files"][name]["mistakes"] or ()}
        for name in (TEACHER, file)
    )
    if len(names) > MATRIX_CLASSES:
        most = sorted(own.items(), key=lambda item: (-item[1], item[0]))[:PAIRS]
        rows: list[tuple[str, ...]] = [
            (names[truth], names[answer], f"{count:,}", f"{teacher.get((truth, answer), 0):,}", f"{images[truth]:,}")
            for (truth, answer), count in most
        ]
        columns = ("Class", "Taken for", "Images", "By the teacher", "Of")
        return [Table(f"Most confused by {file}", columns, rows, 2, "")]
    counts = own | {(index, index): count for index, count in enumerate(classes["files"][file]["correct"])}
    rows = [
        (name, *(f"{counts[truth, answer]:,}" if counts.get((truth, answer)) else "·" for answer in range(len(names))))
        for truth, name in enumerate(names)
    ]
    note = "A row for each class, a column for each answer: what lies off the diagonal is a mistake."
    return [Table(f"Confusion matrix of {file}", ("", *names), rows, 1, note)]
