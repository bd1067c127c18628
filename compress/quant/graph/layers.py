"""The operators that torch.export records, as layers and functions of torch.nn."""

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

aten = torch.ops.aten
Arguments = tuple[Any, ...]
Options = Mapping[str, Any]
Call = tuple[Callable[..., Any], Arguments, Options]


@dataclass
class Lifted:
    """A graph under construction: its nodes, and the layers, parameters and constants that they name."""

    graph: fx.Graph
    attributes: dict[str, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # of the module's own tensors, by identity
    layers: dict[tuple[object, ...], str] = field(default_factory=dict)
    scope: Mapping[str, Any] = field(default_factory=dict)  # the modules around the current operator

    def constant(self, name: str, tensor: Tensor) -> Tensor:
        """Return one of the module's own tensors, and remember its name."""
        self.names[id(tensor)] = name
        return tensor

    def call(self, function: Callable[..., Any], args: Arguments, kwargs: Options) -> fx.Node:
        """Record a call; tensors among its arguments become attributes."""
        node = self.graph.call_function(function, self.readable(args), self.readable(dict(kwargs)))
        node.meta["nn_module_stack"] = self.scope
        return node

    def call_layer(
        self, path: str, layer: nn.Module, values: fx.Node, key: tuple[object, ...], stack: str | None
    ) -> fx.Node:
        """Record a layer's call with its Python `stack`; the same `key` means the same layer, called again."""
        if key not in self.layers:
            self.layers[key] = self._free(path)
            self.attributes[self.layers[key]] = layer
        node = self.graph.call_module(self.layers[key], (values,))
        node.meta |= {"nn_module_stack": self.scope, "stack_trace": stack}
        return node

    def readable(self, argument: Any) -> Any:
        """Return an argument with each tensor replaced by a node. What is computed from parameters alone becomes a parameter itself."""
        if isinstance(argument, Tensor):
            name = self.names.setdefault(id(argument), self._free(f"{self.here}.constant".lstrip(".")))
            if argument.requires_grad and not isinstance(argument, nn.Parameter):
                argument = nn.Parameter(argument.detach().clone())
            self.attributes[name] = argument
            return self.graph.get_attr(name)
        if isinstance(argument, tuple | list):
            return type(argument)(self.readable(part) for part in argument)
        if isinstance(argument, dict):
            return {name: self.readable(part) for name, part in argument.items()}
        return argument

    @property
    def here(self) -> str:
        """The path of the module that the current operator belongs to."""
        return [path for path, _ in self.scope.values()][-1] if self.scope else ""

    def path_of(self, weight: Tensor) -> str:
        """Return the path for a layer with this weight: the weight's own, or that of the module that computed it."""
        name = self.names.get(id(weight))
        return (
            self.here if name is None else name.removesuffix("running_mean").removesuffix("weight").rstrip("._") or name
        )

    def _free(self, path: str) -> str:
        path, tried, number = path or "layer", path or "layer", 0
        while tried in self.attributes:
            number += 1
            tried = f"{path}_{number}"
        return tried


def layer_of(lifted: Lifted, packet: object, args: Arguments, kwargs: Options, node: fx.Node) -> fx.Node | None:
    """Return an operator with constant weights as the call of a layer, or None."""
    make = LAYERS.get(packet)
    names = [argument.name for argument in node.target._schema.arguments] if make else []  # type: ignore[union-attr]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    values, weight = given.get("input", given.get("self")), given.get("weight", given.get("other"))
    if make is None or not isinstance(values, fx.Node) or not isinstance(weight, Tensor | None):
        return None
    layer = make(given, node.all_input_nodes[0].meta["val"].dim())
    if layer is None:
        return None
    own = [given.get(name) for name in ("weight", "bias", "running_mean", "other")]
    anchor = next(tensor for tensor in (weight, given.get("running_mean"), torch.empty(0)) if tensor is not None)
    key = (packet, *(id(tensor) if isinstance(tensor, Tensor) else None for tensor in own), layer.extra_repr())
    return lifted.call_layer(lifted.path_of(anchor), layer, values, key, node.stack_trace)


def _with_weights(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """Return the layer with copies of the tensors as its parameters and buffers."""
    for name, tensor in tensors.items():
        if tensor is not None and name in layer._buffers:
            layer._buffers[name] = tensor.detach().clone()
        elif tensor is not None:
            setattr(layer, name, nn.Parameter(tensor.detach().clone()))
    return layer


def _convolution(given: Options, _dimensions: int) -> nn.Module | None:
    weight, bias, groups = given["weight"], given.get("bias"), given.get("groups", 1)
    padding = given.get("padding", (0, 0))
    padding = padding if isinstance(padding, str) else _pair(padding)
    layer = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), _pair(given.get("stride", 1)), padding,
        _pair(given.get("dilation", 1)), groups, bias is not None, device="meta",
    )  # fmt: skip
    return _with_weights(layer, weight=weight, bias=bias)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _linear(given: Options, _dimensions: int) -> nn.Module | None:
    weight, bias = given["weight"], given.get("bias")
    if weight.dim() != 2:  # a mean by fixed weights, as D-FINE's of its distances
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with_weights(layer, weight=weight, bias=bias)


