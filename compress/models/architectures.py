"""Build a network from its name: torchvision's, timm's, one for CIFAR, or the user's own file."""

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import nn

from compress.data.teachers import foreign
from compress.errors import ModelError
from compress.models.cifar import CIFAR_NETWORKS
from compress.models.detectors import BUILDERS, KINDS, build_detector, build_yolox, torchvision_detector
from compress.models.digest import existing_file, local_modules
from compress.models.foreign import exported, rebuilt
from compress.models.hugging_face import hugging_face
from compress.models.known import check_name, suggestion
from compress.models.outputs import serve_
from compress.models.segmenters import build_pyramid, build_smp
from compress.quant.layers import is_expectation
from export.errors import UserError
from export.images.size import Shape, Size, said
from export.runtime.own import import_file

# These two have auxiliary heads by default, and warn unless told how to initialize. Their published weights expect
# transform_input, which turns ImageNet's normalization into theirs.
_NO_AUXILIARY_HEADS: dict[str, bool] = {"aux_logits": False, "init_weights": True, "transform_input": True}
_EXTRA = {"googlenet": _NO_AUXILIARY_HEADS, "inception_v3": _NO_AUXILIARY_HEADS}


def build(
    arch: str,
    *,
    num_classes: int,
    shape: Shape | None = None,
    trust_code: bool = False,
    outputs: Sequence[str] | None = None,
) -> nn.Module:
    """Build `torchvision:NAME`, `timm:NAME`, `cifar:NAME` or `file.py:factory` with random weights, in eval mode.

    `onnx:FILE`, `hf:FOLDER` and `exported:FILE.pt2` contain their weights. A network is built for the channels of `shape`, and one for one
    image size only (ViT, Swin) for its size, by default for three channels and its own size. A file's factory is called as
    `factory(num_classes)`, or `factory(num_classes, channels=n)` if it has that argument, and only with `trust_code`, as
    loading the file runs its code. It returns one tensor, in which the named `outputs` lie side by side, all of several for ()
    (`models.outputs`); by default it is the only one, or the logits. Raises ModelError for an unknown name, a shape that does not fit, or a
    file that cannot be used.
    """
    model = thawed_(_built(arch, num_classes, shape, trust_code=trust_code))
    source, _, name = arch.rpartition(":")
    alone = outputs is None and source in LIBRARIES and foreign(arch) is None and name not in _segmentation()
    return model if alone else serve_(model, outputs)


def thawed_(model: nn.Module) -> nn.Module:
    """Replace frozen batch-norms, which are four buffers and a product, by batch-norms that compute the same in eval mode.

    They can be cut and folded. torchvision's and transformers' classes are meant, whose name ends in FrozenBatchNorm2d. Fixed convolutions,
    which are parameters in an ONNX file, do not learn.
    """
    for name, module in list(model.named_modules()):
        if is_expectation(module):
            module.requires_grad_(False)
        if type(module).__name__.endswith("FrozenBatchNorm2d"):
            norm = nn.BatchNorm2d(len(module.get_buffer("weight")), eps=getattr(module, "eps", 1e-5))
            norm.load_state_dict(module.state_dict(), strict=False)  # the counter of batches is not there
            model.set_submodule(name, norm.eval())
    return model


def _built(arch: str, num_classes: int, shape: Shape | None, *, trust_code: bool) -> nn.Module:
    channels, *sides = shape or (3,)
    source, name = foreign(arch) or (arch.rpartition(":")[0], arch.rpartition(":")[2])
    if source not in LIBRARIES:
        return _own(arch, num_classes, channels, trust_code=trust_code).eval()
    given = {OF_CHANNELS[source]: channels} if channels != 3 and source in OF_CHANNELS else {}
    if not sides or source not in SIZED or not SIZED[source][0](name):
        model = LIBRARIES[source](name, num_classes, **given)
        return (model if given or foreign(arch) else with_channels(model, channels)).eval()
    size = (sides[0], sides[1])
    try:
        model = LIBRARIES[source](name, num_classes, **SIZED[source][1](size), **given)
    except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"{arch}: cannot be built for {said(size)} pixels ({error or type(error).__name__}); choose another data.image_size"
        ) from error
    return (model if given else with_channels(model, channels)).eval()


def with_channels(model: nn.Module, channels: int) -> nn.Module:
    """Return a network of three channels as one of others: its first convolution, which reads the images, takes so many.

    Its start is the library's own: one channel has the weights of red, a fourth those of red again.
    """
    if channels == 3:
        return model
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    if first.in_channels != 3 or first.groups != 1:
        raise ModelError(
            f"{type(model).__name__}: its first convolution takes {first.in_channels} channels, so it cannot be made for {channels}: give "
            "your own as file.py:factory"
        )
    chosen = torch.arange(channels) % 3
    first.weight = nn.Parameter(first.weight.detach()[:, chosen].clone())
    first.in_channels = channels
    if hasattr(model, "transform_input"):
        vars(model)["transform_input"] = False  # of ImageNet's red, green and blue
    return model


