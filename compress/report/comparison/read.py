"""Read a run's or bundle's report from its folder, without opening a model or importing torch."""

import json
import math
import os
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from compress.artifact import students_of
from compress.errors import ArtifactError
from compress.report.judge.verdict import deployed_name
from compress.report.shape import REPORT_VERSION, Json, Report
from export.bundle.inside import MAX_TEXT_BYTES, contained, read_json, read_sums, read_text
from export.command.files import sha256
from export.errors import BundleError
from export.names import BUNDLE, MANIFEST, PAGE, REPORT_JSON
from export.onnx_file.targets import TARGETS


class _Model(TypedDict):
    """The fields of a recipe's model that a comparison reads."""

    arch: str


class _Teacher(TypedDict):
    """The fields of a recipe's teacher that a comparison reads."""

    network: str


class _Recipe(TypedDict):
    """The fields of a recipe that a comparison reads."""

    name: str
    target: str
    seed: int
    data: Json
    model: _Model | None
    teacher: NotRequired[list[_Teacher]]
    stages: list[Json]


class _Environment(TypedDict):
    """The fields of an environment that a comparison reads."""

    target: NotRequired[str | None]
    versions: NotRequired[Json]


@dataclass(frozen=True)
class FinishedRun:
    """A report to compare, the deployed file's opset if a bundle has it, and the link to its own page."""

    report: Report
    opset: int | None = None
    link: str | None = None


def read_runs(folders: Sequence[Path], *, page: Path | None = None) -> dict[str, FinishedRun]:
    """Return each folder's report, by the shortest names that are unique; links are relative to `page`.

    Raises ArtifactError or BundleError for a folder that is no run or bundle or whose report cannot be read.
    """
    if len(folders) < 2:
        raise ArtifactError(f"needs two or more runs or bundles to compare, got {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ArtifactError("a run cannot be compared with itself: name each folder once")
    runs = [_read(folder, page) for folder in folders]
    recipes = [str(run.report["recipe"]["name"]) for run in runs]
    places = [folder.resolve() for folder in folders]  # for students of one recipe
    short = [place.parent.name if place.name == BUNDLE else place.name for place in places]
    names = next((names for names in (recipes, short) if len(set(names)) == len(names)), list(map(str, folders)))
    return dict(zip(names, runs, strict=True))


def link_to(target: Path, page: Path) -> str:
    """Return the relative link from a page to a file."""
    return urllib.parse.quote(Path(os.path.relpath(target, page.parent)).as_posix())


def _read(folder: Path, page: Path | None) -> FinishedRun:
    if (folder / MANIFEST).is_file():
        bundle, text = folder, _checked(folder)
    elif (folder / REPORT_JSON).is_file():
        bundle, text = folder / BUNDLE, _text(folder / REPORT_JSON)
    else:
        raise ArtifactError(
            students_of(folder, REPORT_JSON)
            or f"{folder}: is neither a finished run nor a bundle (no {REPORT_JSON}, no {MANIFEST}); give a run's folder, such as runs/quickstart, or its bundle"
        )
    report, own = _parse(text, str(folder / REPORT_JSON)), folder / PAGE
    link = link_to(own, page) if page and own.is_file() else None
    return FinishedRun(report, _opset(bundle, deployed_name(report)), link)


def _checked(bundle: Path) -> str:
    """Return the text of a bundle's report, after checking the digests of the files read."""
    digests = read_sums(bundle)
    for name in (MANIFEST, REPORT_JSON):
        if name not in digests:
            raise BundleError(f"{bundle / name}: is not in SHA256SUMS, but a comparison reads it: get the bundle again")
        if digests[name] != sha256(contained(bundle, name)):
            raise BundleError(
                f"{bundle / name}: is not the file the bundle was made with (SHA-256 differs): get the bundle again"
            )
    return read_text(bundle, REPORT_JSON)


def _opset(bundle: Path, file: str | None) -> int | None:
    """Return a file's opset, None if no bundle has it."""
    files = read_json(bundle, MANIFEST).get("files") if (bundle / MANIFEST).is_file() else None
    listed = files.get(file) if isinstance(files, dict) else None
    opset = listed.get("opset") if isinstance(listed, dict) else None
    return opset if isinstance(opset, int) else None


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ArtifactError(f"{path}: must be at most {MAX_TEXT_BYTES:,} bytes; run the recipe again")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{path}: must be UTF-8 text ({error.reason} at byte {error.start}); run the recipe again"
        ) from error


def _parse(text: str, where: str) -> Report:
    """Return the report in a report.json, after checking the types that a comparison reads; numbers must be finite."""
    try:
        document = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: must be JSON ({error}); run the recipe again") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != REPORT_VERSION:
        raise ArtifactError(
            f"{where}: is a report of version {version}, this tool reads {REPORT_VERSION}; run the recipe again, finished stages are reused"
        )
    try:
        report = TypeAdapter(Report).validate_python(document)
        TypeAdapter(_Recipe).validate_python(report["recipe"])
        TypeAdapter(_Environment).validate_python(report["environment"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{where}: {place}: {first['msg'].lower()}; run the recipe again") from error
    if not report["stages"]:
        raise ArtifactError(f"{where}: stages: must not be empty; run the recipe again")
    if (target := report["recipe"]["target"]) == "auto":
        target = report["environment"].get("target")
    if target not in TARGETS:
        raise ArtifactError(f"{where}: target: must be {', '.join(TARGETS)}, got {target}; run the recipe again")
    return report


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
