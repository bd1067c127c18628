"""Rewrite an ONNX graph without changing its function: names, versions, metadata, float16, pools with integer kernels."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from export.onnx_file.names import name_nodes_
from export.onnx_file.outputs import Output

INPUT, OUTPUT = "input", "logits"
IR_VERSION = 9  # ONNX Runtime 1.15, which servers still use, reads opset <= 19 and IR <= 9


def finish(model: ir.Model, *, opset: int, metadata: Mapping[str, str], outputs: Sequence[Output] = ()) -> ModelProto:
    """Return the exported model ready to serve: right versions, nodes named after their modules, no stack traces or paths.

    Global averages become pools, which have integer kernels. Raises ValueError if the exporter wrote another opset.
    """
    if model.opset_imports.get("") != opset:
        raise ValueError(f"the exporter wrote opset {model.opset_imports}, not {opset}")
    model.ir_version = IR_VERSION
    keep_constants_(model.graph)
    if outputs:
        name_outputs_(model.graph, outputs)
        RemoveUnusedNodesPass()(model)
    global_average_pools_(model.graph)
    name_nodes_(model.graph)
    finished = ir.to_proto(model)
    finished.producer_name, finished.producer_version = "compress", ""
    strip_(finished)
    helper.set_model_props(finished, dict(metadata))
    return finished


def keep_constants_(graph: ir.Graph) -> None:
    """Give back to the graph the constants that its clips read and it lost: torch's optimizer names those of all clips of one tensor alike."""
    for node in graph:
        for value in node.inputs:
            if value is None or value.producer() or value.is_graph_input() or value.is_initializer():
                continue
            if value.name in graph.initializers:
                value.name = f"{node.name}_{value.name}"
            graph.register_initializer(value)


def name_outputs_(graph: ir.Graph, outputs: Sequence[Output]) -> None:
    """Make the outputs that the network lays side by side, by its last concatenation, the graph's own, by name and with their shapes."""
    join = graph.outputs[0].producer()
    assert join is not None, "the graph ends with an operator"
    assert join.op_type == "Concat", "which joins the outputs"
    assert len(join.inputs) == len(outputs), "every one of them"
    assert graph.inputs[0].shape is not None, "as have the images"
    batch = graph.inputs[0].shape[0]
    graph.outputs.clear()
    for one, flat in zip(outputs, join.inputs, strict=True):
        assert flat is not None, "a concatenation's inputs are there"
        made = flat.producer()
        above = made.inputs[0] if made is not None and made.op_type in ("Flatten", "Reshape", "Unsqueeze") else None
        value = next((known for known in (above, flat) if known is not None and _sizes(known) == one.shape), None)
        if value is None or value.producer() is None or value.name in [done.name for done in graph.outputs]:
            shape = ir.Value(
                name=f"{one.name}_shape", const_value=ir.tensor([-1, *one.shape], name=f"{one.name}_shape")
            )
            graph.register_initializer(shape)
            node = ir.node("Reshape", [value or flat, shape])
            graph.insert_before(join, node)
            value = node.outputs[0]
            value.type = flat.type
        value.name, value.shape = one.name, ir.Shape([batch, *one.shape])
        graph.outputs.append(value)


def _sizes(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...] | None:
    return None if value.shape is None else tuple(value.shape[1:])


def strip_(model: ModelProto) -> None:
    """Remove everything that no runtime needs: stack traces, module paths, intermediate shapes, unused constants and domains."""
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


def global_average_pools_(graph: ir.Graph) -> None:
    """Rewrite ReduceMean over height and width as GlobalAveragePool, which has an integer kernel."""
    for node in [node for node in graph if _is_global_mean(node)]:
        keeps_dims, pooled = node.attributes.get_int("keepdims", 1), node.outputs[0]
        node.op_type = "GlobalAveragePool"
        node.attributes.clear()
        node.resize_inputs(1)
        if not keeps_dims:
            flatten = ir.node("Flatten", [pooled], metadata_props=node.metadata_props)  # its module
            flatten.outputs[0].name, flatten.outputs[0].type = pooled.name, pooled.type
            flatten.outputs[0].shape = pooled.shape
            pooled.replace_all_uses_with(flatten.outputs[0], replace_graph_outputs=True)
            flatten.replace_input_with(0, pooled)
            graph.insert_after(node, flatten)


def to_float16(model: ModelProto, keep: Collection[str] = ()) -> ModelProto:
    """Return the model with float16 weights and arithmetic, except for the nodes in `keep`; input and output stay float32."""
    halved: ModelProto = convert_float_to_float16(
        ModelProto.FromString(model.SerializeToString()), keep_io_types=True, node_block_list=list(keep)
    )
    OnnxModel(halved).topological_sort()  # the converter appends the input's cast at the end
    if keep:  # between two float32 nodes the converter casts to float16 and back
        joined = ir.from_proto(halved)
        for node in joined.graph:
            made = node.inputs[0].producer() if _casts_to(node, ir.DataType.FLOAT) and node.inputs[0] else None
            if made is not None and _casts_to(made, ir.DataType.FLOAT16):
                node.replace_input_with(0, made.inputs[0])
        RemoveUnusedNodesPass()(joined)
        halved = ir.to_proto(joined)
    return halved


def save_model(model: ModelProto, path: Path) -> None:
    """Check the model and write it as one file."""
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def weight_levels(model: ModelProto) -> dict[str, np.ndarray]:
    """Return every int8 weight tensor by name, to check the grid that a file really has."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    }


def _is_global_mean(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean" or len(node.inputs) < 2:
        return False
    images, axes = node.inputs[0], ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
    if not images or not images.shape or len(images.shape) != 4 or axes is None:
        return False
    return sorted(int(axis) % 4 for axis in axes.numpy().ravel()) == [2, 3]


def _casts_to(node: ir.Node, kind: ir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to", 0) == kind
