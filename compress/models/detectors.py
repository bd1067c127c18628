"""Torchvision's one-stage detectors as plain networks: images in, one row per anchor out, at a fixed size.

A row has the logits (background first), the four box moves, and the constants with which `export.tasks.boxes` decodes
them. Modules keep torchvision's names, so weights trained with torchvision fit. Preprocessing, decoding and suppression
are left to the caller.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _mobilenet_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import Conv2dNormActivation

from compress.errors import ModelError
from compress.models.known import check_name
from export.tasks.boxes import CENTRED, GIOU, PER_LEVEL, SIGMOID, SOFTMAX

RATIOS = ([2], [2, 3], [2, 3], [2])  # aspect ratios of SSD's anchors on a residual network, by level


class Detector(nn.Module):
    """A detector's backbone and heads; `forward` returns (n, anchors, classes + 1 + 4 + 5)."""

    def __init__(self, network: Any, kind: int) -> None:
        """Take backbone, head and anchors of torchvision's network."""
        super().__init__()
        self.backbone: nn.Module = network.backbone
        self.head: nn.Module = network.head
        self.kind = kind
        self._anchors = [
            network.anchor_generator
        ]  # in a list, so that it does not become a submodule; it has no weights

    def forward(self, images: Tensor) -> Tensor:
        """Return each anchor's row for images (n, c, height, width)."""
        features: list[Tensor] = list(self.backbone(images).values())
        found: dict[str, Tensor] = self.head(features)
        logits, moves = found["cls_logits"], found["bbox_regression"]
        if self.kind == CENTRED:  # torchvision's background column is never a class: it holds the centre-ness
            logits = torch.cat([found["bbox_ctrness"], logits[..., 1:]], dim=2)
        constants = self.constants(images, [tuple(level.shape[2:]) for level in features]).to(images.dtype)
        return torch.cat([logits, moves, constants.expand(images.shape[0], -1, -1)], dim=2)

    def constants(self, images: Tensor, levels: Sequence[tuple[int, ...]]) -> Tensor:
        """Return each anchor's constants (1, anchors, 5): kind and level; centre, width and height as fractions of the image."""
        height, width = images.shape[2:]
        with torch.no_grad():
            blank = ImageList(torch.empty(1, 3, height, width), [(height, width)])
            corners = self._anchors[0](blank, [torch.empty(1, 1, *level) for level in levels])[0]
            centre, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
            scale = torch.tensor([width, height])
            each = zip(levels, self._anchors[0].num_anchors_per_location(), strict=True)
            kinds = [
                torch.full((number * level[0] * level[1], 1), float(self.kind + PER_LEVEL * index))
                for index, (level, number) in enumerate(each)
            ]
            return torch.cat([torch.cat(kinds), centre / scale, size / scale], dim=1)[None].to(images.device)


class SteppedResNet(nn.Module):
    """A residual network's maps at strides 8, 16 and 32, and one more at 64, for SSD's heads."""

    def __init__(self, network: Any) -> None:
        """Take torchvision's classifier without its head."""
        super().__init__()
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool, network.layer1)
        self.layer2, self.layer3, self.layer4 = network.layer2, network.layer3, network.layer4
        width = network.fc.in_features
        self.extra = nn.Sequential(
            Conv2dNormActivation(width, 128, kernel_size=1), Conv2dNormActivation(128, 256, kernel_size=3, stride=2)
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the four maps."""
        maps, found = self.stem(images), OrderedDict[str, Tensor]()
        for name in ("layer2", "layer3", "layer4", "extra"):
            maps = getattr(self, name)(maps)
            found[name] = maps
        return found


def _ssd(backbone: str, classes: int) -> nn.Module:
    features = SteppedResNet(torchvision.models.get_model(backbone, weights=None))
    boxes = DefaultBoxGenerator([*RATIOS], min_ratio=0.12, max_ratio=0.8)
    return Detector(SSD(features, boxes, (256, 256), classes + 1), SOFTMAX)


def _ssdlite(backbone: str, classes: int) -> nn.Module:
    normalized = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    extractor = _mobilenet_extractor(
        torchvision.models.get_model(backbone, weights=None, norm_layer=normalized), 6, normalized
    )
    boxes = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)
    widths = detection._utils.retrieve_out_channels(extractor, (320, 320))
    head = SSDLiteHead(widths, boxes.num_anchors_per_location(), classes + 1, normalized)
    return Detector(SSD(extractor, boxes, (320, 320), classes + 1, head=head), SOFTMAX)


def _pyramid(backbone: str) -> nn.Module:
    network = torchvision.models.get_model(backbone, weights=None)
    found: nn.Module = _resnet_fpn_extractor(
        network, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    return found


def _retinanet(backbone: str, classes: int) -> nn.Module:
    sizes = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (16, 32, 64, 128, 256))
    boxes = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return Detector(RetinaNet(_pyramid(backbone), classes + 1, anchor_generator=boxes), SIGMOID)


def _fcos(backbone: str, classes: int) -> nn.Module:
    return Detector(FCOS(_pyramid(backbone), classes + 1), CENTRED)


def build_yolox(name: str, classes: int) -> nn.Module:
    """Return pixeltable-yolox's network with random weights; its rows are not decoded, which `decode: yolox` does.

    Raises ModelError where the package is missing or has no such network.
    """
    try:
        from yolox.config import YoloxConfig
    except ModuleNotFoundError as error:
        raise ModelError(
            f"yolox:{name}: cannot be built ({error}); pip install 'prune-distill-quantize[yolox]'"
        ) from error
    check_name("yolox", name, YOLOX)
    config = YoloxConfig.get_named_config(f"yolox_{name}")
    config.num_classes = classes
    network: nn.Module = config.get_model()
    vars(network.get_submodule("head"))["decode_in_inference"] = False
    return network.eval()


YOLOX = ("nano", "tiny", "s", "m", "l", "x")
RESIDUAL, MOBILE = ("resnet18", "resnet34", "resnet50"), ("mobilenet_v3_small", "mobilenet_v3_large")
# Kind of detector: its builder, and the backbones that it takes.
BUILDERS: Mapping[str, tuple[Callable[[str, int], nn.Module], Sequence[str]]] = {
    "ssd": (_ssd, RESIDUAL),
    "ssdlite": (_ssdlite, MOBILE),
    "retinanet": (_retinanet, RESIDUAL),
    "fcos": (_fcos, RESIDUAL),
}
# Torchvision's complete detectors by name.
KINDS: Mapping[str, int] = {
    "ssdlite320_mobilenet_v3_large": SOFTMAX,
    "ssd300_vgg16": SOFTMAX,
    "retinanet_resnet50_fpn": SIGMOID,
    "retinanet_resnet50_fpn_v2": GIOU,
    "fcos_resnet50_fpn": CENTRED,
}


def torchvision_detector(name: str, classes: int) -> nn.Module:
    """Return one of torchvision's detectors with random weights and one more class, the background."""
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": classes + 1}
    return Detector(detection.__dict__[name](**options), KINDS[name])


def build_detector(kind: str, backbone: str, classes: int) -> nn.Module:
    """Return a detector of this kind with random weights on one of torchvision's backbones."""
    builder, backbones = BUILDERS[kind]
    check_name(kind, backbone, backbones)
    return builder(backbone, classes)
