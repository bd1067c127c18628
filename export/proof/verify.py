"""Compare an INT8 file, as ONNX Runtime runs it, with the fake-quantized network that it was made from.

Compared are predictions, and every tensor: end to end, and each layer alone on the reference's inputs, so that a layer is blamed only
for its own error. Without the network the reference is the unoptimized file: its Q/DQ graph in float.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.errors import BundleError
from export.onnx_file.graph import OUTPUT as LOGITS
from export.onnx_file.model_file import facts_of, parse
from export.onnx_file.names import module_of
from export.onnx_file.outputs import Output, packed, unpacked
from export.onnx_file.wiring import Wiring, wire
from export.proof.distance import Distance
from export.proof.rows import Saturation, TensorRow, VerifyRow
from export.proof.saturation import modules, saturates_here, saturation_possible
from export.proof.submodels import GRAPH_INPUT, Piece, exposed, pieces, quantized_tensors
from export.runtime.intervals import mean_interval
from export.runtime.native import RUNTIME_ERRORS, first_line
from export.runtime.session import infer, open_session
from export.tasks.task import Array, OutputTask

Floats = NDArray[np.float32]
Reference = Callable[[Floats], Mapping[str, Floats]]
"""Images (n, c, h, w) to `logits` and the float values of quantized tensors, by the quantizer's module path."""

CHUNK = 8  # images per run; the tensors of a ResNet-50 at 224 pixels take 44 MB per image


@dataclass
class Probe:
    """A piece of the graph with open sessions, and its measured distances."""

    piece: Piece
    as_run: onnxruntime.InferenceSession
    unoptimized: onnxruntime.InferenceSession | None  # only if this machine's kernels can saturate in it
    accumulated: Distance = field(default_factory=Distance)
    local: Distance = field(default_factory=Distance)
    unoptimized_local: Distance = field(default_factory=Distance)  # of `as_run` from `unoptimized`

    def measure_(self, images: Floats, expected: Mapping[str, Floats], got: dict[str, Floats]) -> None:
        """Run the piece on the previous pieces' outputs (`got`, to which it adds its own) and on the reference's."""
        name, scale = self.piece.name, self.piece.scale
        alone = self._run(self.as_run, images, expected)
        if expected[name].shape != alone.shape:
            raise BundleError(
                f"{name}: is {alone.shape} in the file and {expected[name].shape} in its reference: export it again"
            )
        if name not in got:
            got[name] = self._run(self.as_run, images, got)
        self.accumulated.add_(expected[name], got[name], scale)
        self.local.add_(expected[name], alone, scale)
        if self.unoptimized is not None:
            self.unoptimized_local.add_(self._run(self.unoptimized, images, expected), alone, scale)

    def to_json(self) -> TensorRow:
        """Return the tensor as a JSON value."""
        own, alone = self.accumulated.to_json(), self.local.to_json()
        return {"name": self.piece.name, "layers": self.piece.modules, **own, "local": alone}

    def _run(self, session: onnxruntime.InferenceSession, images: Floats, tensors: Mapping[str, Floats]) -> Floats:
        feeds = [images if name == GRAPH_INPUT else tensors[name] for name in self.piece.inputs]
        result: Floats = session.run(
            None, {value.name: feed for value, feed in zip(session.get_inputs(), feeds, strict=True)}
        )[0]
        return result


def verify(
    path: Path,
    batches: Iterable[tuple[Floats, Array | None]],
    reference: Reference | None = None,
    *,
    task: OutputTask,
    tensor_images: int = 64,
) -> VerifyRow:
    """Compare the file with `reference` (None: the file unoptimized) on all images, and tensors on the first `tensor_images`.

    Raises BundleError if the file is not INT8 or cannot run, if there are no images, and if the reference has no logits or other
    shapes.
    """
    model = parse(path)
    several = facts_of(model, path).signature if len(model.graph.output) > 1 else ()
    file = wire(model)
    if not quantized_tensors(file):
        raise BundleError(
            f"{path.name}: has no QuantizeLinear on an activation: only an INT8 (Q/DQ) file can be verified"
        )
    reference = reference or file_reference(file)
    possible = saturation_possible(file)
    session = open_session(path)
    probes: list[Probe] = []
    expected_predictions, predictions = list[Array](), list[Array]()
    expected_rows, rows = list[Array](), list[Array]()
    seen = 0
    for images, targets in in_chunks(batches):
        expected = reference(images)
        logits = _run(session, images, path.name)
        predictions.append(task.decode(logits))
        expected_predictions.append(task.decode(_logits(expected)))
        if targets is not None:
            rows.append(task.statistics(predictions[-1], targets, logits.shape[1:]))
            expected_rows.append(task.statistics(expected_predictions[-1], targets, logits.shape[1:]))
        if seen < tensor_images:
            probes = probes or open_probes(file, expected, possible)
            few = images[: tensor_images - seen]
            # Tensors may have another first axis than the images, windows of them or none, so they are computed and not sliced.
            known = expected if len(few) == len(images) else reference(few)
            measure_(probes, few, _by_name(known, several), _by_name({LOGITS: logits[: len(few)]}, several))
        seen += len(images)
    if not seen:
        raise BundleError(f"{path.name}: no images to verify it on: give at least one")
    scores = [task.total(np.concatenate(found)) if found else None for found in (expected_rows, rows)]
    both = np.concatenate(expected_predictions), np.concatenate(predictions)
    return summarize(task, possible, probes, both, (scores[0], scores[1]), min(seen, tensor_images))


