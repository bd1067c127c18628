"""What really runs: the operators of the graph after ONNX Runtime has optimized it, not those of the file."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat")
FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


@dataclass(frozen=True)
class Audit:
    """The optimized graph of one file on the CPU."""

    operators: dict[str, int]
    integer_layers: tuple[str, ...]
    float_layers: tuple[str, ...]


def audit(model: Path) -> Audit:
    """Optimize `model` as the CPU provider would and count what came out."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(optimized).graph.node
    return Audit(
        operators=dict(sorted(Counter(node.op_type for node in nodes).items())),
        integer_layers=tuple(node.name or node.output[0] for node in nodes if node.op_type in INTEGER),
        float_layers=tuple(node.name or node.output[0] for node in nodes if node.op_type in FLOAT),
    )
