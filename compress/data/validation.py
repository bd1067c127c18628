"""Write a data set's validation images as a folder, for the gate and for measuring a bundle elsewhere."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.data.dataset import Dataset
from compress.data.images import readable
from export.command.files import put_folder
from export.errors import DataError


def write_validation(dataset: Dataset, folder: Path) -> int:
    """Write each validation image to a folder named like its class; return the number of images.

    Files are copied as they are. If a class's name cannot name a folder, all folders are numbered in the classes' order.
    Raises DataError where the folder exists.
    """
    images, written = dataset.held_out, 0
    plain = all(Path(name).name == name for name in dataset.classes)
    names = dataset.classes if plain else [f"class_{index:04d}" for index in range(len(dataset.classes))]
    labels = images.labels.tolist()
    held = set(labels)
    with new_folder(folder) as partial:
        # A class without an image gets a folder only where folders are numbered.
        for name in [name for label, name in enumerate(names) if label in held or not plain]:
            (partial / name).mkdir()
        for index, _ in readable(images):
            file = partial / names[labels[index]] / f"{index:06d}{images.suffix(index)}"
            file.write_bytes(images.content(index))
            written += 1
    return written


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `folder` at the end, complete or not at all. Raises DataError where that exists."""
    if folder.exists():
        raise DataError(f"{folder}: exists already; name a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    put_folder(partial, folder)
