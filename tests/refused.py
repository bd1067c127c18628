"""Networks that run in PyTorch and that a later stage cannot take."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Plain(nn.Module):
    """Two convolutions and a head; nobody refuses it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        x = F.relu(self.second(F.relu(self.first(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class OnValues(Plain):
    """Goes another way for bright images."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        if x.max() > 10:
            x = x / 10
        return super().forward(x)


class Shared(Plain):
    """Runs one layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        x = F.relu(self.second(F.relu(self.first(x))))
        x = F.relu(self.second(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Swapped(Plain):
    """Changes the places of its channels between two layers, which pruning does not follow."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        x = F.relu(self.second(torch.cat(F.relu(self.first(x)).chunk(2, 1)[::-1], 1)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class OneByOne(Plain):
    """Loops over the images."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        forward = super().forward
        return torch.cat([forward(x[index : index + 1]) for index in range(len(x))])


class Noisy(Plain):
    """Answers by chance."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        return super().forward(x + torch.randn_like(x))


class Bessel(Plain):
    """Uses an operator that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        return super().forward(torch.special.i1(x))


class Octave(Plain):
    """Its convolution maps two resolutions to two, by slices of its weights."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.first, self.second = OctaveConv(3, 16, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes)."""
        fine, coarse = self.first((x, F.avg_pool2d(x, 2)))
        x = F.relu(self.second(F.relu(fine + F.interpolate(coarse, scale_factor=2.0))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class OctaveConv(nn.Conv2d):
    """Half of the outputs at each of two resolutions."""

    def forward(self, maps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return both resolutions."""
        fine, coarse = (F.conv2d(x, half, padding=1) for x, half in zip(maps, self.weight.chunk(2), strict=True))
        return fine, coarse
