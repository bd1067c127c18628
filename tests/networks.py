"""Small networks that have what large ones have: residuals, depthwise and grouped convolutions, ReLU6, concatenation."""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FeaturePyramidNetwork

from compress.models.detectors import Detector
from export.tasks.boxes import CENTRED, GIOU, SOFTMAX


class Block(nn.Module):
    """A residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, outputs, h / stride, w / stride)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + self.down(x))
        return out


class Residual(nn.Module):
    """Two residual blocks and a head."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.block1 = Block(width, width, 1)
        self.block2 = Block(width, 2 * width, 2)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        x = self.block2(self.block1(self.pool(self.stem(x))))
        out: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return out


class Mobile(nn.Module):
    """An inverted residual with ReLU6, a grouped convolution and a concatenation."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True))
        self.expand = nn.Sequential(nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(
            nn.Conv2d(48, 48, 3, 1, 1, groups=48, bias=False), nn.BatchNorm2d(48), nn.ReLU6(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(48, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.grouped = nn.Sequential(nn.Conv2d(16, 32, 3, 1, 1, groups=4), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        x = torch.cat([x, self.grouped(x)], 1)
        out: Tensor = self.head(self.drop(x.mean((2, 3))))
        return out


class Decoder(nn.Module):
    """Transposed convolutions of every kind: plain, depthwise and grouped."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(24, 40, 2, 2), nn.BatchNorm2d(40), nn.ReLU())
        self.depth = nn.Sequential(nn.ConvTranspose2d(40, 40, 3, 2, 1, groups=40), nn.BatchNorm2d(40), nn.ReLU())
        self.mix = nn.Sequential(nn.ConvTranspose2d(40, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU())
        self.grouped = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, 2, groups=4), nn.ReLU())
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        out: Tensor = self.head(self.grouped(self.mix(self.depth(self.up(self.stem(x))))).mean((2, 3)))
        return out


class Pyramid(nn.Module):
    """Two maps at strides 8 and 16, the first joined from two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), Block(16, 24, 2)
        )
        self.wide, self.narrow = Block(24, 24, 2), nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(24, 16, 1), nn.ReLU())
        self.last = Block(40, 32, 2)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Return the two maps."""
        x = self.stem(x)
        joined = torch.cat([self.wide(x), self.narrow(x)], dim=1)
        return OrderedDict(joined=joined, last=self.last(joined))


def boxes(num_classes: int) -> nn.Module:
    """Return a small SSD."""
    places = DefaultBoxGenerator([[2], [2]], min_ratio=0.3, max_ratio=0.5)
    return Detector(SSD(Pyramid(), places, (48, 48), num_classes + 1), SOFTMAX)


class Levels(nn.Module):
    """Two maps of 32 channels, as RetinaNet and FCOS take them."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pyramid = Pyramid(), FeaturePyramidNetwork([40, 32], self.out_channels)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Return the two maps."""
        found: OrderedDict[str, Tensor] = self.pyramid(self.body(x))
        return found


def retinanet(num_classes: int) -> nn.Module:
    """Return a small RetinaNet of the second version, whose heads have group norms."""
    places = AnchorGenerator(((8, 10), (16, 20)), ((0.5, 1.0, 2.0),) * 2)
    head = RetinaNetHead(32, 6, num_classes + 1, norm_layer=partial(nn.GroupNorm, 32))
    for part in (head.classification_head, head.regression_head):
        part.conv = part.conv[:1]
    return Detector(RetinaNet(Levels(), num_classes + 1, anchor_generator=places, head=head), GIOU)


def fcos(num_classes: int) -> nn.Module:
    """Return a small FCOS."""
    places = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    head = FCOSHead(32, 1, num_classes + 1, num_convs=1)
    return Detector(FCOS(Levels(), num_classes + 1, anchor_generator=places, head=head), CENTRED)


class Outlines(nn.Module):
    """A class for each pixel: a skip connection, a branch pooled over the whole image, concatenations, and maps made larger."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block = Block(width, 2 * width, 2)
        self.near = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.far = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(3 * width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes, h, w)."""
        fine = self.stem(x)
        coarse = self.block(fine)
        pooled = F.interpolate(self.far(F.adaptive_avg_pool2d(coarse, 1)), size=coarse.shape[2:], mode="nearest")
        context = F.interpolate(torch.cat([self.near(coarse), pooled], 1), scale_factor=2, mode="bilinear")
        out = self.classifier(self.mix(torch.cat([context, fine], 1)))
        return F.interpolate(out, size=x.shape[2:], mode="bilinear")


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch-norms statistics and scales that matter, as after training; return the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            module.weight.data = torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
            module.bias.data = torch.empty(shape).uniform_(-0.3, 0.3, generator=generator)
            module.running_mean = torch.empty(shape).uniform_(-0.2, 0.2, generator=generator)
            module.running_var = torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def settled(model: nn.Module, size: int = 16) -> nn.Module:
    """Give batch-norms the statistics of 240 digits (3, size, size), as after a training on them; the model stays in training mode."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images[:240, None] / 8 - 1).float().expand(-1, 3, -1, -1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    model(F.interpolate(images, size, mode="bilinear"))
    return model


def small(num_classes: int) -> nn.Module:
    """Return the network that tests give to recipes as a person's own."""
    return Residual(num_classes)


def thin(num_classes: int) -> nn.Module:
    """Return the smallest network of another width than `small`."""
    return Residual(num_classes, width=8)


def outlines(num_classes: int) -> nn.Module:
    """Return a small segmentation network."""
    return Outlines(num_classes)


class Encoder(nn.Module):
    """Two residual blocks whose averaged maps are an embedding (n, 2 · width)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block1, self.block2 = Block(width, width, 1), Block(width, 2 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings (n, 2 · width)."""
        return torch.flatten(F.adaptive_avg_pool2d(self.block2(self.block1(self.stem(x))), 1), 1)


class TwoHeaded(nn.Module):
    """The encoder with a second output, a map of 3 channels at half of the image's size, in a dict with the name of its backbone."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.backbone, self.heat = Encoder(width), nn.Conv2d(2 * width, 3, 3, padding=1)
        self.embed = nn.Linear(2 * width, 12)

    def forward(self, x: Tensor) -> dict[str, object]:
        """Return an embedding (n, 12) and a map (n, 3, height / 2, width / 2)."""
        maps = self.backbone.block2(self.backbone.block1(self.backbone.stem(x)))
        embedding = self.embed(F.adaptive_avg_pool2d(maps, 1).flatten(1))
        return {"embedding": embedding, "heat": 10 * self.heat(maps), "backbone": "encoder", "left_out": None}


class Restorer(nn.Module):
    """A small U-Net that gives an image of the input's size."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = _rectified(3, width), _rectified(width, 2 * width, 2)
        self.up, self.out = _rectified(2 * width, width), nn.Conv2d(2 * width, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return images (n, 3, height, width)."""
        fine = self.down1(x)
        coarse = F.interpolate(self.up(self.down2(fine)), scale_factor=2)
        out: Tensor = self.out(torch.cat([fine, coarse], 1))
        return out


def _rectified(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def encoder() -> nn.Module:
    """Return a network without classes."""
    return Encoder()


def two_headed() -> nn.Module:
    """Return a network of two outputs."""
    return TwoHeaded()


def restorer() -> nn.Module:
    """Return a network whose output is an image."""
    return Restorer()
