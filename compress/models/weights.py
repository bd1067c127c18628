"""Read weights without running code in their files, and load them into a network or say why they do not fit."""

import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import safe_globals

from compress.errors import ModelError
from compress.models.architectures import import_timm
from compress.models.digest import check_library, existing_file, is_named
from compress.models.known import suggestion
from compress.models.structure import classifier, versioned

State = dict[str, Tensor]
# Keys under which training scripts save the state dict; the first one found is taken, averages last.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "state_dict_ema",
            "model_ema", "ema")  # fmt: skip
TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")  # of parallel, compiled, wrapped models
# Heads only for training, which `build` leaves out; the counter of torch's weight averaging; losses with weights.
TRAINING_ONLY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.", "n_averaged", "criterion.", "loss.", "loss_fn.")
# Libraries whose objects are settings and scores in checkpoints. Dummies replace them, so none of their code runs.
SETTINGS = ("argparse", "collections", "lightning", "lightning_fabric", "numpy", "omegaconf", "pathlib",
            "pytorch_lightning", "typing")  # fmt: skip
PLAIN = (bool, dict, float, int, list, str, tuple)  # types that settings consist of
DENSENET_OLD = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")  # norm.1.weight, now norm1.weight
# Raised by torch.load on damaged files, besides pickle's own error.
DAMAGE = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError,
          AssertionError, struct.error)  # fmt: skip
NAMED = 8  # keys that an error names; the rest are counted


class _Setting:
    """A dummy for an object that is not a weight."""

    def __new__(cls, *_: object) -> "_Setting":
        """Ignore the arguments."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Ignore the state."""


class _Mapping:
    """A dummy for an object whose items are set by key, which torch allows for plain dicts only."""

    def __new__(cls, *_: object) -> dict[str, object]:  # type: ignore[misc]
        """Return a plain dict."""
        return {}


def load_weights_(model: nn.Module, arch: str, weights: str, *, reset_head: bool) -> None:
    """Load a file (.safetensors, .pt, .pth, .ckpt) or a library's weights (`torchvision:TAG`, `timm:TAG`) into the model.

    With `reset_head` the layers with another number of outputs, else the classifier, keep their random weights. Raises ModelError for a file that cannot be read, needs code
    to be read, or has values that are not finite or not float; and, with the keys, for one that does not fit.
    """
    state = _named(arch, weights) if is_named(weights) else _read(existing_file(weights, "the weights file"))
    state = _known_names(state, model.state_dict().keys())
    if arch.startswith("timm:") and getattr(model, "num_classes", None) == 0:  # an encoder
        state = _without_classifier(model, state)
    if reset_head:
        kept = tuple(_of_other_outputs(model, state)) or (classifier(model) + ".",)
        state |= {key: own for key, own in model.state_dict().items() if key.startswith(kept)}
    _refuse_integers(model, state, weights)
    _refuse_other_channels(model, state, weights)
    if not reset_head:
        _refuse_other_classes(model, state, weights)
    _fit_(model, state, f"{weights}: does not fit {arch}")
    _refuse_not_finite(model.state_dict(), weights)


def _without_classifier(model: Any, state: State) -> State:
    """Return a state without the tensors of the classifier that timm leaves out of an encoder."""
    named = model.pretrained_cfg.get("classifier") or ()
    layers = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    return {key: value for key, value in state.items() if not layers or not key.startswith(layers)}


