"""Detectors of any kind: a graph of its own, `decode.onnx` in a bundle, turns their outputs into boxes and scores.

It reads the network's outputs by name and gives `boxes` (n, rows, 4), left, top, right and bottom as fractions of the network's input, and
`scores` (n, rows, classes) from 0 to 1. Its metadata has the limits of what counts as a detection.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import numpy as np
import onnx
from onnx import ModelProto, helper
from onnxruntime import InferenceSession, SessionOptions

from export.errors import BundleError
from export.names import DECODER
from export.onnx_file.model_file import value
from export.onnx_file.outputs import Output, unpacked
from export.tasks.boxes import Limits, suppressed
from export.tasks.detection import DETECTION, EVERY, show, truths
from export.tasks.suppression import with_graph
from export.tasks.task import Array, OutputTask

GIVES = ("boxes", "scores")


@dataclass(frozen=True)
class Decoder:
    """A decoding graph: a file's bytes."""

    content: bytes

    @cached_property
    def model(self) -> ModelProto:
        """The graph."""
        return onnx.load_from_string(self.content)

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """The network's outputs that it reads."""
        values = map(value, self.model.graph.input)
        return tuple(Output(one.name, tuple(size or 0 for size in one.shape[1:])) for one in values)

    @property
    def several(self) -> tuple[Output, ...]:
        """The outputs where there are several, which lie side by side; empty for one."""
        return self.outputs if len(self.outputs) > 1 else ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's output, or of several packed side by side."""
        return (sum(one.size for one in self.several),) if self.several else self.outputs[0].shape

    @property
    def classes(self) -> int:
        """The number of classes."""
        return value(self.model.graph.output[1]).shape[-1] or 0

    @cached_property
    def limits(self) -> Limits:
        """What counts as a detection."""
        stated = {entry.key: entry.value for entry in self.model.metadata_props}
        return Limits(int(stated["detections"]), float(stated["least_score"]), float(stated["most_overlap"]))

    @cached_property
    def _session(self) -> InferenceSession:
        options = SessionOptions()
        options.intra_op_num_threads = 1
        return InferenceSession(self.content, options, providers=["CPUExecutionProvider"])

    def run(self, outputs: Array) -> tuple[Array, Array]:
        """Return boxes (n, rows, 4) and scores (n, rows, classes) for the network's outputs, several of them side by side."""
        named = unpacked(outputs, self.several) if self.several else {self.outputs[0].name: outputs}
        boxes, scores = self._session.run(None, {name: part.astype(np.float32) for name, part in named.items()})
        return boxes, scores

    def decode(self, outputs: Array) -> Array:
        """Return each image's detections, (n, detections, 6)."""
        boxes, scores = self.run(outputs)
        return suppressed(scores, np.clip(boxes, 0, 1), (0, boxes.shape[1]), limits=self.limits)

    def evidence(self, outputs: Array) -> Array:
        """Return the scores of every EVERY-th row."""
        return self.run(outputs)[1][:, ::EVERY]

    def check_output(self, file: str, shape: tuple[int | None, ...], labels: Sequence[str]) -> None:
        """Raise BundleError if a file's output, or the number of labels, is another than the graph reads."""
        if shape[1:] != self.shape or len(labels) != self.classes:
            raise BundleError(
                f"labels.txt: {file} has the output {shape} and {DECODER} reads (batch, {', '.join(map(str, self.shape))}) for {self.classes} "
                f"classes, got {len(labels)}: get the bundle again",
                defect="missing_class",
            )


def as_file(model: ModelProto, limits: Limits) -> Decoder:
    """Return a graph as a decoder."""
    helper.set_model_props(model, {key: str(value) for key, value in asdict(limits).items()})
    return Decoder(model.SerializeToString(deterministic=True))


def divergence(scores: Array, reference: Array) -> Array:
    """Return the mean over rows of the Kullback-Leibler divergence in nats from the reference's scores, (n,)."""
    true, found = (np.clip(part.astype(np.float64), 1e-9, 1 - 1e-9) for part in (reference, scores))
    apart = true * np.log(true / found) + (1 - true) * np.log((1 - true) / (1 - found))
    return np.asarray(apart.sum(axis=2).mean(axis=1))


def decoded(decoder: Decoder) -> OutputTask:
    """Return the task of detection for networks whose outputs the decoder reads."""
    names, suppresses = ", ".join(one.name for one in decoder.outputs), decoder.limits.most_overlap < 1
    return replace(
        DETECTION,
        output_shape=lambda _classes, _size: decoder.shape,
        check_output=decoder.check_output,
        truths=partial(truths, classes=decoder.classes),
        decode=decoder.decode,
        show=partial(show, decode=decoder.decode),
        finish=lambda model: with_graph(model, decoder.model, decoder.limits),
        evidence=decoder.evidence,
        divergence=divergence,
        meaning=f"{names}, as the network computes them; `{DECODER}` turns them into boxes and scores of the lines of `labels.txt`",
        reading=f"""\
decoder = onnxruntime.InferenceSession("{DECODER}")  # the network's outputs to boxes and scores
given = [one.name for one in decoder.get_inputs()]
boxes, scores = decoder.run(None, dict(zip(given, {"outputs" if decoder.several else "[outputs]"})))
for row, label in zip(*(scores[0] > 0.3).nonzero()):  # {"a place has several boxes: suppress duplicates" if suppresses else "one box for each object"}
    print(labels[label], scores[0, row, label], boxes[0, row])  # left, top, right, bottom as fractions of the input""",
    )
