"""Remember the sha256 of files: a file is read again only where its size, times or inode changed."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from export.command.files import sha256, writing

# A file system's times have a resolution of milliseconds to seconds: two writes within it look like one.
TICK_NS = 2_000_000_000
THREADS, FILES = 16, 64  # number of threads, and of files that each takes at a time


class Remembered(NamedTuple):
    """A file's cached sha256, and the marks by which a change is seen."""

    size: int
    content_ns: int  # time of the last write
    inode_ns: int  # time of the last write, rename, or change of owner or times; no program can set it
    inode: int
    sha256: str


def digests_of(
    root: Path, names: Iterable[str], *, memory: Path, progress: Callable[[int], None] = lambda _: None
) -> dict[str, str]:
    """Return the sha256 of each file in `root`; `memory` is the JSON file that caches them.

    `progress` gets the number of files done. Raises OSError for a file that cannot be read.
    """
    known = _remembered(memory)
    now = time.time_ns()

    def entries(part: Sequence[str]) -> dict[str, Remembered]:
        return {name: _entry(root / name, known.get(name)) for name in part}

    found: dict[str, Remembered] = {}
    wanted = list(names)
    try:
        with ThreadPoolExecutor(THREADS) as threads:  # reading and hashing release Python's lock
            for part in threads.map(entries, [wanted[i : i + FILES] for i in range(0, len(wanted), FILES)]):
                found |= part
                progress(len(found))
    finally:
        kept = found if len(found) == len(wanted) else known | found  # interrupted: keep the other entries
        lasting = {name: entry for name, entry in kept.items() if max(entry.content_ns, entry.inode_ns) < now - TICK_NS}
        if lasting != known:
            _remember(memory, lasting)
    return {name: entry.sha256 for name, entry in found.items()}


def _entry(file: Path, known: Remembered | None) -> Remembered:
    status = file.stat()
    marks = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if known is not None and known[:-1] == marks:
        return known
    return Remembered(*marks, sha256(file))


def _remembered(memory: Path) -> dict[str, Remembered]:
    try:
        return {name: Remembered(*entry) for name, entry in json.loads(memory.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing, or not written by `_remember`
        return {}


def _remember(memory: Path, entries: Mapping[str, Remembered]) -> None:
    with suppress(OSError):  # without a cache every call reads every file, which only costs time
        memory.parent.mkdir(parents=True, exist_ok=True)
        with writing(memory) as file:
            file.write(json.dumps(entries).encode())
