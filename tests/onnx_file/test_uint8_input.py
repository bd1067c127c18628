"""The file that takes bytes against the file that takes floats, in ONNX Runtime."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper
from onnx_files import PREPROCESS, classifier, colour_reader, model_of

from export.errors import BundleError
from export.images.preprocess import Look, Preprocess
from export.onnx_file.uint8_input import with_uint8_input

Level = np.uint8 | np.int8
NORMALIZE = Preprocess((16, 16), (18, 18), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)).normalize


def every_pixel(count: int) -> NDArray[np.uint8]:
    """Return images in which every channel takes all 256 values."""
    rng = np.random.default_rng(0)
    columns = [np.stack([rng.permutation(256) for _ in range(3)], 1).reshape(16, 16, 3) for _ in range(count)]
    return np.stack(columns).astype(np.uint8)


def quantized_classifier(zero_point: Level) -> ModelProto:
    """Return a network that quantizes its input and convolves in integers, as the exporter's INT8 files do."""
    rng = np.random.default_rng(1)
    constants = {
        "s": np.float32(0.0217),
        "z": zero_point,
        "w": rng.integers(-64, 64, (8, 3, 3, 3)).astype(np.int8),
        "ws": rng.uniform(0.001, 0.01, 8).astype(np.float32),
        "wz": np.zeros(8, np.int8),
        "cs": np.float32(0.05),
    }
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["input", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=0),
        node("Conv", ["x", "wf"], ["c"], pads=[1, 1, 1, 1]),
        node("QuantizeLinear", ["c", "cs", "z"], ["cq"]),
        node("DequantizeLinear", ["cq", "cs", "z"], ["cf"]),
        node("GlobalAveragePool", ["cf"], ["g"]),
        node("Flatten", ["g"], ["logits"]),
    ]
    return model_of(nodes, {name: np.asarray(value) for name, value in constants.items()}, shape=(3, 16, 16), classes=8)


MODELS: dict[str, Callable[[], ModelProto]] = {
    "fp32": classifier,
    "fp16": lambda: classifier(half=True),
    "u8": lambda: quantized_classifier(np.uint8(119)),
    "s8": lambda: quantized_classifier(np.int8(-9)),
}


