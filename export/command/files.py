"""Files that are whole or not there: written beside their place, flushed to the disk, renamed. And their digests."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with Unix line ends everywhere, into a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def json_text(document: object) -> str:
    """Return JSON as people read it."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write beside `path`, which takes its place once it is whole: a reader sees the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes may write at once
    with aside.open("wb") as file:
        yield file
    sync(aside)
    put(aside, path)


def put(aside: Path, path: Path) -> None:
    """Rename a file or folder that is on the disk, and have the new name on the disk as well."""
    aside.rename(path)
    sync(path.parent)


def put_folder(aside: Path, path: Path) -> None:
    """Rename a folder once all that it holds is on the disk."""
    for inside in [*aside.rglob("*"), aside]:
        sync(inside)
    put(aside, path)


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    if os.name == "nt":  # which syncs no folder, and a file only where it was opened for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
