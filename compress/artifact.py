"""A finished stage's directory: its files, and `meta.json`, which is written last and shows that the rest is complete."""

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
# A stage's logs: they contain times, so they do not count in the artifact's digest.
TOLD = ("log.jsonl", "training-", "tensorboard/")
SCHEMA_VERSION = 2
Metrics = dict[str, float | int | None]


@dataclass(frozen=True)
class Meta:
    """The content of `meta.json`: `parent_digest` is the parent's `digest`, `files` has each file's sha256."""

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
        """A sha256 over the stage's metrics, files and settings, and over its parent's digest."""
        made = {name: sha for name, sha in self.files.items() if not name.startswith(TOLD)}
        content = {**asdict(self), "files": made, "seconds": None}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def students_of(root: Path, name: str) -> str:
    """Return the message for a run whose students, but not itself, have the file or folder `name`; else empty."""
    found = [str(path.parent) for path in sorted(root.glob(f"students/*/{name}"))]
    return f"{root}: each of its students has its own {name}: give {' or '.join(found)}" if found else ""


def key_of(parts: Mapping[str, object]) -> str:
    """Return 12 hexadecimal digits of sha256 over the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def is_complete(directory: Path) -> bool:
    """Tell whether the directory is a finished artifact, whose files are as its stage wrote them."""
    return damage(directory) is None


def damage(directory: Path) -> str | None:
    """Return why a directory is no finished, unchanged artifact, None where it is one."""
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
    """Read a finished artifact's meta.json; raise ArtifactError where it is missing, damaged or of another version."""
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
    """Return the artifact and its ancestors, oldest first; all are in one folder."""
    chain = [directory]
    while (parent := read_meta(chain[0]).parent) is not None:
        chain.insert(0, chain[0].parent / parent)
    return chain


def finish(work: Path, final: Path, meta: Meta) -> None:
    """Turn a working directory into an artifact: write meta.json with the files' digests, flush all to disk, rename."""
    for torn in work.rglob(".*.partial"):  # left by a process that was killed while writing
        torn.unlink()
    names = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
    made = replace(meta, files=digests_of(work, names, memory=work / MEMORY))
    write_json(work / META, asdict(made) | {"digest": made.digest})
    if final.exists():  # a damaged artifact of the same key, or one of another parent
        shutil.rmtree(final)
    put_folder(work, final)


def write_json(path: Path, value: object) -> None:
    """Write JSON, complete or not at all."""
    content = json.dumps(value, indent=1)
    with writing(path) as file:
        file.write(f"{content}\n".encode())


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Lock the run folder for this process; create it if missing.

    Raises ArtifactError where it cannot be written or another run has locked it.
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
    """Lock this artifact while it is made; wait for another run that is making it. A killed run's lock is released."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    # One byte of a common file is locked for each name, so there is no lock file per artifact.
    byte = int(key_of({"name": directory.name}), 16)
    with (directory.parent / ".turns").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
        yield


# The sha256 of files are cached: a file is read again only where its size, times or inode changed.
# A file system's times have a resolution of milliseconds to seconds: two writes within it look like one.
TICK_NS = 2_000_000_000
THREADS, FILES = 16, 64  # number of threads, and of files that each takes at a time


class Entry(NamedTuple):
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

    def entries(part: Sequence[str]) -> dict[str, Entry]:
        return {name: _entry(root / name, known.get(name)) for name in part}

    found: dict[str, Entry] = {}
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


def _entry(file: Path, known: Entry | None) -> Entry:
    status = file.stat()
    marks = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if known is not None and known[:-1] == marks:
        return known
    return Entry(*marks, sha256(file))


def _remembered(memory: Path) -> dict[str, Entry]:
    try:
        return {name: Entry(*entry) for name, entry in json.loads(memory.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing, or not written by `_remember`
        return {}


def _remember(memory: Path, entries: Mapping[str, Entry]) -> None:
    with suppress(OSError):  # without a cache every call reads every file, which only costs time
        memory.parent.mkdir(parents=True, exist_ok=True)
        with writing(memory) as file:
            file.write(json.dumps(entries).encode())