def file_reference(file: Wiring) -> Reference:
    """Return the file's unoptimized Q/DQ graph as a reference, with every product and sum in float."""
    model, outputs = exposed(file)
    session = open_session(model, optimize=False)
    names = dict.fromkeys([value.name for value in session.get_outputs()])
    own = [str(value.name) for value in file.model.graph.outputs]

    def reference(images: Floats) -> Mapping[str, Floats]:
        found = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))
        logits = packed([found[name] for name in own])
        return {LOGITS: logits, **{name: found[tensor] for name, tensor in outputs.items()}}

    return reference


def in_chunks(batches: Iterable[tuple[Floats, Array | None]]) -> Iterator[tuple[Floats, Array | None]]:
    """Yield the batches in chunks of at most CHUNK images."""
    for images, truths in batches:
        for start in range(0, len(images), CHUNK):
            part = slice(start, start + CHUNK)
            yield images[part], None if truths is None else truths[part]


def open_probes(file: Wiring, known: Mapping[str, Floats], possible: Mapping[str, int]) -> list[Probe]:
    """Open every piece of the file between tensors that the reference has; also unoptimized if saturation is `possible` and happens here."""
    probes = []
    for piece in pieces(file, known):
        suspect = not possible.keys().isdisjoint(piece.layers) and saturates_here()
        unoptimized = open_session(piece.model, threads=1, optimize=False) if suspect else None
        probes.append(Probe(piece, open_session(piece.model, threads=1), unoptimized))
    return probes


def measure_(
    probes: list[Probe], images: Floats, expected: Mapping[str, Floats], outputs: Mapping[str, Floats]
) -> None:
    """Measure every piece on one chunk of images, in the file's order; `outputs` are the whole file's."""
    got = dict(outputs)
    for probe in probes:
        probe.measure_(images, expected, got)


def summarize(
    task: OutputTask,
    possible: dict[str, int],
    probes: list[Probe],
    predictions: tuple[Array, Array],
    scores: tuple[float | None, float | None],
    tensor_images: int,
) -> VerifyRow:
    """Return the verification from its parts; predictions and scores are (the reference's, the file's)."""
    images, same = len(predictions[0]), task.agreement(*predictions)
    return VerifyRow(
        images=images,
        tensor_images=tensor_images,
        agreement=float(np.sum(same)) / images,
        agreement_ci95=mean_interval(same),
        score_reference=scores[0],
        score=scores[1],
        tensors=[probe.to_json() for probe in probes],
        first_divergence=next((probe.piece.name for probe in probes if probe.local.diverges), None),
        saturation=tuple(
            Saturation(
                layer=module_of(layer),
                max_lsb=moved.max_lsb,
                weight_sum=possible[layer],
                values=moved.far / moved.values,
            )
            for probe in probes
            if (moved := probe.unoptimized_local).diverges
            for layer in probe.piece.layers
            if layer in possible
        ),
        saturation_possible=modules(possible),
    )


def _run(session: onnxruntime.InferenceSession, images: Floats, name: str) -> Floats:
    try:
        return infer(session, images)
    except RUNTIME_ERRORS as error:
        raise BundleError(
            f"{name}: cannot run on {images.shape} ({first_line(error)}): give images of its size"
        ) from error


def _by_name(found: Mapping[str, Floats], several: Sequence[Output]) -> dict[str, Floats]:
    """Return tensors with each of several outputs beside the packed ones."""
    return {**found, **(unpacked(found[LOGITS], several) if several else {})}


def _logits(expected: Mapping[str, Floats]) -> Floats:
    if LOGITS not in expected:
        raise BundleError(
            f"the reference has no {LOGITS!r}, only {', '.join(list(expected)[:5])}: add the network's output"
        )
    return expected[LOGITS]
