"""The residual networks for 32-pixel images that distillation and pruning papers compare on.

Layers and names are those of CRD's code (HobbitLong/RepDistiller; Tian 2020), which mdistiller and DIST also use, so their
published teachers load unchanged.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


class _Block(nn.Module):
    """Two convolutions and a shortcut, which is a 1 × 1 convolution where the shape changes (He 2016, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + shortcut)  # type: ignore[no-any-return]


class _WideBlock(nn.Module):
    """Batch-norm and ReLU before each convolution (Zagoruyko 2016); a shortcut with a convolution reads the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 1)
        self.relu = nn.ReLU(inplace=True)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        return out + shortcut  # type: ignore[no-any-return]


class _Stage(nn.Module):
    """A stage of a wide network; `layer` is its name in published weights."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.layer = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """He 2016, section 4.2: a 3 × 3 stem, three stages at 32, 16 and 8 pixels, 6n + 2 layers."""

    def __init__(self, num_classes: int, *, depth: int, widths: tuple[int, int, int, int]) -> None:
        """Take the widths of the stem and of the three stages."""
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = _conv(3, widths[0], 1), nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _blocks(_Block, widths[0], widths[1], 1, blocks)
        self.layer2 = _blocks(_Block, widths[1], widths[2], 2, blocks)
        self.layer3 = _blocks(_Block, widths[2], widths[3], 2, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        _initialize_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """Zagoruyko 2016: three pre-activation stages of `factor` times 16, 32 and 64 channels, 6n + 4 layers."""

    def __init__(self, num_classes: int, *, depth: int, factor: int) -> None:
        """Take the number of layers and the factor of the widths."""
        super().__init__()
        blocks, last = (depth - 4) // 6, 64 * factor
        self.conv1 = _conv(3, 16, 1)
        self.block1 = _Stage(_blocks(_WideBlock, 16, 16 * factor, 1, blocks))
        self.block2 = _Stage(_blocks(_WideBlock, 16 * factor, 32 * factor, 2, blocks))
        self.block3 = _Stage(_blocks(_WideBlock, 32 * factor, last, 2, blocks))
        self.bn1, self.relu = nn.BatchNorm2d(last), nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)
        _initialize_(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn1(x))), 1))  # type: ignore[no-any-return]


def _blocks(
    block: Callable[[int, int, int], nn.Module], inputs: int, outputs: int, stride: int, number: int
) -> nn.Sequential:
    """Return a stage: the first block changes width and size, the others keep them."""
    return nn.Sequential(block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(number - 1)))


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def _initialize_(model: nn.Module) -> None:
    """Initialize convolutions as in He 2015, by the fan out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


_THIN, _FOUR_TIMES = (16, 16, 32, 64), (32, 64, 128, 256)
CIFAR_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": partial(ResNet, depth=8, widths=_THIN),
    "resnet20": partial(ResNet, depth=20, widths=_THIN),
    "resnet32": partial(ResNet, depth=32, widths=_THIN),
    "resnet56": partial(ResNet, depth=56, widths=_THIN),
    "resnet110": partial(ResNet, depth=110, widths=_THIN),
    "resnet8x4": partial(ResNet, depth=8, widths=_FOUR_TIMES),
    "resnet32x4": partial(ResNet, depth=32, widths=_FOUR_TIMES),
    "wrn_16_2": partial(WideResNet, depth=16, factor=2),
    "wrn_40_1": partial(WideResNet, depth=40, factor=1),
    "wrn_40_2": partial(WideResNet, depth=40, factor=2),
}
