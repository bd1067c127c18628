"""Networks of other programs: ONNX files, torch.export's archives. Runs no code in them."""

import io
import json
import operator
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from compress.errors import ModelError
from compress.models.digest import existing_file
from compress.models.external_data import data_files, whole
from compress.models.onnx_layers import spell_out_, teach_converter
from compress.models.outputs import tensors_of
from compress.quant.graph.trace import trace
from export.onnx_file.targets import CPU, CUDA
from export.runtime.native import RUNTIME_ERRORS, first_line
from export.runtime.providers import runtime_named
from export.runtime.session import open_session

# Raised by onnx2torch, torch.fx and ONNX Runtime for what they do not support.
CANNOT: tuple[type[Exception], ...] = (NotImplementedError, ValueError, KeyError, TypeError, *RUNTIME_ERRORS)
AXES_AS_INPUT = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")  # since opset 18
LAST: dict[str, Callable[[Tensor], Tensor]] = {"Softmax": lambda logits: logits.softmax(1), "Sigmoid": torch.sigmoid}
FLOATS = ("tensor(float)", "tensor(float16)")
FLOAT_ROUNDING = 1e-4  # largest difference of ONNX Runtime's and torch's kernels, as a fraction of the largest logit
# The only text allowed in an archive's shapes, as torch has sympy evaluate them.
SYMBOLS = re.compile(
    r"(?:Symbol|Integer|Add|Mul|Pow|Mod|FloorDiv|Max|Min|positive|nonnegative|integer|True|False|'[su]\d+'|[su]\d+|\d+|[-(),= ])*"
)


class OnnxFile(nn.Module):
    """An ONNX file that ONNX Runtime runs, on the images' device; it cannot be trained or cut."""

    def __init__(self, file: Path) -> None:
        """Open the file. Raises ModelError where its input is not one float tensor of images."""
        super().__init__()
        self.file = file
        model = whole(file)
        self._source = model.SerializeToString() if data_files(file) else file
        self._sessions = {CPU: open_session(self._source)}
        given = self._sessions[CPU].get_inputs()
        if len(given) != 1 or len(given[0].shape) != 4 or given[0].type not in FLOATS:
            found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in given)
            raise ModelError(
                f"{file}: must take one float tensor of images, takes {found}; export it with such an input"
            )
        self.shape, self.float16 = given[0].shape, given[0].type == "tensor(float16)"
        wanted = [one.name for one in self._sessions[CPU].get_outputs() if one.type in FLOATS]
        self.names = given[0].name, wanted
        self.last = _channels_last(self.shape)

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the output for images (n, channels, height, width), or several by name, float32 on their device."""
        channels = self.shape[3 if self.last else 1]
        if isinstance(channels, int) and channels != images.shape[1]:
            raise ModelError(
                f"{self.file}: takes images of {channels} channels, got {images.shape[1]}: give a network for these images"
            )
        provider = CUDA if images.device.type == "cuda" else CPU
        if provider not in self._sessions:
            self._sessions[provider] = open_session(self._source, runs_in=runtime_named(provider))
        values = images.detach().cpu().numpy().astype(np.float16 if self.float16 else np.float32)
        values = np.ascontiguousarray(values.transpose(0, 2, 3, 1) if self.last else values)
        fixed = self.shape[0] if isinstance(self.shape[0], int) else len(values)
        outputs = []
        for first in range(0, len(values), fixed):
            part = values[first : first + fixed]
            padded = np.concatenate([part, np.repeat(part[-1:], fixed - len(part), axis=0)])
            try:
                found = self._sessions[provider].run(self.names[1], {self.names[0]: padded})
            except RUNTIME_ERRORS as error:
                raise ModelError(
                    f"{self.file}: takes {self.shape}, got {padded.shape} ({first_line(error)}); set its image_size"
                ) from error
            outputs.append([output[: len(part)] for output in found])
        whole = [
            torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(images.device)
            for parts in zip(*outputs, strict=True)
        ]
        return dict(zip(self.names[1], whole, strict=True)) if len(whole) > 1 else whole[0]


class _ChannelsLast(nn.Module):
    """Runs a network that takes images (n, height, width, channels), as Keras's do, on (n, channels, height, width)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's output."""
        output: Tensor = self.network(images.permute(0, 2, 3, 1))
        return output


class _Fixed(nn.Module):
    """A network of torch.export, whose own `train` raises an error."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's output."""
        output: Tensor = self.network(images)
        return output

    def train(self, _mode: bool = True) -> "_Fixed":
        """Keep the mode in which it was exported."""
        return self


