"""Write a data set's validation images into a new folder, for the gate and for measuring a bundle elsewhere."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from compress.data.images import Lazy, readable
from export.command.files import put_folder
from export.errors import DataError


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


def copied(images: Lazy, folder_of: Callable[[int], Path]) -> Iterator[tuple[int, Image.Image, Path]]:
    """Copy each readable image, as it is, to the folder of its index, and yield it with its index and its file."""
    for index, image in readable(images):
        file = folder_of(index) / f"{index:06d}{images.suffix(index)}"
        file.write_bytes(images.content(index))
        yield index, image, file
