"""Changes to an ONNX graph that keep its meaning: names, versions, metadata, float16, the pools that integer kernels want."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from export.onnx_file.names import name_nodes_

INPUT, OUTPUT = "input", "logits"
IR_VERSION = 9  # ONNX Runtime 1.15, which servers in the field still run, reads opset <= 19 and IR <= 9


def finish(model: ModelProto, *, opset: int, metadata: Mapping[str, str]) -> ModelProto:
    """Return the exported model ready to be served: right versions, nodes named after their modules, no stack traces or paths.

    Global averages become pools, which have integer kernels.

    Raises ValueError where the exporter did not honour the opset.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("", versions.get("ai.onnx")) != opset:
        raise ValueError(f"the exporter wrote opset {versions}, not {opset}")
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "compress", ""
    global_average_pools_(model)
    name_nodes_(model)
    strip_(model)
    helper.set_model_props(model, dict(metadata))
    return model


def strip_(model: ModelProto) -> None:
    """Remove what no runtime needs: stack traces, module paths, intermediate shapes, unused constants and operator domains."""
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    domains = {node.domain for node in model.graph.node}
    imports = [entry for entry in model.opset_import if entry.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    del model.metadata_props[:]
    del model.functions[:]
    model.doc_string = model.graph.doc_string = ""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for part in [*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        part.doc_string = ""
        del part.metadata_props[:]


def global_average_pools_(model: ModelProto) -> int:
    """Rewrite ReduceMean over height and width as GlobalAveragePool, which has an integer kernel; return how many."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    constants |= {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    rank4 = _rank4_outputs(model)
    pools = [node for node in model.graph.node if _is_global_mean(node, constants) and node.input[0] in rank4]
    for node in pools:
        keeps_dims = _attribute(node, "keepdims", 1)
        node.op_type = "GlobalAveragePool"
        del node.input[1:], node.attribute[:]
        if not keeps_dims:
            pooled, flat = f"{node.output[0]}_pooled", node.output[0]
            node.output[0] = pooled
            position = list(model.graph.node).index(node)
            flatten = helper.make_node("Flatten", [pooled], [flat])
            flatten.metadata_props.extend(node.metadata_props)  # its module
            model.graph.node.insert(position + 1, flatten)
    return len(pools)


def to_float16(model: ModelProto) -> ModelProto:
    """Return the model with float16 weights and arithmetic; input and output stay float32, so callers need no change."""
    halved: ModelProto = convert_float_to_float16(
        onnx.ModelProto.FromString(model.SerializeToString()), keep_io_types=True
    )
    OnnxModel(halved).topological_sort()  # the converter appends the input's cast at the end
    return halved


def save_model(model: ModelProto, path: Path) -> None:
    """Check the model and write it as one file."""
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def weight_levels(model: ModelProto) -> dict[str, np.ndarray]:
    """Return every int8 weight tensor by name, to read back the grid that a file really holds."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    }


def _is_global_mean(node: NodeProto, constants: Mapping[str, np.ndarray]) -> bool:
    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
        return False
    return sorted(int(axis) % 4 for axis in constants[node.input[1]].ravel()) == [2, 3]


def _rank4_outputs(model: ModelProto) -> set[str]:
    inferred = onnx.shape_inference.infer_shapes(model)
    values = [*inferred.graph.value_info, *inferred.graph.input]
    return {value.name for value in values if len(value.type.tensor_type.shape.dim) == 4}


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