def _product(given: Options, dimensions: int) -> nn.Module | None:
    """A product with a constant matrix is a linear layer."""
    return _linear({"weight": given["other"].T}, dimensions) if given["other"].dim() == 2 else None


def _batch_norm(given: Options, dimensions: int) -> nn.Module | None:
    mean = given["running_mean"]
    if mean is None or given["training"]:
        return None
    kind = {4: nn.BatchNorm2d, 2: nn.BatchNorm1d, 3: nn.BatchNorm1d}.get(dimensions)
    if kind is None:
        return None
    layer = kind(len(mean), given["eps"], given["momentum"])
    return _with_weights(
        layer, weight=given["weight"], bias=given["bias"], running_mean=mean, running_var=given["running_var"]
    )


def _layer_norm(given: Options, _dimensions: int) -> nn.Module | None:
    weight, bias = given.get("weight"), given.get("bias")
    layer = nn.LayerNorm(tuple(given["normalized_shape"]), given.get("eps", 1e-5), weight is not None, bias is not None)
    return _with_weights(layer, weight=weight, bias=bias)


def _group_norm(given: Options, _dimensions: int) -> nn.Module | None:
    weight, bias = given.get("weight"), given.get("bias")
    if weight is None:
        return None
    return _with_weights(
        nn.GroupNorm(given["num_groups"], len(weight), given.get("eps", 1e-5)), weight=weight, bias=bias
    )


def _transposed(given: Options, _dimensions: int) -> nn.Module | None:
    weight, bias, groups = given["weight"], given.get("bias"), given.get("groups", 1)
    layer = nn.ConvTranspose2d(
        weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), _pair(given.get("stride", 1)), _pair(given.get("padding", 0)),
        _pair(given.get("output_padding", 0)), groups, bias is not None, _pair(given.get("dilation", 1)), device="meta",
    )  # fmt: skip
    return _with_weights(layer, weight=weight, bias=bias)


LAYERS: Mapping[object, Callable[[Options, int], nn.Module | None]] = {
    aten.conv2d: _convolution,
    aten.conv_transpose2d: _transposed,
    aten.linear: _linear,
    aten.matmul: _product,
    aten.batch_norm: _batch_norm,
    aten.layer_norm: _layer_norm,
    aten.group_norm: _group_norm,
}


def _as(function: Callable[..., Any]) -> Callable[[Arguments, Options], Call]:
    """Call `function` with the operator's own arguments."""
    return lambda args, kwargs: (function, args, kwargs)