def rebuilt(name: str, _num_classes: int = 0) -> nn.Module:
    """Return an ONNX file as a torch network with its weights, without a softmax or sigmoid at its end; several outputs are a dict.

    Raises ModelError where onnx2torch lacks one of its operators, or where outputs differ from the file's on noise.
    """
    converter = library("onnx2torch", "onnx")
    teach_converter()
    file = existing_file(name, "the ONNX file")
    black_box = OnnxFile(file)
    advice = "so it cannot be cut or trained: name it as `teacher` and add a student stage for another network"
    try:
        proto = _static(file, black_box.shape)
        last = _without_probabilities_(proto) if len(proto.graph.output) == 1 else None
        found = converter.convert(proto).eval()
        graph = _with_numbers(fx.GraphModule(found, _Inlined().trace(found), file.stem))
        if len(proto.graph.output) > 1:
            _name_outputs_(graph, [one.name for one in proto.graph.output])
    except CANNOT as error:
        raise ModelError(
            f"{file}: onnx2torch cannot rebuild it ({str(error).strip() or type(error).__name__}), {advice}"
        ) from error
    network: nn.Module = _ChannelsLast(graph) if black_box.last else graph
    for tensor in network.state_dict().values():
        tensor.data = tensor.data.clone()  # the file's bytes are read-only
    _, channels, height, width = _channels_first(black_box.shape)
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    expected = black_box(images)
    try:
        with torch.no_grad():
            outputs = network(images)
            outputs = LAST[last](outputs) if last else outputs
            both = [dict(tensors_of(one)) for one in (outputs, expected)]
            both[0] = {name: both[0][name] for name in both[1]}
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{file}: rebuilt, it does not run on two images ({first_line(error)}), {advice}") from error
    for output, wanted in zip(*(one.values() for one in both), strict=True):
        difference = float((output - wanted).abs().max())
        if not difference <= FLOAT_ROUNDING * max(1.0, float(wanted.abs().max())):
            raise ModelError(f"{file}: rebuilt, its outputs differ from the file's by up to {difference:.2g}, {advice}")
    return network


def _name_outputs_(network: fx.GraphModule, names: Sequence[str]) -> None:
    """Make a graph that returns a tuple return a dict."""
    (output,) = network.graph.find_nodes(op="output")
    output.args = (dict(zip(names, output.args[0], strict=True)),)
    network.recompile()


def read_program(name: str) -> ExportedProgram:
    """Read an archive of torch.export.save; raise ModelError where reading it could run code, and for other files."""
    file = existing_file(name, "the archive")
    try:
        with zipfile.ZipFile(file) as archive:
            _refuse_code(archive, file)
        return torch.export.load(file)
    except (zipfile.BadZipFile, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise ModelError(
            f"{file}: is not an archive of torch.export.save ({first_line(error)}); save it again"
        ) from error


def exported(name: str, _num_classes: int = 0) -> nn.Module:
    """Return the network in an archive of torch.export.save, as layers if it can be traced, else as a fixed program."""
    program = read_program(name)
    network: nn.Module = _Fixed(program.module())
    if program.example_inputs:
        images = program.example_inputs[0][0]
        with suppress(ModelError):
            traced = trace(network, images)
            with torch.no_grad():
                found = network(images)
            if isinstance(found, Tensor):
                return traced
            names = [name for name, _ in tensors_of(found)]
            if len(names) == len(tree_leaves(found)):
                (output,) = traced.graph.find_nodes(op="output")
                output.args = (output.args if len(names) == 1 else output.args[0],)
                _name_outputs_(traced, names)
                return traced
    return network


def _refuse_code(archive: zipfile.ZipFile, file: Path) -> None:
    """Raise ModelError for pickles of more than tensors, and for shapes that are more than sums and products."""
    names = archive.namelist()
    configs = [json.loads(archive.read(name)) for name in names if name.endswith("_config.json")]
    entries = [entry for config in configs for entry in config.get("config", {}).values()]
    bad = [entry["path_name"] for entry in entries if entry["use_pickle"] or entry.get("tensor_meta") is None]
    for name in names:
        if "/sample_inputs/" in name:
            try:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError):
                bad.append(name)
        elif "/models/" in name:
            shapes = _values(json.loads(archive.read(name)), "expr_str")
            bad += [shape for shape in shapes if not (isinstance(shape, str) and SYMBOLS.fullmatch(shape))]
    bad += [name for name in names if names.count(name) > 1]  # torch might read the one that was not checked
    if bad or not configs:
        raise ModelError(
            f"{file}: needs code to be read ({bad[0] if bad else 'an old format'}), which was not run; save it with plain "
            f"tensors as weights, with torch.export.save of torch {torch.__version__.partition('+')[0]}"
        )


def _values(document: Any, key: str) -> Iterator[Any]:
    """Yield all values of a key, anywhere in a JSON document."""
    if isinstance(document, dict):
        yield from (value for name, value in document.items() if name == key)
    for part in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from _values(part, key)


