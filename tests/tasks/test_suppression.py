"""Boxes that are decoded and suppressed inside the graph are those of numpy, for each kind of head."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import save
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import batched_nms, box_convert

from export.errors import BundleError
from export.onnx_file.model_file import inspect
from export.onnx_file.uint8_input import with_uint8_input
from export.serving.triton import answering_repository
from export.tasks.average_precision import mean_average_precision, statistics
from export.tasks.boxes import (
    CENTRED,
    GIOU,
    LIMITS,
    NONE,
    PER_LEVEL,
    SIGMOID,
    SOFTMAX,
    WEIGHTS,
    boxes,
    decode,
    heads,
    probabilities,
)
from export.tasks.detection import DETECTION
from export.tasks.task import Array

SIDE = 4
IMAGE = np.zeros((1, 3, SIDE, SIDE), np.float32)
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


def test_a_detectors_own_values_may_be_called_as_its_outputs() -> None:
    model, expected = answering(rows(SIGMOID)), run(DETECTION.finish(answering(rows(SIGMOID))), IMAGE)
    names = {"largest": "boxes", "nothing": "scores", "rows": "labels"}
    for node in model.graph.node:
        for own in (node.input, node.output):
            own[:] = [names.get(name, name) for name in own]
    model.graph.initializer[0].name = names["rows"]
    found = run(DETECTION.finish(model), IMAGE)
    assert found.keys() == {"boxes", "scores", "labels"}
    assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, GIOU, CENTRED])
def test_boxes_of_the_graph_are_those_of_numpy(kind: int) -> None:
    values = rows(kind)
    expected = decode(values)[0]
    expected = expected[expected[:, 0] != NONE]
    model = DETECTION.finish(with_uint8_input(answering(values), PREPROCESS))
    found = run(model, np.zeros((1, SIDE, SIDE, 3), np.uint8))
    assert 10 < len(expected) <= LIMITS.detections
    assert found["scores"].min() > LIMITS.least_score
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


def crowded(kind: int, *, objects: int, near: int, tied: bool) -> tuple[Array, Array]:
    """Return outputs with `near` anchors of varied scores at each of `objects` truths, over three levels, and the truths."""
    random = np.random.default_rng(objects)
    side = int(np.ceil(np.sqrt(objects)))
    middles = (np.stack(np.divmod(np.arange(objects), side), axis=1) + 0.5) / side
    labels = np.arange(objects) % 4
    anchors, classes = objects * near, 4
    owner = random.permutation(np.repeat(np.arange(objects), near))
    places = np.concatenate(
        [middles[owner] + random.normal(0, 0.02 / side, (anchors, 2)), np.full((anchors, 2), 0.7 / side)], axis=1
    )
    # Each object's boxes are as sure as it is, so the sure objects' boxes alone would fill any limit over all classes.
    sure = np.linspace(3, -3.5, objects)[random.permutation(objects)][owner] + random.normal(0, 0.1, anchors)
    logits = np.full((anchors, classes + 1), -6.0) if tied else random.normal(-6, 1, (anchors, classes + 1))
    logits[np.arange(anchors), 1 + labels[owner]] = np.round(sure) if tied else sure
    logits[:, 0] = {SOFTMAX: 0.0, CENTRED: 4.0}.get(kind, -60.0)
    moves = np.full((anchors, 4), 0.5) if kind == CENTRED else random.normal(0, 0.05, (anchors, 4))
    levels = np.repeat([0, 1, 2], [anchors // 2, anchors // 4, anchors - anchors // 2 - anchors // 4])
    values = np.column_stack([logits, moves, kind + PER_LEVEL * levels, places])[None].astype(np.float32)
    half = 0.35 / side
    true = np.column_stack([labels, middles - half, middles + half, np.zeros(objects)])[None]
    return values, true


def by_torchvision(values: Array, kind: int) -> Array:
    """Return the detections (n, 6) of torchvision's own postprocessing of these outputs."""
    outputs, pixels = torch.from_numpy(values), 1024
    logits, moves = outputs[..., :-9], outputs[..., -9:-5]
    anchors = box_convert(outputs[0, :, -4:] * pixels, "cxcywh", "xyxy")
    _, levels = torch.unique_consecutive(outputs[0, :, -5], return_counts=True)
    place, growth = WEIGHTS.get(kind, (1.0, 1.0))
    network: Any = SimpleNamespace(
        box_coder=BoxLinearCoder(normalize_by_size=True)
        if kind == CENTRED
        else BoxCoder((place, place, growth, growth)),
        score_thresh=LIMITS.least_score,
        nms_thresh=LIMITS.most_overlap,
        detections_per_img=LIMITS.detections,
        topk_candidates=400 if kind == SOFTMAX else 1000,
    )
    found = {"cls_logits": logits, "bbox_regression": moves}
    if kind == SOFTMAX:
        (its,) = SSD.postprocess_detections(network, found, [anchors], [(pixels, pixels)])
    else:  # torchvision takes the first column for a class, too
        found["cls_logits"] = torch.cat([torch.full_like(logits[..., :1], -100), logits[..., 1:]], dim=2)
        if kind == CENTRED:
            found["bbox_ctrness"] = logits[..., :1]
        split = {name: list(part.split(levels.tolist(), dim=1)) for name, part in found.items()}
        head: Any = FCOS if kind == CENTRED else RetinaNet
        (its,) = head.postprocess_detections(network, split, [list(anchors.split(levels.tolist()))], [(pixels, pixels)])
    return np.column_stack([its["labels"] - 1, its["scores"], its["boxes"] / pixels])


