"""The names of ONNX's operators with weights, and of those that ONNX Runtime puts in their place. Imports nothing."""

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# ONNX Runtime's replacements for them, in integers and in float.
INTEGER = (
    "QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
)  # fmt: skip
FLOAT = (*LAYERS, "FusedConv", "NhwcFusedConv", "FusedGemm", "FusedMatMul")
Q, DQ = "QuantizeLinear", "DequantizeLinear"
