"""Write a bundle beside its place, read it back, and put it there in one step."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from export.bundle import LABELS, MANIFEST, NAME, PREPROCESS, SCHEMA_VERSION, SUMS, Json, entry, read_bundle, sha256
from export.errors import BundleError
from export.model_file import ModelFile, inspect


def write_bundle(
    out: Path,
    files: Mapping[str, Path],
    *,
    preprocess: Mapping[str, object],
    labels: Sequence[str],
    manifest: Mapping[str, object],
    metrics: Mapping[str, Mapping[str, object]],
) -> None:
    """Write the bundle beside `out`, read it back, and put it in place in one step; only an older bundle is replaced.

    `manifest` says what the files do not: name, task, target, recipe digest; `metrics` the same for each file: top-1,
    agreement.
    Raises BundleError for content that no reader would accept and for a place that cannot be written.
    """
    if not is_replaceable(out):
        raise BundleError(f"{out}: exists and is no bundle: move it away or name another place")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            aside = Path(folder, "new")
            aside.mkdir()
            fill(aside, files, preprocess=preprocess, labels=labels, manifest=manifest, metrics=metrics)
            read_bundle(aside)
            put_in_place(aside, out, old=Path(folder, "old"))
    except OSError as error:
        raise BundleError(
            f"{out}: cannot be written ({error.strerror}): free the disk or name another place"
        ) from error


def is_replaceable(out: Path) -> bool:
    """Whether `out` is free, an empty folder, or an older bundle."""
    if out.is_symlink() or not out.is_dir():
        return not out.exists() and not out.is_symlink()
    return (out / MANIFEST).is_file() or not any(out.iterdir())


def fill(
    folder: Path,
    files: Mapping[str, Path],
    *,
    preprocess: Mapping[str, object],
    labels: Sequence[str],
    manifest: Mapping[str, object],
    metrics: Mapping[str, Mapping[str, object]],
) -> None:
    """Write every file of the bundle into the empty `folder`, SHA256SUMS last."""
    if bad := [label for label in labels if not label.isprintable() or label != label.strip() or not label]:
        raise BundleError(f"labels: must be one printable line each, got {bad[0]!r}: rename the class")
    entries: dict[str, Json] = {}
    facts: dict[str, ModelFile] = {}
    for name, source in files.items():
        if not NAME.fullmatch(name):
            raise BundleError(f"files: {name!r}: must be lower-case letters, digits, - and _")
        shutil.copyfile(source, folder / f"{name}.onnx")
        facts[name] = inspect(folder / f"{name}.onnx")
        entries[name] = entry(folder / f"{name}.onnx", facts[name]) | dict(metrics.get(name, {}))
    shapes = {(fact.input, fact.output) for fact in facts.values()}
    if len(shapes) != 1:
        raise BundleError(
            f"files: must have the same input and output, got {len(shapes)} kinds: export them from one run"
        )
    given, wanted = shapes.pop()
    document = {
        "schema_version": SCHEMA_VERSION,
        **manifest,
        "input": asdict(given),
        "output": asdict(wanted),
        "files": entries,
    }
    write_text(folder / MANIFEST, dump(document))
    write_text(folder / PREPROCESS, dump(dict(preprocess)))
    write_text(folder / LABELS, "".join(f"{label}\n" for label in labels))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    write_text(folder / SUMS, "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths))


def put_in_place(new: Path, out: Path, *, old: Path) -> None:
    """Move `new` to `out`; a bundle already there moves to `old` first, and back if that fails."""
    for path in [*new.rglob("*"), new]:
        sync(path)
    replaced = out.exists()
    if replaced:
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if replaced:
            old.rename(out)
        raise
    sync(out.parent)


def dump(document: Mapping[str, object]) -> str:
    """Return JSON as people read it and in the same bytes each time."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with Unix line ends everywhere."""
    path.write_bytes(text.encode())


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
