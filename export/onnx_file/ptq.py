"""Post-training quantization by ONNX Runtime's static quantizer, on the target's grid: the baseline for INT8."""

import contextlib
import io
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.onnx_file.graph import INPUT, save_model, strip_, weight_levels
from export.onnx_file.macs import macs
from export.onnx_file.names import module_of
from export.onnx_file.targets import Target
from export.onnx_file.wiring import weights, wire

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
PERCENTILE = 99.999
LINEAR = ("Gemm", "MatMul")
SLICE = 8  # images per round, whose activations are all in memory: 3 GB for a ResNet-50 at 224
MIN_SCALE = 2.0**-24  # a dead channel must not divide by zero


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feed calibration images to ONNX Runtime, one slice per round."""

    def __init__(self, batches: Iterable[NDArray[np.float32]]) -> None:
        self.slices = [batch[start : start + SLICE] for batch in batches for start in range(0, len(batch), SLICE)]
        self.round = iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Select the slices of the next round."""
        self.round = iter(self.slices[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next slice of the round, or None at its end."""
        images = next(self.round, None)
        return None if images is None else {INPUT: images}


def quantize(
    float_file: Path,
    path: Path,
    batches: Iterable[NDArray[np.float32]],
    *,
    target: Target,
    method: Literal["minmax", "entropy", "percentile"],
    keep_float: Collection[str] = (),
) -> None:
    """Quantize an FP32 file on the target's grid with ranges from `batches`, each (n, c, h, w), and write it to `path`.

    Layers with module paths in `keep_float` stay float, and so does everything after them.
    Raises ValueError if a weight is off the grid.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # calibrators print
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
        quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if target.unsigned_activations else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[method],
            nodes_to_exclude=_from(onnx.load(prepared), keep_float),
            extra_options={
                "ActivationSymmetric": target.symmetric_activations,
                "QuantizeBias": target.integer_bias,
                "TensorQuantOverrides": _weight_grids(onnx.load(prepared), target),
                "CalibPercentile": PERCENTILE,
                "CalibStridedMinMax": 1,  # one slice per round for every method
            },
        )
        model = onnx.load(quantized)
    _check_grid(model, target)
    _finish(model, onnx.load(float_file), path)


def linear_fraction(float_file: Path) -> float:
    """Return the fraction of an FP32 file's multiply-accumulates that products with constant matrices do; 0 if shapes are unknown."""
    file = wire(onnx.load(float_file))
    counts = macs(file) or {}
    linear = [name for name in counts if file.nodes[name].op_type in LINEAR and weights(file.nodes[name]) is not None]
    return sum(counts[name] for name in linear) / max(sum(counts.values()), 1)


def quantize_dynamically(float_file: Path, path: Path) -> None:
    """Write an FP32 file whose linear layers have INT8 weights, and take the range of their inputs at run time, so without images.

    Convolutions stay float. The file has no Q/DQ pairs, which `export.verify` needs.
    """
    model, original = onnx.load(float_file), onnx.load(float_file)
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})  # else it warns
    with tempfile.TemporaryDirectory() as folder:
        quantized = Path(folder, "quantized.onnx")
        quantize_dynamic(
            model, str(quantized), per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=list(LINEAR)
        )
        model = onnx.load(quantized)
    _finish(model, original, path)


def _finish(model: ModelProto, original: ModelProto, path: Path) -> None:
    """Write a quantized file with its float file's version and metadata."""
    strip_(model)
    model.ir_version = original.ir_version
    onnx.helper.set_model_props(model, {entry.key: entry.value for entry in original.metadata_props})
    save_model(model, path)


def _from(model: ModelProto, layers: Collection[str]) -> list[str]:
    """Return the names of the layers' nodes and of all nodes after them."""
    names, reached = list[str](), set[str]()
    for node in model.graph.node:
        if module_of(node.name) in layers or reached & set(node.input):
            names.append(node.name)
            reached |= set(node.output)
    return names


def _weight_grids(model: ModelProto, target: Target) -> dict[str, list[dict[str, object]]]:
    """Return the scale of each output channel of every weight, max|w| / levels, in ONNX Runtime's format.

    Its own `reduce_range` would give levels from -64 to 64, one more than seven bits hold.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    grids: dict[str, list[dict[str, object]]] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in constants:
            continue
        weight = numpy_helper.to_array(constants[node.input[1]])
        axis = _output_axis(node, weight.ndim)
        largest = np.abs(weight).max(axis=tuple(a for a in range(weight.ndim) if a != axis))  # (out,)
        scales = np.maximum(largest / target.weight_scale_divisor, MIN_SCALE)
        grids[node.input[1]] = [
            {"quant_type": QuantType.QInt8, "axis": axis, "scale": scale, "zero_point": 0} for scale in scales
        ]
    return grids


def _output_axis(node: NodeProto, rank: int) -> int:
    """Return the output dimension of a layer's weight."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else rank - 1


def _check_grid(model: ModelProto, target: Target) -> None:
    for name, levels in weight_levels(model).items():
        if levels.min() < target.weight_min or levels.max() > target.weight_max:
            raise ValueError(
                f"{name}: levels {levels.min()} to {levels.max()} are off the grid of {target.name}, "
                f"{target.weight_min} to {target.weight_max}"
            )
    biases = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT32}
    if biases and not target.integer_bias:
        raise ValueError(f"{min(biases)}: an int32 bias, which {target.name} does not support")