def read_state(weights: str) -> State:
    """Return a file's tensors by name, without wrappers' prefixes and tensors only for training; raise ModelError as loading does."""
    state = _read(existing_file(weights, "the weights file"))
    while prefix := next((one for one in PREFIXES if all(name.startswith(one) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value for name, value in state.items() if not name.startswith(TRAINING_ONLY)}


def _fit_(model: nn.Module, state: State, complaint: str) -> None:
    """Copy the state into the model; raise ModelError with the complaint and the keys where any does not fit."""
    misshapen = _misshapen(model, state)
    # Old files have no counters.
    counters = {key: own for key, own in model.state_dict().items() if key.endswith("num_batches_tracked")}
    fitting = counters | {key: value for key, value in state.items() if key not in misshapen}
    found = model.load_state_dict(versioned(model, fitting), strict=False)
    parts = (
        _listed("missing", [key for key in found.missing_keys if key not in misshapen]),
        _listed("unexpected", found.unexpected_keys),
        _listed("of another shape", list(misshapen.values())),
    )
    if any(parts):
        raise ModelError(f"{complaint}: {'; '.join(filter(None, parts))}; give weights of this architecture")


def _misshapen(model: nn.Module, state: State) -> dict[str, str]:
    """Return the keys whose shape differs from the model's, each with a phrase of both shapes."""
    return {
        key: f"{key} {tuple(state[key].shape)}, needs {tuple(own.shape)}"
        for key, own in model.state_dict().items()
        if key in state and state[key].shape != own.shape
    }


def _of_other_outputs(model: nn.Module, state: State) -> list[str]:
    """Return the keys of another shape if all differ in the number of outputs alone, as heads for other classes do; else none.

    A layer of another width inside a network also changes the inputs of the next one.
    """
    own, misshapen = model.state_dict(), list(_misshapen(model, state))
    return misshapen if all(state[key].shape[1:] == own[key].shape[1:] for key in misshapen) else []


def _refuse_other_channels(model: nn.Module, state: State, weights: str) -> None:
    """Raise `ModelError` where the weights are for images of other channels: so is the first convolution, which reads them."""
    first = next((f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)), "")
    if first in _misshapen(model, state) and state[first].ndim == 4:
        own, given = model.state_dict()[first].shape, state[first].shape
        if (own[0], *own[2:]) == (given[0], *given[2:]):
            raise ModelError(
                f"{weights}: is for images of {given[1]} channels, the data have {own[1]}: give weights of such images, or set "
                f"data.channels: {given[1]} with a mean and std for each"
            )


def _refuse_other_classes(model: nn.Module, state: State, weights: str) -> None:
    """Raise ModelError where the state differs from the model only in the number of classes."""
    own, others = model.state_dict(), _of_other_outputs(model, state)
    if not others or not state.keys() <= own.keys():
        return
    layer = others[0].rpartition(".")[0]
    what = "classes" if layer == classifier(model) else f"outputs in {layer}"
    raise ModelError(
        f"{weights}: has {len(state[others[0]]):,} {what}, the data need {len(own[others[0]]):,}; give weights of this data "
        "set, or set model.reset_head: true and stages.0.fine_tune: true to train a new classifier"
    )


def _listed(kind: str, keys: Sequence[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - NAMED:,} more" if len(keys) > NAMED else ""
    return f"{len(keys):,} {kind} ({', '.join(keys[:NAMED])}{more})"


def _refuse_integers(model: nn.Module, state: State, weights: str) -> None:
    """Raise ModelError for integers where the network has floats, as in quantized weights."""
    floats = [key for key, own in model.state_dict().items() if own.is_floating_point() and key in state]
    bad = {key: state[key].dtype for key in floats if not state[key].is_floating_point()}
    if bad:
        names = _listed("not float", [f"{key} {str(dtype).removeprefix('torch.')}" for key, dtype in bad.items()])
        raise ModelError(f"{weights}: {names}; give the float weights, from before they were quantized or converted")


def _refuse_not_finite(state: State, weights: str) -> None:
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ModelError(
            f"{weights}: {_listed('not finite', bad)}; the training that wrote it diverged: give an earlier checkpoint"
        )


def _known_names(state: State, known: Iterable[str]) -> State:
    """Return the state under the model's names, without wrappers' prefixes and tensors only for training."""
    names = set(known)
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY) or key in names}
    while names.isdisjoint(state):
        prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key if key in names else DENSENET_OLD.sub(r"\1\2", key): value for key, value in state.items()}


