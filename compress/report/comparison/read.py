"""Read a run's or bundle's report from its folder, without opening a model or importing torch."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from compress.artifact import students_of
from compress.errors import ArtifactError
from compress.report.comparison.candidate import Subject
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


class _Recipe(TypedDict):
    """The fields of a recipe that a comparison reads."""

    name: str
    target: str
    seed: int
    data: Json
    model: _Model
    stages: list[Json]


class _Environment(TypedDict):
    """The fields of an environment that a comparison reads."""

    target: NotRequired[str | None]
    versions: NotRequired[Json]


def read_subjects(folders: Sequence[Path]) -> dict[str, Subject]:
    """Return each folder's report, by the shortest names that are unique.

    Raises ArtifactError or BundleError for a folder that is no run or bundle or whose report cannot be read.
    """
    if len(folders) < 2:
        raise ArtifactError(f"needs two or more runs or bundles to compare, got {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ArtifactError("a run cannot be compared with itself: name each folder once")
    subjects = [_read(folder) for folder in folders]
    return dict(zip(_names(folders, subjects), subjects, strict=True))


def page_of(folder: Path) -> Path | None:
    """Return the path of a run's or bundle's report page, if there is one."""
    page = folder / PAGE
    return page if page.is_file() else None


def _names(folders: Sequence[Path], subjects: Sequence[Subject]) -> list[str]:
    """Return the recipes' names if unique, else the folders' names (students of one recipe), else the paths."""
    recipes = [str(subject.report["recipe"]["name"]) for subject in subjects]
    places = [folder.resolve() for folder in folders]
    short = [place.parent.name if place.name == BUNDLE else place.name for place in places]
    paths = [str(folder) for folder in folders]
    return next(names for names in (recipes, short, paths) if len(set(names)) == len(names) or names is paths)


def _read(folder: Path) -> Subject:
    if (folder / MANIFEST).is_file():
        return _read_bundle(folder)
    if (folder / REPORT_JSON).is_file():
        report = _parse(_text(folder / REPORT_JSON), str(folder / REPORT_JSON))
        return Subject(report, _opset(folder / BUNDLE, report))
    raise ArtifactError(
        students_of(folder, REPORT_JSON)
        or f"{folder}: is neither a finished run nor a bundle (no {REPORT_JSON}, no {MANIFEST}); give a run's folder, such as runs/quickstart, or its bundle"
    )


def _read_bundle(folder: Path) -> Subject:
    """Return a bundle's report, after checking the digests of the files read."""
    digests = read_sums(folder)
    for name in (MANIFEST, REPORT_JSON):
        if name not in digests:
            raise BundleError(f"{folder / name}: is not in SHA256SUMS, but a comparison reads it: get the bundle again")
        if digests[name] != sha256(contained(folder, name)):
            raise BundleError(
                f"{folder / name}: is not the file the bundle was made with (SHA-256 differs): get the bundle again"
            )
    report = _parse(read_text(folder, REPORT_JSON), str(folder / REPORT_JSON))
    return Subject(report, _opset(folder, report))


def _opset(bundle: Path, report: Report) -> int | None:
    """Return the opset of the deployed file, None if no bundle has it."""
    if not (bundle / MANIFEST).is_file():
        return None
    files = read_json(bundle, MANIFEST).get("files")
    listed = files.get(deployed_name(report)) if isinstance(files, dict) else None
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
