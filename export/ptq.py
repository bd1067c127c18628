"""Post-training quantization by ONNX Runtime's own static quantizer: the baseline that quantization-aware training must justify itself against."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.graph import INPUT, save_model, strip_
from export.targets import Target

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feed calibration batches to ONNX Runtime."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self.batches: Iterator[np.ndarray] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch}


def quantize(
    float_file: Path,
    path: Path,
    batches: Iterable[np.ndarray],
    *,
    target: Target,
    method: Literal["minmax", "entropy", "percentile"],
) -> None:
    """Quantize an FP32 file on the target's grid with ranges from `batches` (each float32 (n, 3, s, s)) and write it to `path`."""
    reduced = target.weight_max < 127
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
        quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduced,
            activation_type=QuantType.QUInt8 if target.unsigned_activations else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[method],
            extra_options={"ActivationSymmetric": target.symmetric_activations},
        )
        model = onnx.load(quantized)
    original = onnx.load(float_file)
    metadata = {entry.key: entry.value for entry in original.metadata_props}
    strip_(model)
    model.ir_version = original.ir_version
    onnx.helper.set_model_props(model, metadata)
    save_model(model, path)