def _read(file: Path) -> State:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: is not a complete safetensors file ({error}); download or save it again"
            ) from error
    if file.suffix not in TORCH_FILES:
        known = f"{', '.join(TORCH_FILES[:-1])} or {TORCH_FILES[-1]}"
        raise ModelError(f"{file}: {file.suffix or 'no suffix'} is not known; give a .safetensors, {known} file")
    return _unwrapped(_unpickled(file), file)


def _unpickled(file: Path) -> object:
    """Read a torch file as data only; torch refuses pickles that would run code."""
    stand_ins: dict[str, type] = {f"builtins.{kind.__name__}": kind for kind in PLAIN}
    while True:
        try:
            with warnings.catch_warnings(), safe_globals([(kind, name) for name, kind in stand_ins.items()]):
                warnings.simplefilter("ignore")  # torch warns of old pickle protocols before it reads the content
                content: object = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            code = re.search(r"GLOBAL (\S+)", str(error))
            if code is None or code[1] in stand_ins or code[1].partition(".")[0] not in SETTINGS:
                raise ModelError(f"{file}: {_needs_code(str(error))}") from error
            stand_ins[code[1]] = _Mapping if code[1].lower().endswith("dict") else _Setting
        except DAMAGE as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if "TorchScript" in reason:
                raise ModelError(
                    f"{file}: is a TorchScript program, not weights, and was not run; if you trust it, save "
                    "torch.jit.load(file).state_dict() with torch.save and give that file"
                ) from error
            if "weights_only" in reason:
                reason = "its kind needs code to be read"
            raise ModelError(f"{file}: is not a complete torch file ({reason}); download or save it again") from error
        else:
            return content


def _needs_code(said: str) -> str:
    """Turn torch's message for a file that it refused into a clear one."""
    code = re.search(r"GLOBAL (\S+)|^(?:Can only|Trying to call)[^<]*<\w+ '?([\w.]+)", said, re.MULTILINE)
    if code is None:
        return "is not a torch file; download or save it again"
    return (
        f"needs code to be read ({code[1] or code[2]}), which could do anything and was not run; "
        "save model.state_dict() alone, best as .safetensors"
    )


def _unwrapped(content: object, file: Path) -> State:
    """Return the state dict inside a checkpoint."""
    while isinstance(content, dict):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            # Only at the innermost level: outer ones contain other tensors, too, such as an accuracy.
            tensors = {
                key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
            }
            if tensors:
                return tensors
            keys = ", ".join(str(key) for key in list(content)[:NAMED])
            raise ModelError(f"{file}: holds no state dict ({keys or 'empty'}); save model.state_dict()")
        content = inner
    raise ModelError(f"{file}: holds a {type(content).__name__}, not a state dict; save model.state_dict()")


def _named(arch: str, weights: str) -> State:
    check_library(arch, weights)
    library, _, tag = weights.partition(":")
    return (_torchvision if library == "torchvision" else _timm)(arch.rpartition(":")[2], tag)


def _torchvision(name: str, tag: str) -> State:
    known = torchvision.models.get_model_weights(name).__members__
    if tag not in known:
        raise ModelError(f"torchvision:{tag}: {name} has no such weights; {suggestion(tag, known)}")
    try:
        return dict(known[tag].get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu"))
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"torchvision:{tag}: could not be downloaded ({error}); download {known[tag].url} on a machine with network "
            "access and give the file: WEIGHTS=/path/to/it"
        ) from error


def _timm(name: str, tag: str) -> State:
    timm = import_timm()
    known = [model.partition(".")[2] for model in timm.list_pretrained(f"{name}.*")]
    if tag not in known:
        raise ModelError(f"timm:{tag}: {name} has no such weights; {suggestion(tag, known)}")
    try:
        state: State = timm.create_model(f"{name}.{tag}", pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"timm:{tag}: could not be downloaded ({error}); download model.safetensors of https://huggingface.co/timm/{name}.{tag} "
            "on a machine with network access and give the file: WEIGHTS=/path/to/it"
        ) from error
    return state
