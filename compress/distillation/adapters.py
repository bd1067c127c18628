"""Small networks on a student's features: to its teacher's shapes, or to logits. They train with the student and are dropped."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST_MIDDLE = 512  # most channels in Knowledge Review's fusion (the authors' code)


class Widened(nn.Module):
    """A 1 × 1 convolution for each layer whose widths differ; the other features stay as they are."""

    def __init__(self, student: Sequence[torch.Size], teacher: Sequence[torch.Size]) -> None:
        """Take the shapes (batch, channels, height, width) of both networks' features."""
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Identity() if s[1] == t[1] else nn.Conv2d(s[1], t[1], 1) for s, t in zip(student, teacher, strict=True)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return the features with the teacher's channels."""
        return [layer(x) for layer, x in zip(self.layers, features, strict=True)]


class Auxiliary(nn.Module):
    """A second classifier, on one layer's features."""

    def __init__(self, head: nn.Module) -> None:
        """Take a classifier that returns logits (batch, classes, height, width) at the features' size."""
        super().__init__()
        self.head = head

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return its logits."""
        return [self.head(features[0])]


class Review(nn.Module):
    """Attention-based fusion from the last layer to the first (Chen et al. 2021, sections 3.2 and 3.3)."""

    def __init__(self, student: Sequence[torch.Size], teacher: Sequence[torch.Size]) -> None:
        """Take the shapes (batch, channels, height, width) of both networks' features, in forward order."""
        super().__init__()
        middle = min(LARGEST_MIDDLE, student[-1][1])
        last = len(student) - 1
        self.fusions = nn.ModuleList(
            _Fusion(s[1], middle, t[1], (t[2], t[3]), first=index == last)
            for index, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return the fused features in the teacher's shapes, in forward order."""
        fused: list[Tensor] = []
        below: Tensor | None = None
        for fusion, x in zip(reversed(self.fusions), reversed(features), strict=True):
            out, below = fusion(x, below)
            fused.insert(0, out)
        return fused


class _Fusion(nn.Module):
    """Fuse one layer's features with those of the deeper layers, weighted by an attention map each."""

    def __init__(self, inputs: int, middle: int, outputs: int, size: tuple[int, int], *, first: bool) -> None:
        super().__init__()
        self.size = size
        self.enter = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.attention = nn.Identity() if first else nn.Conv2d(2 * middle, 2, 1)
        for layers in (self.enter, self.leave):
            nn.init.kaiming_uniform_(layers[0].weight, a=1)  # type: ignore[arg-type]

    def forward(self, x: Tensor, below: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the features in the teacher's shape, and the fused features that the layer before needs."""
        x = self.enter(x)
        if below is not None:
            below = F.interpolate(below, x.shape[2:])
            both = self.attention(torch.cat([x, below], 1)).sigmoid()  # (batch, 2, height, width)
            x = x * both[:, :1] + below * both[:, 1:]
        x = F.interpolate(x, self.size)
        return self.leave(x), x
