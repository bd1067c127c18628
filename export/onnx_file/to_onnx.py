"""Write a torch module as one ONNX file that older servers can read. The only file of `export` that imports torch."""

import builtins
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from onnx import ModelProto
from torch import fx, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.overrides import TorchFunctionMode

from export.errors import BundleError
from export.images.size import Shape
from export.onnx_file.graph import INPUT, OUTPUT, finish, save_model
from export.onnx_file.outputs import Output

OPSET = 18
ATTENTION = (scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
CLIPS = (torch.clamp, torch.clip, *(getattr(torch.Tensor, name) for name in ("clamp", "clamp_", "clip", "clip_")),
         torch.ops.aten.clamp.default, torch.ops.aten.clip.default)  # fmt: skip
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
MASKS, EXPORTING = "transformers.masking_utils", "is_torchdynamo_exporting"
READ_OPERATORS = ONNXRegistry.from_torchlib
SUMMARY = re.compile(r"^<class '.+?'>: (.+)$", re.MULTILINE)  # each exception that caused an OnnxExporterError


def to_onnx(
    model: nn.Module, path: Path, *, shape: Shape, metadata: Mapping[str, str], outputs: Sequence[Output] = ()
) -> None:
    """Export `model` (in eval mode, on the CPU) with input (batch, *shape), the batch dynamic.

    The file has opset 18 and IR 9, contains its weights and `metadata`, names its nodes after their modules, and passes
    ONNX's checker. Several `outputs`, which the model lays side by side, are the file's. Raises BundleError if torch cannot write it.
    """
    named = with_named_calls(model) if isinstance(model, fx.GraphModule) else model
    program = _exported(named, [(INPUT, shape)], [OUTPUT], ({0: torch.export.Dim("batch")},))
    save_model(finish(program.model, opset=OPSET, metadata=metadata, outputs=outputs), path)


def graph_to_onnx(
    model: nn.Module, inputs: Sequence[tuple[str, tuple[int, ...]]], outputs: Sequence[str]
) -> ModelProto:
    """Return a module (*inputs) -> outputs, tensors by name with any batch size, as a graph; BundleError if torch cannot write it."""
    batch = {0: torch.export.Dim("batch")}
    program = _exported(model, inputs, outputs, {"outputs": (batch,) * len(inputs)})
    return finish(program.model, opset=OPSET, metadata={})


def _exported(
    model: nn.Module,
    inputs: Sequence[tuple[str, tuple[int, ...]]],
    outputs: Sequence[str],
    sizes: tuple[Any, ...] | dict[str, Any],
) -> torch.onnx.ONNXProgram:
    try:
        # When it fails, it prints the partial graph of each try.
        with (
            as_it_runs(model),
            patch.object(torch, "_check_tensor_all", lambda *_: None),  # checks; ONNX has no such operator
            operators_read_once(),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
            _AttentionOfFourDimensions(),
            _BoundsOfOneType(),
        ):
            program = torch.onnx.export(
                model,
                tuple(torch.zeros(2, *shape) for _, shape in inputs),  # torch.export would make a batch of 1 a constant
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=sizes,
                input_names=[name for name, _ in inputs],
                output_names=list(outputs),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = next(iter(SUMMARY.findall(str(error))), "torch does not say why")
        raise BundleError(
            f"{type(model).__name__}: cannot be written as ONNX ({reason}): "
            "its forward must not branch on values, and must use operators that ONNX has"
        ) from error
    assert program is not None
    return program


@contextmanager
def as_it_runs(model: nn.Module) -> Iterator[None]:
    """Make torch.export record what the model does when it runs.

    `len(tensor)` in the files of its modules is the first size, which stays open, where Python's is a constant: transformers' RT-DETR and
    D-FINE take their batch size so. And transformers builds masks that hide nothing only while it is exported.
    """

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else builtins.len(value)

    files = {id(found): found for module in model.modules() if (found := vars(sys.modules[type(module).__module__]))}
    changed = [names for names in files.values() if "len" not in names]
    masks = vars(sys.modules.get(MASKS, builtins))
    asks = masks.get(EXPORTING)
    for names in changed:
        names["len"] = length
    if asks:
        masks[EXPORTING] = lambda: False
    try:
        yield
    finally:
        for names in changed:
            del names["len"]
        if asks:
            masks[EXPORTING] = asks


@lru_cache(maxsize=1)
def _operators(opset: int, _modules: int) -> ONNXRegistry:
    """Return the exporter's table of operators. Whatever is imported may bring further ones."""
    return READ_OPERATORS(opset)


@contextmanager
def operators_read_once() -> Iterator[None]:
    """Keep the exporter's table of operators, which it makes anew for every export, in a quarter of the export's time."""
    ONNXRegistry.from_torchlib = staticmethod(lambda opset_version: _operators(opset_version, len(sys.modules)))  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = READ_OPERATORS  # type: ignore[method-assign]


class _AttentionOfFourDimensions(TorchFunctionMode):
    """Gives attention the dimensions (n, heads, tokens, size), the only ones that torch writes as ONNX, and its output those it had.

    Blocks of an image (n, blocks, heads, tokens, size) are joined with the images; without heads (n, tokens, size) there is one.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        if function not in ATTENTION:
            return function(*args, **(kwargs or {}))
        given = dict(zip(ARGUMENTS, args, strict=False)) | dict(kwargs or {})
        query, mask = given["query"], given.get("attn_mask")
        if query.dim() in (2, 4) or (query.dim() > 4 and mask is not None and mask.dim() > 3):
            return function(*args, **(kwargs or {}))
        changed = ARGUMENTS[:4] if mask is not None and mask.dim() == 3 == query.dim() else ARGUMENTS[:3]
        given |= {
            name: given[name].unsqueeze(1) if query.dim() == 3 else given[name].flatten(0, -4) for name in changed
        }
        attended = function(**given)
        return attended.squeeze(1) if query.dim() == 3 else attended.unflatten(0, query.shape[:-3])


class _BoundsOfOneType(TorchFunctionMode):
    """Makes both bounds of a clamp floats where one is: torch's exporter makes a tensor of the other, which clamp then refuses."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        bounds = [*args[1:], *(kwargs or {}).values()]
        if function not in CLIPS or not any(isinstance(bound, float) for bound in bounds):
            return function(*args, **(kwargs or {}))
        given = {name: float(bound) if isinstance(bound, int) else bound for name, bound in (kwargs or {}).items()}
        return function(*(float(one) if isinstance(one, int) else one for one in args), **given)


class _Call(nn.Module):
    """A function or method as a module, so that its ONNX nodes carry its name."""

    def __init__(self, target: Callable[..., object] | str) -> None:
        super().__init__()
        self.target = target

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call it."""
        function = getattr(args[0], self.target) if isinstance(self.target, str) else self.target
        return function(*(args[1:] if isinstance(self.target, str) else args), **kwargs)


def with_named_calls(model: fx.GraphModule) -> fx.GraphModule:
    """Return the traced network, sharing its modules, with every function wrapped as a module of its node's name.

    Without this, an addition would be `Add_3` instead of `add_3/Add`, as a traced network calls all functions in one forward.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    named = fx.GraphModule(model, graph)
    for node in named.graph.nodes:
        if node.op in ("call_function", "call_method") and not hasattr(named, node.name):
            named.add_submodule(node.name, _Call(node.target))
            node.op, node.target = "call_module", node.name
            node.meta.pop("nn_module_stack", None)  # else the exporter uses the enclosing block's name
    named.recompile()
    return named
