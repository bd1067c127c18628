"""Mixup and CutMix. Each image's partner and share are drawn for a whole view of the data.

Libraries mix within a batch. Here partner and share depend on (seed, view, image) alone, so a mixed image is the same in
any batch, and the teacher's logits for it can be cached.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from compress.data.augment import Augmentation
from export.images.size import Size


@dataclass(frozen=True)
class Mixes:
    """Each image's partner (n,), own share (n,), and the partner's patch (n, 4): top, left, bottom, right."""

    partner: Tensor
    share: Tensor  # of mixup, 1 for CutMix
    patch: Tensor  # of CutMix, empty for mixup

    def __getitem__(self, indices: Tensor) -> "Mixes":
        return Mixes(self.partner[indices], self.share[indices], self.patch[indices])


def draw_mixes(augmentation: Augmentation, n: int, *, size: Size, seed: int) -> Mixes | None:
    """Draw mixup (Zhang 2018) or CutMix (Yun 2019, section 3.1) for each image; None where both are off."""
    if not augmentation.mixup and not augmentation.cutmix:
        return None
    random = np.random.default_rng(seed)
    partner = random.permutation(n)
    alphas = np.array([augmentation.mixup, augmentation.cutmix])
    patched = random.random(n) < (augmentation.cutmix > 0) * (0.5 if augmentation.mixup else 1.0)
    share = random.beta(*[np.where(patched, alphas[1], alphas[0])] * 2)
    sides = np.where(patched, np.floor(np.outer(size, np.sqrt(1 - share))), 0).astype(np.int64).T  # (n, 2)
    centre = random.integers(0, size, (n, 2)) if size[0] != size[1] else random.integers(0, size[0], (n, 2))
    corners = [centre - sides // 2, centre - sides // 2 + sides]
    patch = np.concatenate([corner.clip(0, size) for corner in corners], axis=1)  # (n, 4)
    return Mixes(
        torch.from_numpy(partner),
        torch.from_numpy(np.where(patched, 1.0, share)).float(),
        torch.from_numpy(patch),
    )


def mix(
    images: Tensor, labels: Tensor, other_images: Tensor, other_labels: Tensor, mixes: Mixes, *, classes: int
) -> tuple[Tensor, Tensor]:
    """Return images (n, channels, height, width) mixed with their partners, and targets (n, classes).

    Labels are class numbers (n,), or 0 and 1 for each class (n, classes).
    """
    own = _own_part(mixes, images.shape[-2:], images.device)  # (n, 1, height, width)
    # The target of an image without a label (-1) is all zeros, which adds nothing to a loss on labels.
    targets, others = (
        one if one.is_floating_point() else one_hot(one + 1, classes + 1)[:, 1:].float()
        for one in (labels, other_labels)
    )
    share = own.mean((1, 2, 3)).view(-1, *[1] * (targets.ndim - 1))
    return torch.lerp(other_images, images, own), torch.lerp(others, targets, share)


def _own_part(mixes: Mixes, size: torch.Size, device: torch.device) -> Tensor:
    """Return the image's own share of each pixel (n, 1, height, width)."""
    row, column = (torch.arange(side, device=device) for side in size)
    top, left, bottom, right = mixes.patch.to(device)[:, :, None].unbind(1)  # each (n, 1)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)  # (n, side) each
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, 0.0, mixes.share.to(device)[:, None, None, None])
