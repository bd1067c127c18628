"""A stage's finished directory: its files, and `meta.json`, which is written last and alone says that the rest can be trusted."""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import ArtifactError
from export.command.files import put_folder, sha256, writing

META, MEMORY = "meta.json", ".digests.json"
# What a stage says while it runs: with clocks in it, and no part of what it makes.
TOLD = ("log.jsonl", "training-", "tensorboard/")
SCHEMA_VERSION = 2
Metrics = dict[str, float | int | None]


@dataclass(frozen=True)
class Meta:
    """What `meta.json` holds: `parent_digest` is the parent's `digest`, `files` has each file's sha256."""

    stage: str
    key: str
    parent: str | None
    parent_digest: str | None
    kind: str
    section: dict[str, Any]
    version: int
    seconds: float
    metrics: Metrics
    files: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """A sha256 over all that the stage made: its metrics and files, its settings, and what it was made from."""
        made = {name: sha for name, sha in self.files.items() if not name.startswith(TOLD)}
        content = {**asdict(self), "files": made, "seconds": None}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def students_of(root: Path, what: str) -> str:
    """Return what to say of a run that has no `what` of its own, because each of its students has one; empty where it has none."""
    found = [str(path.parent) for path in sorted(root.glob(f"students/*/{what}"))]
    return f"{root}: each of its students has its own {what}: give {' or '.join(found)}" if found else ""


def key_of(parts: Mapping[str, object]) -> str:
    """Return 12 hexadecimal digits of sha256 over the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def is_complete(directory: Path) -> bool:
    """Tell whether the directory is a finished artifact, in every bit as its stage left it."""
    return damage(directory) is None


def damage(directory: Path) -> str | None:
    """Return what keeps a directory from being a finished artifact, None where it is one."""
    try:
        meta = read_meta(directory)
        found = digests_of(directory, meta.files, memory=directory / MEMORY)
        if meta.parent is not None and read_meta(directory.parent / meta.parent).digest != meta.parent_digest:
            return f"{directory}: was made from another {meta.parent}"
    except ArtifactError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror})"
    changed = [name for name, digest in meta.files.items() if found[name] != digest]
    return f"{directory / changed[0]}: was changed after its stage wrote it" if changed else None


def read_meta(directory: Path) -> Meta:
    """Read a finished artifact's meta.json.

    Raises ArtifactError where there is none, it is damaged, or another version wrote it.
    """
    try:
        content = json.loads((directory / META).read_text(encoding="utf-8"))
        if content.get("schema_version") != SCHEMA_VERSION:
            raise ArtifactError(f"{directory}: made by another version of compress; run the recipe again")
        digest = content.pop("digest")
        meta = Meta(**content)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ArtifactError(f"{directory}: not a finished stage ({error}); run the recipe again") from error
    if meta.digest != digest:
        raise ArtifactError(f"{directory / META}: was changed after its stage wrote it; run the recipe again")
    return meta


def lineage(directory: Path) -> list[Path]:
    """Return the artifact and its ancestors, oldest first; they stand side by side."""
    chain = [directory]
    while (parent := read_meta(chain[0]).parent) is not None:
        chain.insert(0, chain[0].parent / parent)
    return chain


def finish(work: Path, final: Path, meta: Meta) -> None:
    """Turn a working directory into an artifact: flush its files, write meta.json last with their digests, rename."""
    for torn in work.rglob(".*.partial"):  # of a process that was killed while it wrote
        torn.unlink()
    names = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
    made = replace(meta, files=digests_of(work, names, memory=work / MEMORY))
    write_json(work / META, asdict(made) | {"digest": made.digest})
    if final.exists():  # a damaged artifact of the same key, or one that was made from another parent
        shutil.rmtree(final)
    put_folder(work, final)


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    content = json.dumps(value, indent=1)
    with writing(path) as file:
        file.write(f"{content}\n".encode())


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold the run folder for this process alone; create it where it is missing.

    Raises ArtifactError where it cannot be written or another run holds it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / ".lock").open("w")
    except OSError as error:
        raise ArtifactError(f"{root}: cannot be written ({error.strerror}); choose another folder with OUT=") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(f"{root}: another run is writing here; wait for it, or choose another OUT=") from error
        yield


@contextmanager
def turn(directory: Path) -> Iterator[None]:
    """Be the only run that makes this artifact; another one that does is waited for, and a killed one holds nothing up."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    # One byte of a common file stands for each name: nothing is left beside every artifact, and other artifacts are not held up.
    byte = int(key_of({"name": directory.name}), 16)
    with (directory.parent / ".turns").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
        yield


# The sha256 of files, remembered: a file is read again only where its size, its times or its inode are others.
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
    return Entry(*marks, sha256(file))


def _remembered(memory: Path) -> dict[str, Entry]:
    try:
        return {name: Entry(*entry) for name, entry in json.loads(memory.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing, or not what `_remember` writes
        return {}


def _remember(memory: Path, entries: Mapping[str, Entry]) -> None:
    with suppress(OSError):  # a disk that cannot be written only costs time: every call reads every file
        memory.parent.mkdir(parents=True, exist_ok=True)
        with writing(memory) as file:
            file.write(json.dumps(entries).encode())
