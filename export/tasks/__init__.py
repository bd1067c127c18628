"""The tasks of networks: how their outputs are decoded and scored. To add a task, write its file and add its row here."""

from pathlib import Path

from export.errors import BundleError
from export.names import TASK_KEY
from export.onnx_file.model_file import parse
from export.tasks.classification import CLASSIFICATION
from export.tasks.detection import DETECTION
from export.tasks.multilabel import MULTILABEL
from export.tasks.segmentation import SEGMENTATION
from export.tasks.task import OutputTask
from export.tasks.tensors import TENSORS
from export.tasks.unlabelled import UNLABELLED

TASKS: dict[str, OutputTask] = {
    "classification": CLASSIFICATION,
    "segmentation": SEGMENTATION,
    "detection": DETECTION,
    "multilabel": MULTILABEL,
    "unlabelled": UNLABELLED,
    "tensors": TENSORS,
}


def task_named(name: str) -> OutputTask:
    """Return the task of this name; BundleError if this version does not know it."""
    if name not in TASKS:
        raise BundleError(
            f"task: must be one of {', '.join(TASKS)}, got {name!r:.50}: use a newer version of this project"
        )
    return TASKS[name]


def stated_task(file: Path) -> OutputTask:
    """Return the task that an ONNX file's metadata names; a file from elsewhere names none and is taken for a classifier."""
    stated = {entry.key: entry.value for entry in parse(file).metadata_props}.get(TASK_KEY)
    return CLASSIFICATION if stated is None else task_named(stated)
