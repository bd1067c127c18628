"""How a library prepares the images of its networks' published weights."""

from typing import NamedTuple

import torchvision

from compress.models.architectures import import_timm


class Published(NamedTuple):
    """Image size in pixels, the resize's size over it, and (mean, std) of pixels in [0, 1]."""

    size: int
    resize: float
    normalize: tuple[tuple[float, ...], tuple[float, ...]]


def published(arch: str) -> Published | None:
    """Return a network's published preparation; None for networks of the CIFAR papers and a person's own."""
    library, _, name = arch.rpartition(":")
    if library == "torchvision":
        weights = torchvision.models.get_model_weights(name)
        if not len(weights):
            return None
        preset = weights["DEFAULT"].transforms()
        return Published(
            preset.crop_size[0], preset.resize_size[0] / preset.crop_size[0], (tuple(preset.mean), tuple(preset.std))
        )
    if library == "timm":
        settings = import_timm().models.get_pretrained_cfg(name)
        if settings is None:
            return None
        return Published(settings.input_size[-1], 1 / settings.crop_pct, (tuple(settings.mean), tuple(settings.std)))
    return None
