"""The tasks of networks: how their outputs are decoded and scored. To add a task, write its file and add its row here."""

from collections.abc import Sequence
from pathlib import Path

from export.errors import BundleError
from export.names import TASK_KEY
from export.onnx_file.model_file import facts_of, parse
from export.onnx_file.outputs import Output
from export.tasks.classification import CLASSIFICATION
from export.tasks.decoder import Decoder, decoded
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


def task_named(name: str, outputs: Sequence[Output] = (), decoder: Decoder | None = None) -> OutputTask:
    """Return the task of this name, for several `outputs` if there are, or a detector's `decoder`.

    Raises BundleError if this version does not know it, or it reads one output.
    """
    if name not in TASKS:
        raise BundleError(
            f"task: must be one of {', '.join(TASKS)}, got {name!r:.50}: use a newer version of this project"
        )
    return TASKS[name].of(outputs) if decoder is None else decoded(decoder)


def stated_task(file: Path) -> OutputTask:
    """Return the task that an ONNX file's metadata names; a file from elsewhere names none: with one output it is taken for a classifier."""
    model = parse(file)
    stated = {entry.key: entry.value for entry in model.metadata_props}.get(TASK_KEY)
    outputs = facts_of(model, file).signature if len(model.graph.output) > 1 else ()
    return task_named(stated or ("tensors" if outputs else "classification"), outputs)
