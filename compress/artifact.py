"""A finished stage's directory: its files, and `meta.json`, which is written last and shows that the rest is complete."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError
from export.command.digest_memory import digests_of
from export.command.files import key_of, put_folder, write_json
from export.names import LOG_JSONL

META, MEMORY = "meta.json", ".digests.json"
# A stage's logs: they contain times, so they do not count in the artifact's digest.
TOLD = (LOG_JSONL, "training-", "tensorboard/")
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


def float_ancestor(directory: Path) -> Path:
    """Return the newest float artifact in an artifact's lineage: the student before quantization."""
    return next(path for path in reversed(lineage(directory)) if read_meta(path).kind == "float")


def newest(directory: Path, stage: str) -> Path | None:
    """Return the newest artifact of a stage in an artifact's lineage, None where there is none."""
    return next((path for path in reversed(lineage(directory)) if read_meta(path).stage == stage), None)


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