def _torchvision(name: str, num_classes: int, **sized: Any) -> nn.Module:
    check_name("torchvision", name, torchvision_names())
    if name in KINDS:
        return torchvision_detector(name, num_classes)
    if name not in _segmentation():
        model: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=num_classes, **_EXTRA.get(name, {}), **sized
        )
        return model
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=num_classes
    )
    return network


def torchvision_names() -> tuple[str, ...]:
    """Return torchvision's classifiers, segmentation networks and detectors."""
    return (*torchvision.models.list_models(module=torchvision.models), *_segmentation(), *KINDS)


def _segmentation() -> tuple[str, ...]:
    return tuple(torchvision.models.list_models(module=torchvision.models.segmentation))


def auxiliary(arch: str, num_classes: int) -> tuple[str, nn.Module] | None:
    """Return the layer that a network's auxiliary classifier reads, and that classifier; None where it has none.

    FCN and DeepLabV3 of torchvision have one. It is for training: `build` leaves it out.
    """
    library, _, name = arch.rpartition(":")
    if library != "torchvision" or not name.startswith(("fcn_", "deeplabv3_")):
        return None
    both: Any = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=True
    )
    (layer,) = (layer for layer, output in both.backbone.return_layers.items() if output == "aux")
    return f"backbone.{layer}", both.aux_classifier


def _timm(name: str, num_classes: int, **sized: Any) -> nn.Module:
    timm = import_timm()
    check_name("timm", name, timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **sized)
    return model


def _square(size: Size) -> dict[str, Any]:
    if size[0] != size[1]:
        raise ValueError("it takes squares")
    return {"image_size": size[0]}


def _timm_is_sized(name: str) -> bool:
    return bool(import_timm().get_pretrained_cfg(name).fixed_input_size)


def _cifar(name: str, num_classes: int) -> nn.Module:
    check_name("cifar", name, CIFAR_NETWORKS)
    return CIFAR_NETWORKS[name](num_classes)


LIBRARIES: dict[str, Callable[..., nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "cifar": _cifar,
    "fpn": build_pyramid,
    "smp": build_smp,
    "yolox": build_yolox,
    "onnx": rebuilt,
    "hf": hugging_face,
    "exported": exported,
    **{kind: partial(build_detector, kind) for kind in BUILDERS},
}
OF_CHANNELS = {"timm": "in_chans", "smp": "in_channels"}  # libraries' own arguments for the images' channels
# A library's test whether a network is built for one image size, and the argument for that size.
SIZED: dict[str, tuple[Callable[[str], bool], Callable[[Size], dict[str, Any]]]] = {
    "torchvision": (lambda name: name.startswith("vit_"), _square),
    "timm": (_timm_is_sized, lambda size: {"img_size": size[0] if size[0] == size[1] else size}),
}


def import_timm() -> ModuleType:
    """Return timm; raise ModelError where it is not installed."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModelError(f"timm: cannot be imported ({error}); pip install timm") from error
    return timm


def takes_classes(arch: str, *, trust_code: bool) -> bool:
    """Tell whether a network is built for a number of classes: a person's `factory()` is not."""
    if arch.rpartition(":")[0] in LIBRARIES or foreign(arch):
        return True
    return bool(inspect.signature(_factory(arch, trust_code=trust_code)).parameters.keys() - {"channels"})


def _factory(arch: str, *, trust_code: bool) -> Callable[..., object]:
    path, _, name = arch.rpartition(":")
    if not path.endswith(".py"):
        raise ModelError(
            f"{arch}: unknown network; give {', '.join(f'{one}:NAME' for one in LIBRARIES)} or file.py:factory"
        )
    file = existing_file(path, "the model's file")
    if not trust_code:
        raise ModelError(f"{arch}: building it runs the code in {file}; read it first, then add --trust-code")
    module = _import(file)
    factories = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    if name not in factories:
        raise ModelError(f"{arch}: {file} defines no {name}; {suggestion(name, factories)}")
    found: Callable[..., object] = factories[name]
    return found


def _own(arch: str, num_classes: int, channels: int, *, trust_code: bool) -> nn.Module:
    factory = _factory(arch, trust_code=trust_code)
    signature = inspect.signature(factory)
    given = {"channels": channels} if "channels" in signature.parameters else {}
    wanted = (
        (num_classes,) if num_classes or signature.parameters.keys() - {"channels"} else ()
    )  # an encoder has no classes
    try:
        signature.bind(*wanted, **given)
    except TypeError as error:
        raise ModelError(f"{arch}: must be callable as {arch.rpartition(':')[2]}(num_classes): {error}") from error
    model = factory(*wanted, **given)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{arch}: must return a torch.nn.Module, returned {type(model).__name__}")
    return model


def _refuse_namesakes(file: Path) -> None:
    """Raise ModelError where the user's file imports a module beside it whose name another loaded module has."""
    for name, path in local_modules(file).items():
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded is not None and Path(loaded).resolve() != path:
            raise ModelError(f"{file}: imports {name}, but {loaded} has that name already; rename {path}")


def _import(file: Path) -> ModuleType:
    """Run the user's file as a module."""
    _refuse_namesakes(file)
    try:
        return import_file(file)
    except UserError as error:
        raise ModelError(str(error)) from error.__cause__
