"""A stage's finished directory: its files, and `meta.json`, which is written last and alone says that the rest can be trusted."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError

META = "meta.json"
Metrics = dict[str, float | int | None]


@dataclass(frozen=True)
class Meta:
    """What `meta.json` holds."""

    stage: str
    key: str
    parent: str | None
    kind: str
    section: dict[str, Any]
    version: int
    seconds: float
    metrics: Metrics
    files: dict[str, int]
    schema_version: int = 1


def key_of(parts: Mapping[str, object]) -> str:
    """Return 12 hexadecimal digits of sha256 over the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def is_complete(directory: Path) -> bool:
    """Tell whether the directory is a finished artifact whose files all have their recorded sizes."""
    try:
        meta = read_meta(directory)
    except ArtifactError:
        return False
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == size for name, size in meta.files.items()
    )


def read_meta(directory: Path) -> Meta:
    """Read a finished artifact's meta.json.

    Raises ArtifactError where there is none or it is damaged.
    """
    try:
        return Meta(**json.loads((directory / META).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{directory}: not a finished stage ({error}); run the recipe again") from error


def lineage(directory: Path) -> list[Path]:
    """Return the artifact and its ancestors, oldest first; they stand side by side."""
    chain = [directory]
    while (parent := read_meta(chain[0]).parent) is not None:
        chain.insert(0, chain[0].parent / parent)
    return chain


def finish(work: Path, final: Path, meta: Meta) -> None:
    """Turn a working directory into an artifact: flush its files, write meta.json last, rename."""
    files = {str(path.relative_to(work)): path.stat().st_size for path in sorted(work.rglob("*")) if path.is_file()}
    for name in files:
        with (work / name).open("rb") as file:
            os.fsync(file.fileno())
    write_json(work / META, asdict(meta) | {"files": files})
    if final.exists():  # a damaged artifact of the same key
        shutil.rmtree(final)
    work.rename(final)


def write_json(path: Path, value: object) -> None:
    """Write JSON beside its place, flush, and rename, so that a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


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
