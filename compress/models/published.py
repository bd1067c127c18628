"""The preprocessing of networks' published weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torchvision

from compress.data.teachers import foreign
from compress.models.architectures import import_timm
from compress.models.foreign import OnnxFile, read_program
from export.images.preprocess import Kernel, Look
from export.images.size import Size


class Published(NamedTuple):
    """Image size in pixels, the resize's size divided by it, and (mean, std) of pixels in [0, 1].

    `stretch` resizes both sides to the image size; `look` is the kernel and the order of colours.
    """

    image_size: Size
    resize: float
    normalize: tuple[tuple[float, ...], tuple[float, ...]]
    stretch: bool = False
    look: Look = Look()

    @property
    def size(self) -> int:
        """The shorter side."""
        return min(self.image_size)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
BILINEAR = 2  # as Pillow numbers it
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Torchvision's detectors normalize and resize inside, its presets do not: the size of the shorter side, and the normalization.
DETECTORS = {
    "ssd300_vgg16": Published((300, 300), 1.0, ((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255))),
    "ssdlite320_mobilenet_v3_large": Published((320, 320), 1.0, HALVES),
    "retinanet_resnet50_fpn": Published((800, 800), 1.0, IMAGENET),
    "retinanet_resnet50_fpn_v2": Published((800, 800), 1.0, IMAGENET),
    "fcos_resnet50_fpn": Published((800, 800), 1.0, IMAGENET),
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
        normal = (tuple(preset.mean), tuple(preset.std))
        return Published((crop, crop), preset.resize_size[0] / crop, normal, look=_look(preset.interpolation.value))
    if library == "timm":
        settings = import_timm().models.get_pretrained_cfg(name)
        if settings is None:
            return None
        side = settings.input_size[-1]
        normal = (tuple(settings.mean), tuple(settings.std))
        return Published((side, side), 1 / settings.crop_pct, normal, look=_look(settings.interpolation))
    return None


def _look(kernel: str) -> Look:
    return Look(interpolation="bicubic" if kernel == "bicubic" else "bilinear")


def _of_onnx(path: str) -> Published | None:
    """Return an ONNX file's image size and ImageNet's normalization, as files do not state theirs; None for any size."""
    sides = [size for size in OnnxFile(Path(path)).shape[1:] if isinstance(size, int) and size > 4]
    return Published((sides[0], sides[1]), 1.0, IMAGENET) if len(sides) == 2 else None


def _of_folder(path: str) -> Published | None:
    """Return the preprocessing in the settings of transformers' processor; None where they state no size."""
    folder = Path(path)
    (network, processor, of_both) = (
        json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        for name in ("config.json", "preprocessor_config.json", "processor_config.json")
    )
    processor = processor or of_both.get("image_processor", {})  # of networks of images and texts
    cropped = _sides(processor.get("crop_size")) if processor.get("do_center_crop", True) else None
    whole, within = (
        _sides(processor.get("size")),
        network.get("vision_config") or network.get("backbone_config") or network,
    )
    size = cropped or whole or _sides(within.get("image_size"))
    if size is None:
        return None
    by_edge, part = "shortest_edge" in str(processor.get("size")), processor.get("crop_pct")
    # ConvNeXt's processor crops images of less than 384 pixels only.
    squeezed = bool(processor) and not cropped and (not by_edge if part is None else size[0] >= 384)
    resize = whole[0] / cropped[0] if cropped and whole else 1 / (part or 1.0)
    unit = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255
    normal = processor.get("do_normalize", not processor or "image_mean" in processor)
    mean, std = (
        tuple(value / unit for value in (processor.get(name, default) if normal else other))
        for name, default, other in zip(("image_mean", "image_std"), IMAGENET, NONE, strict=True)
    )
    kernel: Kernel = "bilinear" if processor.get("resample", BILINEAR) == BILINEAR else "bicubic"
    look = Look(interpolation=kernel, bgr=bool(processor.get("do_flip_channel_order")))
    return Published(size, 1.0 if squeezed else max(1.0, resize), (mean, std), squeezed, look)


def _sides(said: Any) -> Size | None:
    """Return height and width of a size in a processor's settings: a number, a pair, `height` and `width`, or one edge."""
    if isinstance(said, dict):
        edge = said.get("shortest_edge")
        said = (said.get("height", edge), said.get("width", edge))
    pair = said if isinstance(said, list | tuple) else (said, said)
    return (int(pair[0]), int(pair[1])) if all(pair) else None


def _of_archive(path: str) -> Published | None:
    """Return the image size that a program was exported with, None without example images."""
    images = read_program(path).example_inputs
    return Published(tuple(images[0][0].shape[-2:]), 1.0, IMAGENET) if images else None


WITHIN: dict[str, Callable[[str], Published | None]] = {"onnx": _of_onnx, "hf": _of_folder, "exported": _of_archive}
