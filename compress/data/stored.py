"""Images and masks of different sizes in memory, one row of bytes each."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.data.views import Boxes, Draws


@dataclass(frozen=True)
class Stored:
    """Images of different sizes: `pixels` uint8 or uint16 (n, channels, area), each image's rows one after the other, then padding.

    `sizes` (n, 2) are the images' original heights and widths, `kept` (n, 2) those that they are stored with.
    """

    pixels: Tensor
    sizes: Tensor
    kept: Tensor
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def first(self, n: int) -> "Stored":
        """Return the first n images, without copying."""
        return Stored(self.pixels[:n], self.sizes[:n], self.kept[:n])

    def boxes(self, draws: Draws, chosen: Tensor) -> Boxes:
        """Return the boxes of the chosen images (m,) in stored pixels."""
        return draws.boxes(chosen, self.sizes[chosen]).scaled(self.kept[chosen] / self.sizes[chosen])

    def images(self, chosen: Tensor, device: torch.device) -> Tensor:
        """Return the chosen images (m,) on the device (m, channels, height, width), padded at bottom and right.

        The first call copies all images to the device, where they stay.
        """
        if device not in self._on_device:
            self._on_device[device] = self.pixels.to(device)
        pixels, kept = self._on_device[device], self.kept[chosen]
        height, width = kept.amax(dim=0).tolist()
        if bool((kept == kept[0]).all()):
            same = pixels[chosen.to(device, non_blocking=True), :, : height * width]
            return same.view(len(chosen), -1, height, width)
        found = torch.zeros(len(chosen), pixels.shape[1], height, width, dtype=pixels.dtype, device=device)
        for row, (index, (height, width)) in enumerate(zip(chosen.tolist(), kept.tolist(), strict=True)):
            found[row, :, :height, :width] = pixels[index, :, : height * width].view(-1, height, width)
        return found