def in_rows(detections: Array) -> Array:
    table = np.full((1, LIMITS.detections, 6), float(NONE))
    table[0, : len(detections)] = detections
    return table


@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, CENTRED])
@pytest.mark.parametrize(("objects", "near"), [(20, 30), (80, 15), (100, 60)])
def test_crowded_scenes_score_as_in_torchvision_from_numpy_and_from_the_graph(
    kind: int, objects: int, near: int
) -> None:
    values, true = crowded(kind, objects=objects, near=near, tied=False)
    expected = by_torchvision(values, kind)
    mine = decode(values)
    found = run(DETECTION.finish(answering(values)), np.zeros((1, 3, SIDE, SIDE), np.float32))
    graphs = np.column_stack([found["labels"], found["scores"], found["boxes"]])
    for kept in (mine[0][mine[0, :, 0] != NONE], graphs):
        assert len(kept) == len(expected)
        assert np.allclose(kept[:, 1], expected[:, 1], atol=1e-6)
        assert np.allclose(kept, expected, atol=2e-6)
    scores = [mean_average_precision(statistics(table, true)) for table in (in_rows(expected), mine, in_rows(graphs))]
    assert scores[1:] == pytest.approx([scores[0]] * 2, abs=1e-6)
    assert 0.2 < scores[0] < 1


@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, CENTRED])
def test_of_equal_scores_the_graph_and_numpy_keep_those_that_torchvision_keeps(kind: int) -> None:
    values, _ = crowded(kind, objects=60, near=4, tied=True)  # beyond 1,000 candidates torchvision's sort is not stable
    found = heads(values)
    scores = probabilities(found)[0].astype(np.float32)
    anchor, label = (part[scores > LIMITS.least_score] for part in np.indices(scores.shape))
    if kind == SOFTMAX:  # torchvision lists SSD's candidates class by class, the others' anchor by anchor
        order = np.argsort(label, kind="stable")
        anchor, label = anchor[order], label[order]
    boxes_of, scores_of = boxes(found)[0][anchor], scores[anchor, label]
    as_double = torch.tensor(boxes_of), torch.tensor(scores_of).double()
    kept = batched_nms(*as_double, torch.tensor(label), LIMITS.most_overlap)[: LIMITS.detections]
    assert len(np.unique(scores_of[kept])) < len(kept) / 2
    expected = np.column_stack([label, scores_of, boxes_of])[kept]
    mine = decode(values)[0]
    assert np.allclose(mine[: len(kept)], expected, atol=1e-9)
    graph = run(DETECTION.finish(answering(values)), np.zeros((1, 3, SIDE, SIDE), np.float32))
    found_by_graph = np.column_stack([graph["labels"], graph["scores"], graph["boxes"]])
    # A softmax's sum over the classes depends on their order, so only one class's scores are equal to the bit.
    if kind == SOFTMAX:
        assert len(expected) < LIMITS.detections
        expected, found_by_graph = (part[np.argsort(part[:, 0], kind="stable")] for part in (expected, found_by_graph))
    assert np.allclose(found_by_graph, expected, atol=1e-6)


def test_a_score_that_is_not_a_number_displaces_no_box() -> None:
    values, _ = crowded(SOFTMAX, objects=20, near=30, tied=False)
    values[0, ::2, 0] = np.nan
    expected = decode(values)[0]
    found = run(DETECTION.finish(answering(values)), np.zeros((1, 3, SIDE, SIDE), np.float32))
    assert np.allclose(found["scores"], expected[expected[:, 0] != NONE, 1], atol=1e-6)
