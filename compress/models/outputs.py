"""Networks of several outputs: a tuple, list, dict or dataclass of tensors becomes one tensor of all their values side by side.

Training, the solve, caches, ranks and scores then work on one tensor, as of any network; `signature_of` says which columns are which
output, and an exported file has the outputs again, by name (`export.onnx_file.graph.named_outputs_`).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from compress.errors import ModelError
from compress.models.structure import output_of
from export.errors import first
from export.images.size import Shape
from export.onnx_file.graph import INPUT
from export.onnx_file.outputs import Output

LOGITS = ("out", "logits")  # the one output of classifiers
TRAINING = ("aux", "loss")  # outputs that only a training needs
SCALES = (2, 1, 0.5, 0.25)


class Packing:
    """A network's forward hook that returns the served outputs: a single one as it is, several side by side, (n, values).

    `served` are their names in order; () for all float tensors; None for a task that reads one output: the logits, or the only one.
    """

    def __init__(self, served: Sequence[str] | None) -> None:
        self.served = served
        self.noted: dict[str, Tensor] | None = None  # what `signature_of` looks at

    def __call__(self, model: nn.Module, inputs: tuple[Tensor], outputs: object) -> object:
        """Return the served outputs. Raises ModelError where one is missing, or where several are and one must be."""
        if self.served is None:
            return outputs if isinstance(outputs, Tensor) else _alone(model, outputs, dict(tensors_of(outputs)))
        named = {name: _as_map(tensor, inputs[0]) for name, tensor in tensors_of(outputs)}
        if isinstance(outputs, Tensor):
            return next(iter(named.values()))
        if missing := [name for name in self.served if name not in named]:
            raise ModelError(
                f"{type(model).__name__}: has no output {missing[0]}, only {', '.join(named)}: name these in model.outputs"
            )
        chosen = {name: named[name] for name in self.served or named}
        if not chosen:
            raise ModelError(
                f"{type(model).__name__}: returns a {type(outputs).__name__} without a float tensor for each image"
            )
        if getattr(model, "packs", False) != (len(chosen) > 1):
            vars(model)["packs"] = len(chosen) > 1  # for `quant.graph.trace`
        if len(chosen) == 1:
            return next(iter(chosen.values()))
        if self.noted is not None:
            self.noted = chosen
            if len({len(tensor) for tensor in chosen.values()}) > 1:
                shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in chosen.items())
                raise ModelError(
                    f"{type(model).__name__}: its outputs must have one row for each image, got {shapes}: name the others in model.outputs"
                )
        return torch.cat(
            [tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1) for tensor in chosen.values()], 1
        )


def _as_map(output: Tensor, images: Tensor) -> Tensor:
    """Return depths (n, height, width) as the map (n, 1, height, width) that they are, told by their sides: the images' by a factor of SCALES."""
    sides = [[side * scale for side in images.shape[2:]] for scale in SCALES]
    return output.unsqueeze(1) if output.dim() == 3 and [*output.shape[1:]] in sides else output


def _alone(model: nn.Module, outputs: object, named: Mapping[str, Tensor]) -> object:
    kept = next((name for name in LOGITS if name in named), None)
    if kept is None:
        return next(iter(named.values())) if len(named) == 1 else outputs
    others = [name for name in named if name not in (kept, *TRAINING)]
    if others:
        raise ModelError(
            f"{type(model).__name__}: returns {', '.join(others)} besides {kept}, and one output is served: return it alone"
        )
    return named[kept]


def tensors_of(outputs: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the float tensors with an axis, by key, field or place (`output_0`), the names of nested ones joined by `_`."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point() and outputs.dim():
            plain = re.sub(r"\W", "_", name, flags=re.ASCII) or "output"
            yield f"{plain}_" if plain == INPUT else plain, outputs
        return
    parts: Mapping[str, object] = {}
    if isinstance(outputs, Mapping):
        parts = {str(key): value for key, value in outputs.items()}
    elif dataclasses.is_dataclass(outputs):
        parts = vars(outputs)
    elif hasattr(outputs, "_asdict"):
        parts = outputs._asdict()
    elif isinstance(outputs, tuple | list):
        parts = {str(place): value for place, value in enumerate(outputs)}
        name = name or "output"
    for key, value in parts.items():
        yield from tensors_of(value, f"{name}_{key}" if name else key)


def serve_(model: nn.Module, served: Sequence[str] | None) -> nn.Module:
    """Make a network return its served outputs (`Packing`); weights and modules keep their names."""
    if isinstance(model, fx.GraphModule) and not isinstance(model.graph.find_nodes(op="output")[0].args[0], fx.Node):
        model = _plain(model)
    model.register_forward_hook(Packing(served))
    return model


def _plain(graph: fx.GraphModule) -> nn.Module:
    """Return a graph as a module of a plain class: a copy of a GraphModule loses its hooks."""
    found: nn.Module = type(type(graph).__name__, (nn.Module,), {"forward": type(graph).forward})()
    for held in ("_modules", "_parameters", "_buffers"):
        setattr(found, held, getattr(graph, held))
    return found.train(graph.training)


@torch.no_grad()
def signature_of(model: nn.Module, shape: Shape) -> tuple[Output, ...]:
    """Return the names and shapes of a network's outputs if it has several, empty for one.

    Raises ModelError for an output that is the same for any image, or whose size varies.
    """
    packing = next(
        (hook for part in model.modules() for hook in part._forward_hooks.values() if isinstance(hook, Packing)), None
    )
    if packing is None:
        return ()
    packing.noted = {}
    output_of(model, shape)
    black = {name: tensor.shape[1:] for name, tensor in packing.noted.items()}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    model(noise)
    found, packing.noted = packing.noted, None
    for name, tensor in found.items():
        if tensor.shape[1:] != black.get(name) or len(tensor) != len(noise):
            raise ModelError(
                f"{type(model).__name__}: the size of {name} varies, {tuple(black.get(name, ()))} and {tuple(tensor.shape[1:])} for two "
                "images: leave it out of model.outputs"
            )
    constant = [name for name, tensor in found.items() if bool((tensor == tensor[:1]).all())]
    if constant:
        raise ModelError(
            f"{type(model).__name__}: gives the same {first(constant)} for any image: name the others in model.outputs"
        )
    return tuple(Output(name, tuple(tensor.shape[1:]) or (1,)) for name, tensor in found.items())
