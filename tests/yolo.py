"""A small detector as YOLO's descendants are built: C2f blocks, two levels, boxes as distributions over distances (DFL)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss

BINS, STRIDES = 8, (4, 8)


class Conv(nn.Sequential):
    """A convolution, batch-norm and SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
        )


class C2f(nn.Module):
    """A block whose parts, halves of a convolution and what follows from the second, are joined (cross-stage partial)."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1) -> None:
        super().__init__()
        self.wide = outputs // 2
        self.first = Conv(inputs, outputs, 1)
        self.steps = nn.ModuleList(
            nn.Sequential(Conv(self.wide, self.wide), Conv(self.wide, self.wide)) for _ in range(depth)
        )
        self.last = Conv((2 + depth) * self.wide, outputs, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same size."""
        parts = list(self.first(maps).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        joined: Tensor = self.last(torch.cat(parts, 1))
        return joined


class Yolo(nn.Module):
    """Images (n, 3, height, width) to centre and size in pixels and each class's score, (n, 4 + classes, rows)."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.classes = classes
        self.stem = nn.Sequential(Conv(3, width, 3, 2), Conv(width, width, 3, 2), C2f(width, width))
        self.down = nn.Sequential(Conv(width, 2 * width, 3, 2), C2f(2 * width, 2 * width))
        self.up = C2f(3 * width, width)
        self.boxes = nn.ModuleList(
            nn.Sequential(Conv(wide, 16), nn.Conv2d(16, 4 * BINS, 1)) for wide in (width, 2 * width)
        )
        self.scores = nn.ModuleList(
            nn.Sequential(Conv(wide, 16), nn.Conv2d(16, classes, 1)) for wide in (width, 2 * width)
        )
        self.expectation = nn.Conv2d(BINS, 1, 1, bias=False).requires_grad_(False)
        self.expectation.weight.data[:] = torch.arange(float(BINS)).view(1, BINS, 1, 1)
        for head in self.scores:
            nn.init.constant_(head.get_parameter("1.bias"), -4.0)

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes (n, rows, 4), left, top, right and bottom in pixels, and logits (n, rows, classes)."""
        fine = self.stem(images)
        coarse = self.down(fine)
        fine = self.up(torch.cat([F.interpolate(coarse, scale_factor=2), fine], 1))
        boxes, logits = [], []
        for maps, stride, box, score in zip((fine, coarse), STRIDES, self.boxes, self.scores, strict=True):
            high, wide = maps.shape[2:]
            bins = box(maps).flatten(2).unflatten(1, (4, BINS)).transpose(1, 2).softmax(1)  # (n, bins, 4, cells)
            distances = self.expectation(bins).squeeze(1)
            centre = torch.stack(
                torch.meshgrid(torch.arange(wide) + 0.5, torch.arange(high) + 0.5, indexing="xy")
            ).flatten(1)
            boxes.append(torch.cat([centre - distances[:, :2], centre + distances[:, 2:]], 1) * stride)
            logits.append(score(maps).flatten(2))
        return torch.cat(boxes, 2).transpose(1, 2), torch.cat(logits, 2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the rows."""
        boxes, logits = self.raw(images)
        return torch.cat([box_convert(boxes, "xyxy", "cxcywh"), logits.sigmoid()], 2).transpose(1, 2)


def yolo(num_classes: int) -> nn.Module:
    """Return the network."""
    return Yolo(num_classes)


def trained_(network: Yolo, images: Tensor, truths: Tensor, steps: int) -> None:
    """Train on images and boxes (n, most, 6) as fractions: a row near a box's centre, of the level of its size, learns it."""
    size = images.shape[-1]
    cells = [torch.cartesian_prod(*[torch.arange(size // stride) + 0.5] * 2).flip(1) * stride for stride in STRIDES]
    places, strides = (
        torch.cat(cells),
        torch.cat([torch.full((len(one),), each) for one, each in zip(cells, STRIDES, strict=True)]),
    )
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    network.train()
    for step in range(steps):
        chosen = torch.arange(16) + 16 * step
        batch, true = images[chosen % len(images)], truths[chosen % len(images)]
        boxes, logits = network.raw(batch)
        wanted, loss = torch.zeros_like(logits), torch.zeros(())
        for image, objects in enumerate(true):
            for label, *corners, _ in objects[objects[:, 0] >= 0]:
                box = torch.stack(corners) * size
                near = ((places - (box[:2] + box[2:]) / 2).abs().amax(1) < strides) & (strides == 8)
                wanted[image, near, int(label)] = 1
                loss = loss + generalized_box_iou_loss(
                    boxes[image, near], box.expand(int(near.sum()), 4), reduction="mean"
                )
        loss = (loss + F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / 4) / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
