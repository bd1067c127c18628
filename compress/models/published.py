"""The preprocessing of networks' published weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torchvision

from compress.data.teachers import foreign
from compress.models.architectures import import_timm
from compress.models.foreign import OnnxFile, read_program


class Published(NamedTuple):
    """Image size in pixels, the resize's size divided by it, and (mean, std) of pixels in [0, 1]."""

    size: int
    resize: float
    normalize: tuple[tuple[float, ...], tuple[float, ...]]


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Torchvision's detectors normalize and resize inside, its presets do not: the size of the shorter side, and the normalization.
DETECTORS = {
    "ssd300_vgg16": Published(300, 1.0, ((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255))),
    "ssdlite320_mobilenet_v3_large": Published(320, 1.0, HALVES),
    "retinanet_resnet50_fpn": Published(800, 1.0, IMAGENET),
    "retinanet_resnet50_fpn_v2": Published(800, 1.0, IMAGENET),
    "fcos_resnet50_fpn": Published(800, 1.0, IMAGENET),
}


def published(arch: str) -> Published | None:
    """Return a network's published preprocessing, None where there is none."""
    if (kind_path := foreign(arch)) is not None:
        return WITHIN[kind_path[0]](kind_path[1])
    library, _, name = arch.rpartition(":")
    if library == "torchvision" and name in DETECTORS:
        return DETECTORS[name]
    if library == "torchvision":
        weights = torchvision.models.get_model_weights(name)
        if not len(weights):
            return None
        preset = weights["DEFAULT"].transforms()
        (crop,) = getattr(preset, "crop_size", preset.resize_size)  # segmentation crops nothing
        return Published(crop, preset.resize_size[0] / crop, (tuple(preset.mean), tuple(preset.std)))
    if library == "timm":
        settings = import_timm().models.get_pretrained_cfg(name)
        if settings is None:
            return None
        return Published(settings.input_size[-1], 1 / settings.crop_pct, (tuple(settings.mean), tuple(settings.std)))
    return None


def _of_onnx(path: str) -> Published | None:
    """Return an ONNX file's image size and ImageNet's normalization, as files do not state theirs; None for any size."""
    sides = [size for size in OnnxFile(Path(path)).shape[1:] if isinstance(size, int) and size > 4]
    return Published(sides[0], 1.0, IMAGENET) if len(sides) == 2 and sides[0] == sides[1] else None


def _of_folder(path: str) -> Published | None:
    """Return the preprocessing in the settings of transformers' processor; None where they state no size."""
    folder = Path(path)
    (network, processor) = (
        json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    said: Any = processor.get("crop_size") or processor.get("size") or network.get("image_size")
    size = (said.get("height") or said.get("shortest_edge")) if isinstance(said, dict) else said
    normalize = tuple(
        tuple(processor.get(name, default)) for name, default in zip(("image_mean", "image_std"), IMAGENET, strict=True)
    )
    return Published(int(size), 1 / processor.get("crop_pct", 1.0), (normalize[0], normalize[1])) if size else None


def _of_archive(path: str) -> Published | None:
    """Return the image size that a program was exported with, None without example images."""
    images = read_program(path).example_inputs
    return Published(images[0][0].shape[-1], 1.0, IMAGENET) if images else None


WITHIN: dict[str, Callable[[str], Published | None]] = {"onnx": _of_onnx, "hf": _of_folder, "exported": _of_archive}
