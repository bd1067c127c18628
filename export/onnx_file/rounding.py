"""Round a file's constants as coarser arithmetics read them. Apart from `graph`: what serves a bundle has no onnx_ir."""

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper


def rounded(model: ModelProto, bits: int) -> ModelProto:
    """Return a copy whose float constants have significands of `bits` bits, as other arithmetics read them: 8 in bf16, 11 in TF32."""
    found: ModelProto = ModelProto.FromString(model.SerializeToString())
    for tensor in found.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            values = numpy_helper.to_array(tensor)
            coarse = rounded_values(values.astype(np.float32), bits).astype(values.dtype)
            tensor.CopyFrom(numpy_helper.from_array(coarse, tensor.name))
    return found


def rounded_values(values: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Return finite values rounded to significands of `bits` bits, ties to even."""
    drop, whole = 24 - bits, np.ascontiguousarray(values).view(np.uint32)
    return ((whole + (1 << (drop - 1)) - 1 + (whole >> drop & 1)) >> drop << drop).view(np.float32)
