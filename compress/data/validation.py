"""Write a data set's validation images as a folder, for the gate and for whoever measures a bundle elsewhere."""

import shutil
from pathlib import Path

from compress.data.dataset import Dataset
from compress.data.images import ArrayImages
from export.command.files import put_folder
from export.errors import DataError
from export.images.decode import BrokenImage


def write_validation(dataset: Dataset, folder: Path) -> int:
    """Write each validation image to a folder named as its class, and return how many; the folder is there when all are.

    Files are copied as they are. Where a class has no name that a folder can have, all folders are numbered in the classes' order.
    Raises DataError for a folder that is there already.
    """
    if folder.exists():
        raise DataError(f"{folder}: is there already; name a new folder")
    images, written = dataset.held_out, 0
    plain = all(Path(name).name == name for name in dataset.classes)
    names = dataset.classes if plain else [f"class_{index:04d}" for index in range(len(dataset.classes))]
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    held = set(images.labels.tolist())
    # A class without an image has no folder, where folders are known by their names.
    for name in [name for label, name in enumerate(names) if label in held or not plain]:
        (aside / name).mkdir(parents=True)
    for index, label in enumerate(images.labels.tolist()):
        place = aside / names[label] / f"{index:06d}"
        if isinstance(images, ArrayImages):
            place.with_suffix(".bmp").write_bytes(images.file(index))
        else:
            try:
                images.whole(index)
            except BrokenImage as error:
                images.report_broken({index: str(error)})  # which raises unless they are to be left out
                continue
            suffix = Path(images.name(index)).suffix or ".jpg"  # a row of a table has none; files are read by content
            place.with_suffix(suffix).write_bytes(images.content(index))
        written += 1
    put_folder(aside, folder)
    return written
