"""Read an ONNX file's facts without running it: its image input, its outputs, the precision it computes in."""

import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Literal

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from export.errors import BundleError
from export.images.size import Shape
from export.onnx_file.outputs import Output

Precision = Literal["fp32", "fp16", "int8"]
DTYPES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.UINT8: "uint8"}
MAX_BYTES = 2**31 - 1  # protobuf's own limit
MAX_NODES = 100_000
MAX_RANK = 16  # dimensions of a tensor
MAX_IMAGE_SIZE, CHANNELS = 4096, (1, 3, 4)
MAX_OUTPUTS = 2**28
# Allowed tensor types, and the bits of one value.
BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.DOUBLE: 64, TensorProto.BOOL: 8,
    TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.INT16: 16, TensorProto.INT32: 32, TensorProto.INT64: 64,
    TensorProto.UINT4: 4, TensorProto.UINT8: 8, TensorProto.UINT16: 16, TensorProto.UINT32: 32, TensorProto.UINT64: 64,
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """An input or output; a dynamic size is None."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class ModelFile:
    """The facts of one file."""

    input: Value
    outputs: tuple[Value, ...]
    precision: Precision
    opset: int
    ir_version: int
    bytes: int

    @property
    def shape(self) -> Shape:
        """One image as the input takes it: channels, height, width."""
        _, channels, height, width = self.input.shape
        return channels or 0, height or 0, width or 0  # none is 0: `facts_of` looked

    @property
    def signature(self) -> tuple[Output, ...]:
        """The outputs, where there are several; empty for one."""
        found = tuple(Output(one.name, tuple(size or 0 for size in one.shape[1:])) for one in self.outputs)
        return found if len(found) > 1 else ()

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """The shape of the output, or of several packed side by side."""
        batch, *sizes = self.outputs[0].shape
        return (batch, *sizes) if not self.signature else (batch, sum(one.size for one in self.signature))


def inspect(path: Path) -> ModelFile:
    """Read the facts of `path` without running it or opening any other file.

    Raises BundleError if it is not an ONNX model, keeps weights in other files, or does not have one input for images and
    outputs of fixed sizes.
    """
    return facts_of(parse(path), path)


def facts_of(model: ModelProto, path: Path) -> ModelFile:
    """Return the facts of `model`, read from `path`; raises BundleError as `inspect` does."""
    if len(model.graph.input) != 1 or not model.graph.output:
        counts = f"{len(model.graph.input)} inputs and {len(model.graph.output)} outputs"
        raise BundleError(
            f"{path.name}: must have one input, and outputs, got {counts}: export it again", defect="wrong_shape"
        )
    given, outputs = value(model.graph.input[0]), tuple(map(value, model.graph.output))
    channels, *sides = (size or 0 for size in given.shape[1:] or (0,))
    if channels not in CHANNELS or len(sides) != 2 or not all(1 <= side <= MAX_IMAGE_SIZE for side in sides):
        raise BundleError(
            f"{path.name}: {given.name}: must be (batch, 1, 3 or 4 channels, height, width) with at most {MAX_IMAGE_SIZE} pixels a side, "
            f"got {given.shape}: export it again",
            defect="wrong_shape",
        )
    for wanted in outputs:
        sizes = [size or 0 for size in wanted.shape[1:]]
        if not wanted.shape or min(sizes, default=1) < 1 or prod(sizes) > MAX_OUTPUTS // len(outputs):
            raise BundleError(
                f"{path.name}: {wanted.name}: must have fixed sizes, at most {MAX_OUTPUTS // len(outputs)} values per image, "
                f"got {wanted.shape}: export it again",
                defect="wrong_shape",
            )
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    return ModelFile(
        input=given,
        outputs=outputs,
        precision=precision(model),
        opset=opsets.get("", opsets.get("ai.onnx", 0)),
        ir_version=model.ir_version,
        bytes=path.stat().st_size,
    )


def parse(path: Path) -> ModelProto:
    """Return the model in `path`, reading no other file.

    Raises BundleError if it is not an ONNX model, keeps weights in other files (their paths may lead anywhere), or has
    tensors that claim another size than they have.
    """
    model, found = read(path)
    for tensor in found:
        check_tensor(tensor, path.name)
    return model


def read(path: Path) -> tuple[ModelProto, list[TensorProto]]:
    """Return the model in `path` with its tensors, which are not checked; raise BundleError if it is not an ONNX model."""
    if not path.is_file():
        raise BundleError(f"{path}: no such file", defect="missing_file")
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise BundleError(
            f"{path.name}: must have 1 to {MAX_BYTES} bytes, got {size}: export it again",
            defect="too_large" if size else "not_onnx",
        )
    try:
        # format="protobuf", because onnx would read JSON or text if the file's name ends so.
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
        if not model.graph.node:
            raise BundleError(f"{path.name}: is not an ONNX model (no graph in it): export it again", defect="not_onnx")
        if (count := len(model.graph.node) + sum(len(function.node) for function in model.functions)) > MAX_NODES:
            raise BundleError(
                f"{path.name}: must have at most {MAX_NODES} nodes, got {count}: export it again", defect="too_large"
            )
        if not is_text(model):
            raise BundleError(
                f"{path.name}: is not an ONNX model (a name is not UTF-8): export it again", defect="not_onnx"
            )
        in_functions = (tensor for function in model.functions for tensor in _tensors_of(function.node))
        return model, [*tensors(model.graph), *in_functions]
    except (DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path.name}: is not an ONNX model ({error}): export it again", defect="not_onnx") from error


def check_tensor(tensor: TensorProto, file: str) -> None:
    """Raise BundleError for a tensor in another file, or with more or fewer values than its shape claims.

    A few bytes can claim terabytes, which a trusting reader would allocate first.
    """
    name = tensor.name or "a tensor"
    if is_outside(tensor):
        code = f"import onnx; onnx.save(onnx.load({json.dumps(file)}), {json.dumps(f'one_{file}')})"
        raise BundleError(
            f"{file}: keeps {name} in another file: write it as one file, in its folder: python -c {shlex.quote(code)}",
            defect="external_data",
        )
    if tensor.data_type not in BITS:
        raise BundleError(
            f"{file}: {name}: must be of a known type, got {tensor.data_type}: export it again", defect="not_onnx"
        )
    bits = BITS[tensor.data_type]
    claimed = prod(tensor.dims[:MAX_RANK])
    if tensor.HasField("raw_data"):
        held, wanted = len(tensor.raw_data), ceil(claimed * bits / 8)
    else:
        packed = 8 // bits if bits < 8 else 1
        held, wanted = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type))), ceil(claimed / packed)
    if len(tensor.dims) > MAX_RANK or min(tensor.dims, default=0) < 0 or held != wanted:
        raise BundleError(
            f"{file}: {name}: claims the shape {tuple(tensor.dims[:MAX_RANK])}, which does not match its data: export it again",
            defect="too_large" if wanted > held else "not_onnx",
        )


def is_outside(tensor: TensorProto) -> bool:
    """Tell whether another file keeps the tensor's values."""
    return tensor.data_location == TensorProto.EXTERNAL or bool(tensor.external_data)


def tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield every tensor of the graph: initializers, constants in attributes, and those of subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of(graph.node)


def _tensors_of(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from ([attribute.t] if attribute.HasField("t") else [])
        yield from attribute.tensors
        for sparse in [
            *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
            *attribute.sparse_tensors,
        ]:
            yield from (sparse.values, sparse.indices)
        for subgraph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            yield from tensors(subgraph)


def is_text(message: Message) -> bool:
    """Tell whether every string in a message is UTF-8; for others protobuf returns bytes, which no reader expects."""
    for field, value in message.ListFields():
        values = [value] if isinstance(value, str | bytes | Message | int | float) else value
        if field.type == field.TYPE_STRING and any(isinstance(one, bytes) for one in values):
            return False
        if field.type == field.TYPE_MESSAGE:
            for one in values:  # only the name of a tensor: listing its fields would copy its values
                if not (isinstance(one.name, str) if isinstance(one, TensorProto) else is_text(one)):
                    return False
    return True


def value(info: ValueInfoProto) -> Value:
    """Return the name, shape and numpy dtype of an input or output."""
    tensor = info.type.tensor_type
    if tensor.elem_type not in DTYPES:
        raise BundleError(
            f"{info.name}: must be a tensor of {', '.join(DTYPES.values())}: export it again", defect="wrong_shape"
        )
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return Value(info.name, shape, DTYPES[tensor.elem_type])


def precision(model: ModelProto) -> Precision:
    """Return int8 for a file with any quantized operator, fp16 for one with half-precision tensors, else fp32."""
    operators = {node.op_type for node in model.graph.node}
    if operators & {"QuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"}:
        return "int8"
    return "fp16" if any(tensor.data_type == TensorProto.FLOAT16 for tensor in tensors(model.graph)) else "fp32"
