"""Find nodes of a float file whose values overflow half precision on real images, and check that a file's outputs are finite."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.runtime.session import open_session

LARGEST_HALF = 65504 / 2  # half of float16's largest, as a margin for other images
SLICE = 8  # images per run

Floats = NDArray[np.float32]


def overflowing(model: ModelProto, images: Iterable[Floats]) -> list[str]:
    """Return the names of nodes, in order, with an input, output or constant beyond LARGEST_HALF on `images`, each (n, c, h, w)."""
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
    beyond = {name for name, value in zip(names, largest, strict=True) if not value <= LARGEST_HALF}
    beyond |= {
        name
        for name, tensor in constants.items()
        if tensor.data_type == TensorProto.FLOAT and np.abs(numpy_helper.to_array(tensor)).max(initial=0) > LARGEST_HALF
    }
    return [node.name for node in model.graph.node if not beyond.isdisjoint((*node.input, *node.output))]


def is_finite(path: Path, images: Iterable[Floats]) -> bool:
    """Tell whether the file's outputs for all `images`, each (n, c, h, w), are finite."""
    session = open_session(path)
    name = session.get_inputs()[0].name
    return all(np.isfinite(values).all() for part in sliced(images) for values in session.run(None, {name: part}))


def sliced(images: Iterable[Floats]) -> Iterator[Floats]:
    """Yield the images in slices of SLICE."""
    for batch in images:
        for start in range(0, len(batch), SLICE):
            yield batch[start : start + SLICE]
