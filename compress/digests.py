"""The sha256 of files, remembered: a file is read again only where its size, its times or its inode are others."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# A file system's clock ticks in milliseconds, some in seconds: within a tick a second write leaves every mark as it was.
TICK_NS = 2_000_000_000


THREADS, FILES = 16, 64  # that read at once, and what each takes


class Entry(NamedTuple):
    """What is remembered of a file."""

    size: int
    content_ns: int  # when it was written
    inode_ns: int  # when it was written, renamed or given another owner or time: nobody can set this one
    inode: int
    sha256: str


def digests_of(
    root: Path, names: Iterable[str], *, memory: Path, progress: Callable[[int], None] = lambda _: None
) -> dict[str, str]:
    """Return the sha256 of each file below `root`; `memory` is the JSON file that keeps them from call to call.

    `progress` is told how many files are done. Raises OSError for a file that cannot be read.
    """
    known = _remembered(memory)
    now = time.time_ns()

    def entries(part: Sequence[str]) -> dict[str, Entry]:
        return {name: _entry(root / name, known.get(name)) for name in part}

    found: dict[str, Entry] = {}
    wanted = list(names)
    try:
        with ThreadPoolExecutor(THREADS) as threads:  # which wait for the disk, and hash outside Python's lock
            for part in threads.map(entries, [wanted[i : i + FILES] for i in range(0, len(wanted), FILES)]):
                found |= part
                progress(len(found))
    finally:
        kept = found if len(found) == len(wanted) else known | found  # interrupted: the rest is left as it was
        lasting = {name: entry for name, entry in kept.items() if max(entry.content_ns, entry.inode_ns) < now - TICK_NS}
        if lasting != known:
            _remember(memory, lasting)
    return {name: entry.sha256 for name, entry in found.items()}


def _entry(file: Path, known: Entry | None) -> Entry:
    status = file.stat()
    marks = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if known is not None and known[:-1] == marks:
        return known
    with file.open("rb") as stream:
        return Entry(*marks, hashlib.file_digest(stream, "sha256").hexdigest())


def _remembered(memory: Path) -> dict[str, Entry]:
    try:
        return {name: Entry(*entry) for name, entry in json.loads(memory.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing, or not what `_remember` writes
        return {}


def _remember(memory: Path, entries: Mapping[str, Entry]) -> None:
    with suppress(OSError):  # a disk that cannot be written only costs time: every call reads every file
        memory.parent.mkdir(parents=True, exist_ok=True)
        aside = memory.with_name(f".{memory.name}.{os.getpid()}")  # two processes may look at once
        aside.write_text(json.dumps(entries), encoding="utf-8")
        aside.rename(memory)
