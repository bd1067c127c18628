"""Mixup and CutMix, image by image: who is mixed with whom, and how much, is drawn once for a whole view of the data.

Libraries mix within a batch. Here an image's partner and share depend on (seed, view, image) alone, so that a mixed image comes again in another
batch, and what the teacher said about it can be kept.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from compress.data.augment import Augmentation


@dataclass(frozen=True)
class Mixes:
    """For each of n images: its partner (n,), its own share (n,), and the patch (n, 4) that is the partner's instead: top, left, bottom, right."""

    partner: Tensor
    share: Tensor  # 1 where a patch decides
    patch: Tensor  # empty where the share decides

    def __getitem__(self, indices: Tensor) -> "Mixes":
        return Mixes(self.partner[indices], self.share[indices], self.patch[indices])


def draw_mixes(augmentation: Augmentation, n: int, *, image_size: int, seed: int) -> Mixes | None:
    """Draw mixup (Zhang 2018), CutMix (Yun 2019, section 3.1), or for each image one of the two; None where neither is on."""
    if not augmentation.mixup and not augmentation.cutmix:
        return None
    random = np.random.default_rng(seed)
    partner = random.permutation(n)
    alphas = np.array([augmentation.mixup, augmentation.cutmix])
    patched = random.random(n) < (augmentation.cutmix > 0) * (0.5 if augmentation.mixup else 1.0)
    share = random.beta(*[np.where(patched, alphas[1], alphas[0])] * 2)
    side = np.where(patched, np.floor(image_size * np.sqrt(1 - share)), 0).astype(np.int64)
    centre = random.integers(0, image_size, (n, 2))
    corners = [centre - side[:, None] // 2, centre - side[:, None] // 2 + side[:, None]]
    patch = np.concatenate(corners, axis=1).clip(0, image_size)  # (n, 4)
    return Mixes(
        torch.from_numpy(partner),
        torch.from_numpy(np.where(patched, 1.0, share)).float(),
        torch.from_numpy(patch),
    )


def mix(
    images: Tensor, labels: Tensor, other_images: Tensor, other_labels: Tensor, mixes: Mixes, *, classes: int
) -> tuple[Tensor, Tensor]:
    """Return images (n, 3, s, s) mixed with their partners' as `mixes` says, and targets (n, classes)."""
    own = _own_part(mixes, images.shape[-1], images.device)  # (n, 1, s, s)
    # An image without a label (-1) adds nothing to a loss on labels.
    targets, others = (one_hot(one + 1, classes + 1)[:, 1:].float() for one in (labels, other_labels))
    return torch.lerp(other_images, images, own), torch.lerp(others, targets, own.mean((1, 2, 3))[:, None])


def _own_part(mixes: Mixes, side: int, device: torch.device) -> Tensor:
    """Return how much of each pixel is the image's own (n, 1, side, side)."""
    pixel = torch.arange(side, device=device)
    top, left, bottom, right = mixes.patch.to(device)[:, :, None].unbind(1)  # each (n, 1)
    rows, columns = (pixel >= top) & (pixel < bottom), (pixel >= left) & (pixel < right)  # (n, side)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, 0.0, mixes.share.to(device)[:, None, None, None])
