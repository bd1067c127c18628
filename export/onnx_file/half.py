"""Half precision: which nodes' values leave its range on real images, and the file in which all others are float16."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from export.runtime.session import open_session

LARGEST = 65504 / 2  # half of float16's largest: other images reach further than those that were seen
SLICE = 8  # images at once

Floats = NDArray[np.float32]


def to_float16(model: ModelProto, keep: Collection[str] = ()) -> ModelProto:
    """Return the model with float16 weights and arithmetic, but for the nodes in `keep`.

    Input and output stay float32, so callers need no change.
    """
    halved: ModelProto = convert_float_to_float16(
        ModelProto.FromString(model.SerializeToString()), keep_io_types=True, node_block_list=list(keep)
    )
    OnnxModel(halved).topological_sort()  # the converter appends the input's cast at the end
    if keep:  # between two nodes in float32 the converter goes through float16
        joined = ir.from_proto(halved)
        for node in joined.graph:
            made = node.inputs[0].producer() if _casts_to(node, ir.DataType.FLOAT) and node.inputs[0] else None
            if made is not None and _casts_to(made, ir.DataType.FLOAT16):
                node.replace_input_with(0, made.inputs[0])
        RemoveUnusedNodesPass()(joined)
        halved = ir.to_proto(joined)
    return halved


def overflowing(model: ModelProto, images: Iterable[Floats]) -> list[str]:
    """Return the nodes, in order, that read or make a value or constant beyond LARGEST on `images`, each (n, 3, s, s)."""
    probe = onnx.shape_inference.infer_shapes(model)
    constants = {tensor.name: tensor for tensor in probe.graph.initializer}
    values = [*probe.graph.input, *probe.graph.value_info, *probe.graph.output]
    names = list(dict.fromkeys(value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT))
    del probe.graph.output[:]
    for name in names:
        probe.graph.node.append(helper.make_node("Abs", [name], [f"{name}:size"]))
        probe.graph.node.append(helper.make_node("ReduceMax", [f"{name}:size"], [f"{name}:largest"], keepdims=0))
        probe.graph.output.append(helper.make_tensor_value_info(f"{name}:largest", TensorProto.FLOAT, []))
    session = open_session(probe.SerializeToString())
    largest = np.max([session.run(None, {session.get_inputs()[0].name: part}) for part in sliced(images)], axis=0)
    beyond = {name for name, value in zip(names, largest, strict=True) if not value <= LARGEST}
    beyond |= {
        name
        for name, tensor in constants.items()
        if tensor.data_type == TensorProto.FLOAT and np.abs(numpy_helper.to_array(tensor)).max(initial=0) > LARGEST
    }
    return [node.name for node in model.graph.node if not beyond.isdisjoint((*node.input, *node.output))]


def is_finite(path: Path, images: Iterable[Floats]) -> bool:
    """Tell whether the file answers all images, each (n, 3, s, s), with finite numbers."""
    session = open_session(path)
    name = session.get_inputs()[0].name
    return all(np.isfinite(values).all() for part in sliced(images) for values in session.run(None, {name: part}))


def sliced(images: Iterable[Floats]) -> Iterator[Floats]:
    """Yield the images a few at a time."""
    for batch in images:
        for start in range(0, len(batch), SLICE):
            yield batch[start : start + SLICE]


def _casts_to(node: ir.Node, kind: ir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to", 0) == kind
