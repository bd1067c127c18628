"""The model that gives boxes or masks under serving/ is the served file between two ends, and is compared with it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper
from onnx_files import PREPROCESS, model_of, save, small_contents
from planted import seal

from export.bundle.write import write_bundle
from export.check.findings import check_bundle
from export.onnx_file.model_file import inspect
from export.onnx_file.uint8_input import with_uint8_input
from export.serving.triton import answering_model, answering_repository
from export.tasks import TASKS
from export.tasks.boxes import NONE, SIGMOID

SIZE = 16
PLACE = answering_model("small")


def masks() -> tuple[ModelProto, NDArray[np.generic]]:
    """Return a network that gives each pixel the class of its brightest channel, and true masks of four images."""
    weights = {"weight": np.eye(3, dtype=np.float32)[:, :, None, None]}
    model = model_of(
        [helper.make_node("Conv", ["input", "weight"], ["logits"])], weights, shape=(3, SIZE, SIZE), classes=3
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", 1, ["batch", 3, SIZE, SIZE]))
    return model, np.zeros((4, SIZE, SIZE), np.uint8)


def boxes() -> tuple[ModelProto, NDArray[np.generic]]:
    """Return a detector of four anchors whose scores follow the image's brightness, and four images without a box."""
    anchors = np.zeros((1, 4, 4 + 4 + 5), np.float32)
    anchors[..., 8], anchors[..., 9:] = SIGMOID, (0.5, 0.5, 0.2, 0.2)
    weights = {"weight": anchors, "direction": np.eye(13, dtype=np.float32)[1]}
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["brightness"], keepdims=0),
        helper.make_node("Mul", ["brightness", "direction"], ["shifted"]),
        helper.make_node("Add", ["weight", "shifted"], ["logits"]),
    ]
    model = model_of(nodes, weights, shape=(3, SIZE, SIZE), classes=3)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", 1, ["batch", 4, 13]))
    return model, np.full((4, 1, 6), NONE, np.float32)


@pytest.fixture(params=[("segmentation", masks), ("detection", boxes)], ids=["masks", "boxes"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    task, network = request.param
    model, truths = network()
    path = save(model, tmp_path / "student_fp32.onnx")
    predicting = TASKS[task].finish(with_uint8_input(model, PREPROCESS))
    documents = answering_repository("small", predicting, unlike=inspect(path))
    small = small_contents({"student_fp32": path})
    small = replace(small, task=task, truths=truths, documents=documents, metrics={})
    write_bundle(tmp_path / "bundle", small)
    return tmp_path / "bundle"


def other_constant(model: ModelProto, name: str) -> None:
    """Change a constant: a weight of the network inside, or the normalization before it."""
    (constant,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) + np.float32(0.5), name))


def other_node(model: ModelProto) -> None:
    """Turn the normalized image's sides."""
    (node,) = (node for node in model.graph.node if node.name == "pixels/6_Transpose")
    node.attribute[0].ints[:] = [0, 3, 2, 1]


CHANGES: dict[str, Callable[[ModelProto], None]] = {
    "a weight": partial(other_constant, name="weight"),
    "the mean": partial(other_constant, name="pixels/mean"),
    "a node": other_node,
}


def test_a_whole_bundle_of_masks_or_boxes_has_no_defect(bundle: Path) -> None:
    assert (bundle / PLACE).exists()
    found, findings = check_bundle(bundle)
    assert findings == []
    assert found is not None


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_that_gives_predictions_is_named(bundle: Path, change: str) -> None:
    model = onnx.load(bundle / PLACE)
    CHANGES[change](model)
    save(model, bundle / PLACE)
    seal(bundle)
    _, (finding,) = check_bundle(bundle)
    assert finding.defect == "other_copy"
    assert finding.sentence.startswith(f"{PLACE}: is not what student_fp32.onnx gives from pixels to predictions")


def test_a_second_model_that_gives_predictions_is_named(bundle: Path) -> None:
    other = bundle / answering_model("other")
    other.parent.mkdir(parents=True)
    shutil.copy(bundle / PLACE, other)
    seal(bundle)
    _, (finding,) = check_bundle(bundle)
    assert (finding.defect, finding.sentence.partition(": ")[0]) == ("other_copy", answering_model("other"))


def test_a_network_whose_names_are_those_of_the_added_operators_is_no_crash(bundle: Path) -> None:
    network = onnx.load(bundle / "student_fp32.onnx")
    network.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "pixels/mean"))
    save(network, bundle / "student_fp32.onnx")
    seal(bundle)
    _, findings = check_bundle(bundle)
    assert "student_fp32.onnx: cannot get pixels and predictions" in findings[-1].sentence
