"""The tasks of networks. To add one, write a file here and in `export/tasks/`, and a row in both tables."""

from compress.tasks.aligned import aligning
from compress.tasks.classification import CLASSIFICATION
from compress.tasks.detection import DETECTION
from compress.tasks.multilabel import MULTILABEL
from compress.tasks.segmentation import SEGMENTATION
from compress.tasks.task import Task, evaluate
from compress.tasks.tensors import TENSORS
from compress.tasks.unlabelled import UNLABELLED

TASKS: dict[str, Task] = {
    "classification": CLASSIFICATION,
    "segmentation": SEGMENTATION,
    "detection": DETECTION,
    "multilabel": MULTILABEL,
    "unlabelled": UNLABELLED,
    "tensors": TENSORS,
}

__all__ = ["TASKS", "Task", "aligning", "evaluate"]
