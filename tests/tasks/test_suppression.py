"""Boxes that are decoded and suppressed inside the graph are those of numpy, for each kind of head."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import save

from export.errors import BundleError
from export.onnx_file.model_file import inspect
from export.onnx_file.uint8_input import with_uint8_input
from export.serving.triton import answering_repository
from export.tasks.boxes import CENTRED, DETECTIONS, GIOU, LEAST_SCORE, NONE, SIGMOID, SOFTMAX, decode
from export.tasks.detection import DETECTION
from export.tasks.task import Array

SIDE = 4
PREPROCESS = {"image_size": SIDE, "mean": [0.5] * 3, "std": [0.25] * 3}


def answering(values: Array) -> onnx.ModelProto:
    """Return a network that gives these outputs, (1, ...), whatever the image."""
    batch = ["batch", *values.shape[1:]]
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "zero"], ["nothing"]),
        helper.make_node("Add", ["rows", "nothing"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, batch)],
        [numpy_helper.from_array(values, "rows"), numpy_helper.from_array(np.array(0, np.float32), "zero")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: onnx.ModelProto, images: Array) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))


def rows(kind: int, *, anchors: int = 60, classes: int = 3) -> Array:
    """Return random outputs of so many anchors, about a third of which are likely."""
    random = np.random.default_rng(kind)
    logits = random.normal(-3, 3, (1, anchors, classes + 1))
    logits[..., 0] += 2 if kind in (SOFTMAX, CENTRED) else 0
    moves = random.normal(0, 0.5, (1, anchors, 4))
    moves = np.abs(moves) if kind == CENTRED else moves
    places = np.concatenate([random.random((1, anchors, 2)), 0.1 + 0.3 * random.random((1, anchors, 2))], axis=2)
    return np.concatenate([logits, moves, np.full((1, anchors, 1), kind), places], axis=2).astype(np.float32)


@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, GIOU, CENTRED])
def test_boxes_of_the_graph_are_those_of_numpy(kind: int) -> None:
    values = rows(kind)
    expected = decode(values)[0]
    expected = expected[expected[:, 0] != NONE]
    model = DETECTION.finish(with_uint8_input(answering(values), PREPROCESS))
    found = run(model, np.zeros((1, SIDE, SIDE, 3), np.uint8))
    assert 10 < len(expected) <= DETECTIONS
    assert found["scores"].min() > LEAST_SCORE
    assert np.allclose(found["scores"], expected[:, 1], atol=1e-6)
    assert np.array_equal(found["labels"], expected[:, 0])
    assert np.allclose(found["boxes"], expected[:, 2:], atol=1e-6)


def test_an_image_without_a_likely_box_has_none() -> None:
    values = rows(SIGMOID)
    values[..., :4] = -20
    found = run(DETECTION.finish(answering(values)), np.zeros((1, 3, SIDE, SIDE), np.float32))
    assert [found[name].shape for name in ("boxes", "scores", "labels")] == [(0, 4), (0,), (0,)]


def test_what_is_no_detector_is_refused() -> None:
    with pytest.raises(BundleError, match="must be a detector's anchors"):
        DETECTION.finish(answering(np.zeros((1, 4), np.float32)))


def test_tritons_configuration_names_every_output(tmp_path: Path) -> None:
    model, own = DETECTION.finish(with_uint8_input(answering(rows(SOFTMAX)), PREPROCESS)), answering(rows(SOFTMAX))
    facts = inspect(save(own, tmp_path / "rows.onnx"))
    files = answering_repository("cells", model, unlike=facts)
    config = files["serving/triton-answers/cells/config.pbtxt"].decode()
    assert f'{{ name: "pixels" data_type: TYPE_UINT8 dims: [ 1, {SIDE}, {SIDE}, 3 ] }}' in config
    for name, kind, dims in (("boxes", "FP32", "-1, 4"), ("scores", "FP32", "-1"), ("labels", "INT64", "-1")):
        assert f'{{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ] }}' in config
    assert files["serving/triton-answers/cells/1/model.onnx"] == model.SerializeToString()
    assert not answering_repository("cells", own, unlike=facts)
