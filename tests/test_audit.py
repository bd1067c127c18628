"""What runs once ONNX Runtime has optimized a file, and what of it must not."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx_files import classifier, model_of, save, write_small_bundle
from quantized_files import SIZE, WIDTH, changed, quantized_network

from export.audit import main, slowest
from export.errors import BundleError
from export.onnx_file.graph import to_float16
from export.onnx_file.macs import macs
from export.onnx_file.wiring import wire
from export.proof.audit import Audit, audit, float_times, over_limits
from export.runtime.providers import available_providers

MACS = {"conv1/Conv": 9 * 3 * WIDTH * SIZE**2, "conv2/Conv": 9 * WIDTH**2 * SIZE**2, "head/Gemm": 3 * WIDTH}


CONV2 = ("conv2", "quantizer_conv2")  # were only its weights float, ONNX Runtime would quantize them itself


def audited(model: ModelProto, folder: Path) -> Audit:
    return audit(save(model, folder / "model.onnx"))


def test_a_whole_int8_file_runs_in_integers(tmp_path: Path) -> None:
    found = audited(quantized_network(), tmp_path)
    assert found["provider"] == "cpu"
    assert found["integer_layers"] == ["conv1", "conv2", "head"]
    assert found["float_fraction"] == 0.0
    assert found["operators"]["QLinearConv"] == 2
    assert found["providers"]["CPUExecutionProvider"]["QLinearConv"] == 2
    nothing = (
        found["float_layers"],
        found["leftover_qdq"],
        found["float_biases"],
        found["copies"],
        found["float_operators"],
        found["reasons"],
    )
    assert nothing == ([], [], [], [], {}, {})
    assert over_limits(found, max_float_layers=0, max_float_fraction=0.0, max_leftover_qdq=0) == []


def test_a_float_convolution_that_sneaked_in_is_named_with_its_work(tmp_path: Path) -> None:
    found = audited(quantized_network(plain=CONV2), tmp_path)
    assert found["float_layers"] == ["conv2"]
    assert found["float_fraction"] == pytest.approx(MACS["conv2/Conv"] / sum(MACS.values()))
    assert found["reasons"]["conv2"] == "its weights are float in the file: it was not quantized"
    assert set(found["leftover_qdq"]) == {"quantizer_conv1/DequantizeLinear", "quantizer_add/QuantizeLinear"}
    assert found["float_operators"] == {"add": "Add"}
    times = float_times(tmp_path / "model.onnx")
    assert set(times["modules"]) == {"conv2", "add"}
    assert 0 < sum(times["modules"].values()) < times["whole"]
    over = over_limits(found, max_float_layers=0, max_float_fraction=0.5, max_leftover_qdq=1)
    assert [sentence.partition(":")[0] for sentence in over] == [
        "max_float_layers",
        "max_float_fraction",
        "max_leftover_qdq",
    ]
    assert "conv2 (its weights are float in the file" in over[0]
    assert "quantizer_conv1/DequantizeLinear (feeds conv2 (Conv) and add (Add), not in integers)" in over[2]
    assert over_limits(found, max_float_layers=1, max_float_fraction=0.9, max_leftover_qdq=3) == []
    found["float_fraction"] = None  # as where the shapes do not tell
    (sentence,) = over_limits(found, max_float_layers=None, max_float_fraction=0.3, max_leftover_qdq=None)
    assert "at most 30.00% of the layers (their multiply-accumulates are not known)" in sentence
    assert "got 33.33%, 1 of 3 layers" in sentence
    assert over_limits(found, max_float_layers=None, max_float_fraction=None, max_leftover_qdq=None) == []


def test_a_missing_grid_behind_a_layer_leaves_it_in_float_and_says_why(tmp_path: Path) -> None:
    found = audited(quantized_network(plain=("quantizer_conv1",)), tmp_path)
    assert "conv1" in found["float_layers"]
    assert found["reasons"]["conv1"] == "its output goes in float to conv2/Conv"
    assert found["reasons"]["conv2"] == "its input comes in float from relu/Relu"


def test_an_operator_without_an_integer_kernel_is_named_with_its_leftover_pair(tmp_path: Path) -> None:
    model = quantized_network()
    pooled = next(node for node in model.graph.node if node.name == "pool/GlobalAveragePool")
    position = list(model.graph.node).index(pooled)
    model.graph.node.insert(position, helper.make_node("Erf", [pooled.input[0]], ["erf"], name="gelu/Erf"))
    model.graph.node.insert(position + 1, helper.make_node("Sin", ["erf"], ["sin"], name="gelu/Sin"))
    pooled.input[0] = "sin"
    found = audited(model, tmp_path)
    assert found["float_operators"]["gelu"] == "Erf, Sin"
    assert found["reasons"]["gelu"] == "its output goes in float to gelu/Sin"
    assert "quantizer_add/DequantizeLinear" in found["leftover_qdq"]
    assert found["reasons"]["quantizer_add/DequantizeLinear"] == "feeds gelu (Erf), not in integers"
    assert found["float_layers"] == []


def test_a_relu_before_a_grid_that_reaches_below_zero_is_named(tmp_path: Path) -> None:
    model = changed(quantized_network(), {"quantizer_conv1.zero": np.array(128, np.uint8)})
    found = audited(model, tmp_path)
    assert found["float_layers"] == ["conv1"]
    assert found["reasons"]["conv1"].startswith("relu/Relu comes before its quantizer")


def test_a_useless_pair_between_float_layers_is_found(tmp_path: Path) -> None:
    found = audited(quantized_network(plain=("conv2", "quantizer_conv1", "quantizer_add")), tmp_path)
    assert "quantizer_conv2/QuantizeLinear" in found["leftover_qdq"]
    assert "quantizer_x/QuantizeLinear" not in found["leftover_qdq"], "the input's own"
    assert found["reasons"]["quantizer_conv2/QuantizeLinear"] == "takes conv2 (Conv), not in integers"


def test_float_weights_that_onnx_runtime_quantizes_by_itself_are_named(tmp_path: Path) -> None:
    found = audited(quantized_network(63, plain=("conv2",)), tmp_path)
    assert found["integer_layers"] == ["conv1", "conv2", "head"]
    assert found["quantized_by_runtime"] == ["conv2"]


def test_a_float_bias_of_an_integer_layer_is_named(tmp_path: Path) -> None:
    model = quantized_network()
    layer = next(node for node in model.graph.node if node.name == "conv2/Conv")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(WIDTH, np.float32), "bias"))
    layer.input[2] = "bias"
    assert audited(model, tmp_path)["float_biases"] == ["conv2"]


def test_a_float_file_is_float_throughout_and_owes_no_reasons(tmp_path: Path) -> None:
    model = classifier()
    found = audited(model, tmp_path)
    assert len(found["float_layers"]) == 2
    assert found["float_fraction"] == 1.0
    assert found["reasons"] == {}
    stored = sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer) / 1e6
    assert found["float_initializer_mb"] >= stored
    half = audited(to_float16(model), tmp_path)
    assert (half["float_fraction"], half["float_layers"]) == (1.0, found["float_layers"]), (
        "casts that the runtime adds have no name"
    )


def test_multiply_accumulates_are_those_of_hand_arithmetic() -> None:
    assert macs(wire(quantized_network())) == MACS
    nodes = [
        helper.make_node("ConvTranspose", ["input", "up"], ["u"], name="up", strides=[2, 2]),
        helper.make_node("Conv", ["u", "thin"], ["d"], name="thin", group=4),
        helper.make_node("Flatten", ["d"], ["f"]),
        helper.make_node("MatMul", ["f", "rows"], ["logits"], name="rows"),
    ]
    shapes = {"up": (3, 4, 2, 2), "thin": (4, 1, 1, 1), "rows": (4 * 8 * 8, 5)}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    counted = macs(wire(model_of(nodes, weights, shape=(3, 4, 4), classes=5)))
    assert counted == {"up": 4 * 4 * 3 * 4 * 2 * 2, "thin": 4 * 8 * 8, "rows": 4 * 8 * 8 * 5}


def test_shapes_that_nobody_knows_give_no_fraction(tmp_path: Path) -> None:
    model = quantized_network()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "size"
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert macs(wire(model)) is None


def test_nodes_without_names_are_told_apart_by_their_outputs(tmp_path: Path) -> None:
    model = quantized_network(plain=CONV2)
    for node in model.graph.node:
        node.name = ""
    assert audited(model, tmp_path)["float_layers"] == ["conv2"]  # its output is conv2/Conv


def test_the_times_list_every_node_that_runs(tmp_path: Path) -> None:
    said = slowest(save(quantized_network(), tmp_path / "model.onnx"), "cpu")
    assert "conv2/Conv" in said
    assert "QLinearConv" in said


def test_a_provider_that_is_not_here_is_one_sentence(tmp_path: Path) -> None:
    path = save(quantized_network(), tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="must be one of cpu, cuda, got 'abacus'"):
        audit(path, "abacus")
    if "CUDAExecutionProvider" not in available_providers():
        with pytest.raises(BundleError, match="install onnxruntime-gpu"):
            audit(path, "cuda")


def test_the_command_exits_by_its_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], called: Callable[..., int]
) -> None:
    path = str(save(quantized_network(plain=CONV2), tmp_path / "model.onnx"))
    written = tmp_path / "audit.json"
    for arguments, code in (
        (["--times"], 0),
        (["--max-float-layers", "0"], 1),
        (
            [
                "--max-float-layers",
                "1",
                "--max-float-fraction",
                "0.99",
                "--max-leftover-qdq",
                "3",
                "--json",
                str(written),
            ],
            0,
        ),
    ):
        assert called(main, path, *arguments) == code
    assert "conv2: its weights are float in the file" in capsys.readouterr().out
    assert json.loads(written.read_text())["model"]["float_layers"] == ["conv2"]


def test_the_command_holds_a_bundles_int8_files_to_the_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], called: Callable[..., int]
) -> None:
    files = {"student_fp32": save(classifier(), tmp_path / "student_fp32.onnx")}
    write_small_bundle(tmp_path / "bundle", files)
    assert called(main, tmp_path / "bundle", "--max-float-layers", 0) == 0
    assert "0 of 2 layers" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_an_unreadable_file_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], called: Callable[..., int], content: bytes | None
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    assert called(main, path) == 2
    assert "model.onnx" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    model = quantized_network()
    model.graph.node[0].op_type = "Quantise"
    path = tmp_path / "odd.onnx"
    onnx.save(model, path)
    with pytest.raises(BundleError, match=r"odd\.onnx: .*Quantise"):
        audit(path)
