"""Find residual blocks that pruning can replace by the identity.

A module is such a block if it returns its input when all of its weights are zero, so that only the shortcut is left. Removing it loses
the importance of all channels inside.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from compress.pruning.plan import Branch, ChannelGroup
from export.images.size import Shape


@torch.no_grad()
def find_branches(model: nn.Module, groups: Sequence[ChannelGroup], shape: Shape) -> tuple[Branch, ...]:
    """Return the innermost residual blocks of a network in eval mode, with the indices of the groups inside each."""
    inside = {
        path: tuple(
            index for index, group in enumerate(groups) if all(_within(name, path) for name, *_ in group.touches)
        )
        for path, module in model.named_modules()
        if path and next(module.children(), None) is not None
    }
    inputs: dict[str, torch.Tensor] = {}

    def keep(path: str, given: tuple[object, ...], output: object) -> None:
        (value, *others) = given or (None,)
        if isinstance(value, torch.Tensor) and isinstance(output, torch.Tensor):
            once = not others and path not in inputs and value.shape == output.shape
            inputs[path] = value.clone() if once else value.new_empty(0)

    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, given, output, path=path: keep(path, given, output))
        for path, members in inside.items()
        if members
    ]
    device = next(model.parameters()).device
    model(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device))
    for handle in handles:
        handle.remove()
    found = [path for path, value in inputs.items() if value.numel() and _is_shortcut(model.get_submodule(path), value)]
    innermost = [path for path in found if not any(_within(other, path) for other in found if other != path)]
    return tuple(Branch(path, inside[path]) for path in innermost)


def _is_shortcut(module: nn.Module, value: torch.Tensor) -> bool:
    """Tell whether a module with all weights zero returns its input."""
    empty = copy.deepcopy(module)
    for parameter in empty.parameters():
        parameter.zero_()
    for buffer in empty.buffers():
        buffer.fill_(0 if buffer.is_floating_point() else 1)
    return torch.equal(empty(value), value)


def _within(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")
