"""Small image folders for the tests, and the settings to open them with."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress.data.augment import Augmentation
from compress.data.dataset import Dataset
from compress.data.labelled import open_dataset
from compress.data.settings import DataSettings

STILL: dict[str, Any] = {
    "crop": "none",
    "pad": 0.125,
    "min_area": 0.25,
    "flip": False,
    "distort": False,
    "randaugment": 0,
    "mixup": 0.0,
    "cutmix": 0.0,
}
SETTINGS: dict[str, Any] = {
    "image_size": (16, 16),
    "resize": 1.0,
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.25),
    "val_fraction": 0.25,
    "limit_per_class": None,
    "skip_broken": False,
    "task": "classification",
    "ignore_index": None,
    "seed": 0,
    "tuning": False,
}


def augmentation(**changes: Any) -> Augmentation:
    """Return an augmentation that does nothing but what is asked for."""
    return Augmentation(**STILL | changes)


def opened(name: str, path: Path | None = None, **changes: Any) -> Dataset:
    """Open a data set with small settings, for every way of training on it."""
    memory = (path or Path()) / ".memory"  # beside it nothing else has a say: a test's folder is its own
    return open_dataset(
        DataSettings(name, path, **SETTINGS | {"memory": memory} | changes), augmentation(crop="random_resized")
    )


def write_photo(file: Path, *, width: int = 21, height: int = 17, seed: int = 0) -> Path:
    """Write random pixels, smooth enough to survive JPEG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file)
    return file


def write_classes(folder: Path, *, classes: tuple[str, ...] = ("cat", "dog", "owl"), per_class: int = 4) -> Path:
    """Write class folders of photographs, no two of the same size or content."""
    for label, name in enumerate(classes):
        for index in range(per_class):
            write_photo(
                folder / name / f"{index}.png", width=18 + index, height=19 + 2 * label, seed=100 * label + index
            )
    return folder


def write_imagenet_layout(root: Path, *, val: str = "val") -> Path:
    """Write train/ and a validation folder."""
    write_classes(root / "train")
    write_classes(root / val, per_class=2)
    return root
