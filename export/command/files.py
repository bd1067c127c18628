"""Write files atomically: under a temporary name, synced to the disk, then renamed. And their digests."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with Unix line ends on every system; create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def json_text(document: object) -> str:
    """Return indented JSON."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def key_of(parts: Mapping[str, object]) -> str:
    """Return 12 hexadecimal digits of sha256 over the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` once it is complete: readers see the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")  # the process id, as two processes may write at once
    with aside.open("wb") as file:
        yield file
    sync(aside)
    put(aside, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON, complete or not at all."""
    content = json.dumps(value, indent=1)
    with writing(path) as file:
        file.write(f"{content}\n".encode())


def put(aside: Path, path: Path) -> None:
    """Rename a file or folder, and sync its new name to the disk."""
    aside.rename(path)
    sync(path.parent)


def put_folder(aside: Path, path: Path) -> None:
    """Sync a folder and all that is in it to the disk, then rename it."""
    for inside in [*aside.rglob("*"), aside]:
        sync(inside)
    put(aside, path)


def sync(path: Path) -> None:
    """Sync a file or folder to the disk."""
    if os.name == "nt":  # cannot sync folders, or files opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
