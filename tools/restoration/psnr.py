"""A metric of a person's own, for `score:` of a recipe and `--score` of the gate: PSNR against the clean image, found by the noisy one's path."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def psnr(restored: NDArray[np.float32], path: Path) -> dict[str, float]:
    """Return the PSNR in dB of a restored image (3, height, width) in [0, 1], as a viewer would see it, for noisy/SPLIT/NAME.png."""
    clean = np.asarray(Image.open(path.parents[2] / "clean" / path.parent.name / path.name).convert("RGB"))
    seen = np.rint(np.clip(restored, 0, 1) * 255).transpose(1, 2, 0)  # (height, width, 3)
    error = np.square(seen - clean).mean()
    return {"PSNR dB": float(10 * np.log10(255**2 / max(error, 1e-3)))}
