"""Networks whose own training mode is another network: it asserts targets, multiplies queries, returns losses or other outputs."""

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RANDOM = ("Drop", "StochasticDepth")  # in the names of classes whose training mode is random


def other_in_training(model: nn.Module, images: Tensor, *, values: bool) -> str:
    """Return what a network does otherwise in training mode than in eval mode, without batch-norms and dropout; empty if nothing.

    Other `values` of an output of the same shape count only if asked for.
    """
    with torch.no_grad(), _probing(model):
        expected = model.eval()(images)
        model.train()
        for module in model.modules():
            if _is_leaf_of_training(module):
                module.eval()
        try:
            found = model(images)
        except Exception as error:  # noqa: BLE001 (whatever a person's forward raises)
            return f"it stops ({(str(error).strip() or type(error).__name__).splitlines()[0]:.100})"
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        got = f"an output of {tuple(found.shape[1:])}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        return f"it returns {got}"
    differs = values and not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    return "it returns other values" if differs else ""


def train_as_it_runs_(model: nn.Module, images: Tensor, *, values: bool) -> str:
    """Make a network whose training mode is another network learn in eval mode; return what to tell of it, empty if it needs nothing."""
    does = other_in_training(model, images, values=values)
    if does:
        train_norms_only_(model)
    return f"learns in eval mode but for its batch-norms: in its own training mode {does}" if does else ""


def train_norms_only_(model: nn.Module) -> None:
    """Make `train()` put only batch-norms into training mode, so that the network computes what it does in eval mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        nn.Module.train(self, False)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = mode
        return self

    vars(model)["train"] = types.MethodType(train, model)


def freeze_norms_(model: nn.Module) -> None:
    """Make batch-norms use their running statistics until the next `train()`; scale and shift keep learning."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _is_leaf_of_training(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or any(word in type(module).__name__ for word in RANDOM)


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Restore every module's mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