def run(model: ModelProto, images: NDArray[np.generic]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    assert isinstance(logits, np.ndarray)
    return logits


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_bytes_give_the_bits_that_normalized_floats_give(name: str, batch: int) -> None:
    model, pixels = MODELS[name](), every_pixel(batch)
    expected = run(model, NORMALIZE(pixels))
    assert np.ptp(expected) > 0.1
    # the layout of the convolution's input, and so its order of summation, may differ where it runs in float
    tolerance = 0.0 if name in ("u8", "s8") else 1e-2 if name == "fp16" else 1e-5
    assert np.abs(run(with_uint8_input(model, PREPROCESS), pixels) - expected).max() <= tolerance


@pytest.mark.parametrize("zero_point", [np.uint8(119), np.int8(-9)])
def test_all_levels_of_the_first_tensor_are_the_float_files(zero_point: Level) -> None:
    """Expose the first quantized tensor of both files, so that nothing behind it can hide a difference."""
    model, pixels = quantized_classifier(zero_point), every_pixel(1)
    kind = helper.np_dtype_to_tensor_dtype(zero_point.dtype)
    found = []
    for given, images in ((model, NORMALIZE(pixels)), (with_uint8_input(model, PREPROCESS), pixels)):
        first = onnx.ModelProto.FromString(given.SerializeToString())
        first.graph.output[0].CopyFrom(helper.make_tensor_value_info("q", kind, ["batch", 3, 16, 16]))
        found.append(run(first, images))
    of_floats, of_bytes = found
    assert len(np.unique(of_floats)) > 200
    assert np.array_equal(of_floats, of_bytes)


def test_onnx_runtime_quantizes_rows_and_transposes_nothing_before_the_integer_convolution(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    model = with_uint8_input(quantized_classifier(np.uint8(119)), PREPROCESS)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    before = operators[: operators.index("QLinearConv")]
    assert before == ["Reshape", "Cast", "Div", "Sub", "Div", "QuantizeLinear", "Reshape"]


def test_the_channels_keep_their_order() -> None:
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[..., 0] = 255
    logits = run(with_uint8_input(colour_reader(), PREPROCESS), pixels)
    assert logits[0] == pytest.approx([(1 - 0.5) / 0.2, -0.4 / 0.25, -0.3 / 0.3], rel=1e-5)


def test_bytes_are_red_first_for_a_network_that_takes_blue_first() -> None:
    preprocess = Preprocess((16, 16), (16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), look=Look(bgr=True))
    pixels = every_pixel(2)
    model = with_uint8_input(colour_reader(), json.loads(json.dumps(preprocess.to_json())))
    assert np.array_equal(run(model, pixels), run(colour_reader(), preprocess.normalize(pixels)))
    told = json.loads({entry.key: entry.value for entry in model.metadata_props}["preprocess"])
    assert (told["color"], told["normalized_inside"]["color"]) == ("RGB", "BGR")


def test_the_file_keeps_its_versions_output_and_metadata_and_says_what_it_takes() -> None:
    model = classifier()
    helper.set_model_props(model, {"task": "classification", "preprocess": json.dumps(PREPROCESS)})
    changed = with_uint8_input(model, PREPROCESS)
    assert (changed.ir_version, changed.opset_import[0].version) == (9, 18)
    assert changed.graph.output[0] == model.graph.output[0]
    metadata = {entry.key: entry.value for entry in changed.metadata_props}
    assert metadata["task"] == "classification"
    told = json.loads(metadata["preprocess"])
    assert (told["input"], told["dtype"], told["layout"]) == ("pixels", "uint8", "NHWC")
    assert (told["image_size"], told["resize_to"]) == (16, 18)
    assert (told["scale"], told["mean"], told["std"]) == (1.0, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert told["normalized_inside"] == {"scale": 1 / 255, "mean": PREPROCESS["mean"], "std": PREPROCESS["std"]}


def test_the_argument_is_left_alone() -> None:
    model, preprocess = quantized_classifier(np.uint8(119)), dict(PREPROCESS)
    before = model.SerializeToString()
    with_uint8_input(model, preprocess)
    assert model.SerializeToString() == before
    assert preprocess == PREPROCESS


def test_weights_stay_as_they_are() -> None:
    model = quantized_classifier(np.uint8(119))
    tensors = {entry.name: entry for entry in with_uint8_input(model, PREPROCESS).graph.initializer}
    assert all(tensors[entry.name] == entry for entry in model.graph.initializer)
    assert numpy_helper.to_array(tensors["pixels/mean"]).shape == (48,)


@pytest.mark.parametrize("size", [15, 32])
def test_a_model_of_another_size_than_the_images_is_refused(size: int) -> None:
    with pytest.raises(
        BundleError, match=rf"must be FLOAT \(batch, 3, 16, 16\), got FLOAT \(batch, 3, {size}, {size}\)"
    ):
        with_uint8_input(classifier(size=size), PREPROCESS)


def test_a_model_that_takes_bytes_already_is_refused() -> None:
    with pytest.raises(BundleError, match="got UINT8"):
        with_uint8_input(with_uint8_input(classifier(), PREPROCESS), PREPROCESS)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_and_sizes_take_bytes_too(channels: int) -> None:
    preprocess = Preprocess((10, 14), (10, 14), (0.4,) * channels, (0.3,) * channels)
    weights = np.random.default_rng(2).standard_normal((5, channels, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["logits"]),
    ]
    model = model_of(nodes, {"w": weights}, shape=(channels, 10, 14), classes=5)
    pixels = np.random.default_rng(3).integers(0, 256, (3, 10, 14, channels), dtype=np.uint8)
    plain, bytes_in = (
        onnxruntime.InferenceSession(one.SerializeToString())
        for one in (model, with_uint8_input(model, preprocess.to_json()))
    )
    expected = plain.run(None, {"input": preprocess.normalize(pixels)})[0]
    np.testing.assert_allclose(bytes_in.run(None, {"pixels": pixels})[0], expected, rtol=1e-5)