def _static(file: Path, shape: list[int | str | None]) -> onnx.ModelProto:
    """Return the file's graph for any number of images, with all arithmetic on shapes folded, as fx cannot trace it.

    ONNX Runtime folds it for one image; reshapes to one image are then made to keep the batch size. Batch-norms stay.
    """
    proto = whole(file)
    sizes = (1, *(size if isinstance(size, int) else 0 for size in shape[1:]))
    for dim, size in zip(proto.graph.input[0].type.tensor_type.shape.dim, sizes, strict=True):
        if size:
            dim.dim_value = size
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath, options.log_severity_level = f"{folder}/static.onnx", 4
        onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=[CPU], disabled_optimizers=["ConvBNFusion", "ConvMulFusion"]
        )
        static = onnx.load(options.optimized_model_filepath)
    static = onnx.shape_inference.infer_shapes(static)  # later opsets' operators would have no shapes as of opset 17
    known = {tensor.name: tensor for tensor in static.graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in static.graph.value_info}
    for node in static.graph.node:
        if node.op_type == "Reshape" and node.input[1] in known:
            wanted = numpy_helper.to_array(known[node.input[1]]).copy()
            if len(wanted) == 2 and ranks.get(node.input[0]) == 4:  # a flatten names no channels, which may be cut
                del node.input[1], node.attribute[:]
                node.op_type = "Flatten"
                continue
            wanted[:1] = np.where(wanted[:1] == 1, 0, wanted[:1])
            name = f"{node.output[0]}_shape"
            static.graph.initializer.append(numpy_helper.from_array(wanted, name))
            node.input[1] = name
            kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
    _as_opset_17_(static)
    spell_out_(static)
    return static


def _without_probabilities_(proto: onnx.ModelProto) -> str | None:
    """Remove a softmax or sigmoid at the end, as in Keras's classifiers, so that the output is logits; return its operator."""
    (output, *_) = proto.graph.output
    last = next((node for node in proto.graph.node if output.name in node.output), None)
    if last is None or last.op_type not in LAST:
        return None
    proto.graph.node.remove(last)
    output.name = last.input[0]
    return str(last.op_type)


def _as_opset_17_(proto: onnx.ModelProto) -> None:
    """Write newer opsets' operators as in opset 17, the last that onnx2torch knows; `rebuilt` compares the outputs."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = min(entry.version, 17)
    for node in proto.graph.node:
        if node.op_type == "Split":
            kept = [attribute for attribute in node.attribute if attribute.name != "num_outputs"]
            del node.attribute[:]
            node.attribute.extend(kept)
        elif node.op_type in AXES_AS_INPUT and len(node.input) == 2 and node.input[1] in known:
            node.attribute.append(onnx.helper.make_attribute("axes", known[node.input.pop()].tolist()))


class _Inlined(fx.Tracer):
    """Traces through onnx2torch's own modules, so that only layers of torch.nn are left."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module stays a single call."""
        return not type(m).__module__.startswith("onnx2torch") and super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        """Take numpy's integers, which onnx2torch's slices have, as Python's."""
        return super().create_arg(int(a) if isinstance(a, np.integer) else a)


def _with_numbers(network: fx.GraphModule) -> fx.GraphModule:
    """Return the network with its single whole numbers as such, not as tensors, whose values torch.export does not know: Keras's axes."""
    numbers = {}
    for node in network.graph.find_nodes(op="get_attr"):
        value = getattr(network, str(node.target), None)
        if isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.int64:
            numbers[node] = int(value)
    for user in {user for node in numbers for user in node.users}:
        user.args = fx.map_arg(user.args, lambda part: numbers.get(part, part))
        user.kwargs = fx.map_arg(user.kwargs, lambda part: numbers.get(part, part))
    for node in numbers:
        network.graph.erase_node(node)
    for node in network.graph.find_nodes(op="call_function", target=operator.getitem):
        if isinstance(node.args[1], list):  # onnx2torch's slices, which torch no longer takes in a list
            node.args = (node.args[0], tuple(node.args[1]))
    network.recompile()
    return network


def _channels_last(shape: list[int | str | None]) -> bool:
    return shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)


def _channels_first(shape: list[int | str | None]) -> tuple[int, ...]:
    """Return an input's shape as (n, channels, height, width), with 1, 3, 224, 224 for sizes that the file leaves open."""
    batch, *rest = shape
    channels, *sides = [rest[2], rest[0], rest[1]] if _channels_last(shape) else rest
    return (
        batch if isinstance(batch, int) else 1,
        channels if isinstance(channels, int) else 3,
        *(side if isinstance(side, int) else 224 for side in sides),
    )


def library(name: str, extra: str) -> ModuleType:
    """Return a package; raise ModelError with the extra that installs it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"{name}: cannot be imported ({error}); pip install prune-distill-quantize[{extra}]"
        ) from error