def _binary(function: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[[Arguments, Options], Call]:
    """Call Python's `function` on two arguments, `otherwise` where there are options such as `alpha`."""
    return lambda args, kwargs: (function if len(args) == 2 and not kwargs else otherwise, args, kwargs)


def _clip(args: Arguments, kwargs: Options) -> Call:
    low, high = (*args[1:], -1, 1)[:2] if len(args) < 3 else args[1:3]
    return (F.relu6, args[:1], {}) if (low, high) == (0, 6) else (F.hardtanh, args, kwargs)


def _mean(args: Arguments, kwargs: Options) -> Call:
    keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    axes = [args[1]] if len(args) > 1 else []
    return torch.mean, (args[0], *axes), {"keepdim": True} if keep else {}


def _max_pool(args: Arguments, kwargs: Options) -> Call:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return F.max_pool2d, args[:1], dict(zip(names, args[1:], strict=False)) | dict(kwargs)


FUNCTIONS: Mapping[object, Callable[[Arguments, Options], Call]] = {
    aten.relu: _as(F.relu),
    aten.relu6: _as(F.relu6),
    aten.hardtanh: _clip,
    aten.silu: _as(F.silu),
    aten.hardswish: _as(F.hardswish),
    aten.hardsigmoid: _as(F.hardsigmoid),
    aten.sigmoid: _as(torch.sigmoid),
    aten.leaky_relu: _as(F.leaky_relu),
    aten.add: _binary(operator.add, torch.add),
    aten.mul: _binary(operator.mul, torch.mul),
    aten.div: _binary(operator.truediv, torch.div),
    aten.cat: _as(torch.cat),
    aten.copy: lambda arguments, _: (
        aten.expand_as.default,
        (arguments[1], arguments[0]),
        {},
    ),  # copy has no derivative
    aten.concat: _as(torch.cat),
    aten.mean: _mean,
    aten.adaptive_avg_pool2d: _as(F.adaptive_avg_pool2d),
    aten.avg_pool2d: _as(F.avg_pool2d),
    aten.max_pool2d: _max_pool,
    aten.flatten: _as(torch.flatten),
    aten.view: _as(torch.reshape),
    aten.reshape: _as(torch.reshape),
    aten.permute: _as(torch.permute),
    aten.transpose: _as(torch.transpose),
    aten.squeeze: _as(torch.squeeze),
    aten.unsqueeze: _as(torch.unsqueeze),
    aten.chunk: _as(torch.chunk),
    aten.split: _as(torch.split),
    aten.split_with_sizes: _as(torch.split),
    aten.channel_shuffle: _as(F.channel_shuffle),
}


def _takes_all(node: fx.Node) -> bool:
    """Tell whether a slice is `[:]`, which NumPy's indices leave behind; a write into it is one into the tensor."""
    start, end, step = (*node.args[2:], None, None, None)[:3]
    return start in (None, 0) and end in (None, sys.maxsize) and step in (None, 1)


def _always(_node: fx.Node) -> bool:
    return True


def _same_type(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == node.all_input_nodes[0].meta["val"].dtype)


# Operators that do not change values in eval mode.
IDENTITIES: Mapping[object, Callable[[fx.Node], bool]] = {
    **dict.fromkeys(
        (aten.dropout, aten.dropout_, aten.feature_dropout, aten.feature_dropout_, aten.alpha_dropout, aten.alpha_dropout_,
         aten.feature_alpha_dropout, aten.detach, aten.alias, aten.contiguous, aten.clone, aten.lift_fresh_copy), _always),
    **dict.fromkeys((aten.to, aten._to_copy, aten.type_as), _same_type),
    aten.slice: _takes_all,
}  # fmt: skip


def pad_into_convolutions_(graph: fx.GraphModule) -> None:
    """Move zero padding that only one convolution reads into that convolution; sides may differ, as in ONNX."""
    for node in list(graph.graph.nodes):
        users = list(node.users)
        if getattr(node.target, "overloadpacket", None) not in (aten.pad, aten.constant_pad_nd) or len(users) != 1:
            continue
        sides, mode, value = (
            (*node.args[1:], *("constant", 0)[len(node.args) - 2 :])[:3] if len(node.args) < 4 else node.args[1:4]
        )
        layer = graph.get_submodule(str(users[0].target)) if users[0].op == "call_module" else None
        if (
            type(layer) is not nn.Conv2d
            or mode != "constant"
            or value
            or len(sides) != 4
            or isinstance(layer.padding, str)
        ):
            continue
        rows, columns = layer.padding
        left, right, top, bottom = (side + own for side, own in zip(sides, (columns, columns, rows, rows), strict=True))
        if (left, top) == (right, bottom):
            layer.padding = (top, left)
        else:  # nn.Conv2d's own path for padding that is not zeros
            layer.padding, layer.padding_mode = (0, 0), "constant"  # type: ignore[assignment]
            layer._reversed_padding_repeated_twice = [left, right, top, bottom]
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
