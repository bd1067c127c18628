"""A network's cost, its classifier, and checks of its output."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import ModelError
from compress.pruning.costs import COSTS, Layer, WidthCost, full_widths
from export.images.size import Shape, Size, size_of

# Image sizes that `classifier` tries, as a network does not state its own.
PROBES = (224, 32, 64, 128, 256, 299, 384)
aten = torch.ops.aten
RESHAPES = ("View", "UnsafeView", "Clone", "Squeeze", "Unsqueeze", "Permute", "Transpose")  # in autograd's record
CLASSIFIES = ("Addmm", "Mm", "Convolution", "Softmax", "LogSoftmax", "Sigmoid")  # there, what ends a classifier
WEIGHTED = (aten.convolution, aten.addmm, aten.mm)  # the operators of convolutions and linear layers


@dataclass(frozen=True)
class Counts:
    """Parameters of a network, and multiply-accumulates of its convolutions and linear layers for one image."""

    params: int
    macs: int


def count(model: nn.Module, shape: Shape) -> Counts:
    """Count parameters, and multiply-accumulates for one image of this shape.

    Products of activations, as in attention, have no weights to prune and do not count; neither do biases. Raises
    ModelError where the network does not take images of this size.
    """
    with FlopCounterMode(display=False) as counter:
        output_of(model, shape)
    flops = counter.get_flop_counts()["Global"]
    macs = sum(flops.get(operation, 0) for operation in WEIGHTED) // 2
    return Counts(sum(parameter.numel() for parameter in model.parameters()), macs)


def width_cost(model: nn.Module, layers: Sequence[Layer], cost: Literal["macs", "params"], shape: Shape) -> WidthCost:
    """Return the network's cost in millions as a function of the layers' widths; costs outside of layers are constant."""
    whole = getattr(count(model, shape), cost) / 1e6
    within = COSTS[cost](layers, 0.0)(*full_widths(layers))
    return COSTS[cost](layers, whole - within)


def classifier(model: nn.Module, known: Shape | None = None) -> str:
    """Return the module path of the classifier: the convolution or linear layer that runs last, on images of a `known` shape.

    Raises ModelError where the network runs neither on these nor at the usual image sizes, or has no such layer.
    """
    ran: list[nn.Module] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    first = next((layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)), 3)
    shapes = [known] if known else []
    shapes += [
        (channels, *size)
        for channels in dict.fromkeys((first, 3))  # the first convolution may read what others computed from the image
        for size in (*_own_sizes(model), *((side, side) for side in PROBES))
    ]
    handles = [layer.register_forward_hook(lambda layer, *_: ran.append(layer)) for layer in layers]
    try:
        for shape in shapes:
            try:
                output_of(model, shape)
            except ModelError:
                ran.clear()
            else:
                break
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise ModelError(
            f"{type(model).__name__}: no convolution or linear layer runs on images (n, {first}, size, size) of {PROBES} pixels; "
            "give a network of such layers"
        )
    paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
    return paths[ran[-1]]


def _own_sizes(model: nn.Module) -> list[Size]:
    """Return the one size that timm's and torchvision's vision transformers are made for, as they note it."""
    noted = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    return [size_of(noted)] if isinstance(noted, int | tuple) else []


def check_output(model: nn.Module, shape: Shape, *, output: tuple[int | None, ...]) -> None:
    """Raise ModelError unless the network turns images (n, *shape) into logits (n, *output)."""
    found = output_of(model, shape)
    sizes = tuple(found.shape[1:]) if isinstance(found, Tensor) else ()
    if len(sizes) != len(output) or any(wanted not in (None, size) for wanted, size in zip(output, sizes, strict=True)):
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        wanted = ", ".join("any" if size is None else str(size) for size in output)
        raise ModelError(
            f"{type(model).__name__}: must return logits of shape (n, {wanted}), returned {got} for one image"
        )


def check_logits(model: nn.Module, images: Tensor) -> None:
    """Raise ModelError where outputs for images (n, channels, height, width) are probabilities, of a softmax or sigmoids.

    A loss would take their softmax or sigmoid again, and INT8 rounds small probabilities to 0.
    """
    outputs = _outputs(model, images)
    if not isinstance(outputs, Tensor) or not bool((outputs >= 0).all()):
        return
    sums, last = outputs.sum(1), ""
    if torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        last = "softmax"
    elif _ends_in_sigmoid(outputs):  # other outputs of an untrained network may lie between 0 and 1, too
        last = "sigmoid"
    if last:
        raise ModelError(
            f"{type(model).__name__}: returns probabilities, as after a {last} (on {len(images)} images), "
            f"but losses and INT8 need logits: leave the {last} out"
        )


def _ends_in_sigmoid(outputs: Tensor) -> bool:
    """Tell whether a sigmoid made the outputs, whatever their shape became after it, by autograd's record."""
    return _last_steps(outputs)[0].startswith("Sigmoid")


def ends_in_classifier(outputs: Tensor) -> bool:
    """Tell whether a layer with weights, a softmax or sigmoids made the outputs: an encoder's come from a norm or a mean."""
    last, *before = _last_steps(outputs)
    return any(name.startswith(CLASSIFIES) for name in ([last, *before] if last.startswith("AddBack") else [last]))


def _last_steps(outputs: Tensor) -> list[str]:
    """Return autograd's names of the operation that made the outputs, whatever their shape became after it, and of those before it."""
    step = outputs.grad_fn
    while step is not None and step.name().startswith(RESHAPES):
        step = step.next_functions[0][0]
    return [""] if step is None else [step.name(), *(one.name() for one, _ in step.next_functions if one is not None)]


def output_of(model: nn.Module, shape: Shape) -> object:
    """Return the network's output for one black image, in eval mode; ModelError where it does not take one."""
    first = next(model.parameters(), torch.empty(0))
    return _outputs(model, torch.zeros((1, *shape), dtype=first.dtype, device=first.device))


def _outputs(model: nn.Module, images: Tensor) -> object:
    """Return the network's output in eval mode; restore every module's mode."""
    channels, height, width = images.shape[1:]
    # Otherwise nn.MultiheadAttention fuses its projections, which are then not counted.
    images = images.detach().requires_grad_()
    training = {module: module.training for module in model.modules()}
    try:
        with torch.enable_grad():
            return model.eval()(images)
    except (
        RuntimeError,
        ValueError,
        AssertionError,
        IndexError,
    ) as error:  # raised by layers and transformers for a wrong size
        reason = str(error).partition("\n")[0] or type(error).__name__
        colours = "" if channels == 3 else f" with {channels} channel{'s' * (channels > 1)}"
        raise ModelError(
            f"{type(model).__name__}: does not take images of {height} x {width}{colours}: {reason}"
        ) from error
    finally:
        model.train()  # LeViT and similar networks drop the tensors cached in this pass, which cannot be copied
        for module, mode in training.items():
            module.training = mode


def versioned(model: nn.Module, state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Add the versions of the model's modules to a state: files of plain tensors lack them, and MNASNet needs them."""
    tensors = OrderedDict(state)
    tensors._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return tensors
