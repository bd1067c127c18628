"""Read what a run or a bundle measured from its folder. No model is opened, no torch is imported."""

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
from compress.report.shape import REPORT_VERSION, Json, Report
from compress.report.verdict import deployed_name
from export.bundle.inside import MAX_TEXT_BYTES, contained, read_json, read_sums, read_text
from export.bundle.read import MANIFEST
from export.command.files import sha256
from export.errors import BundleError
from export.onnx_file.targets import TARGETS

REPORT = "report.json"


class _Model(TypedDict):
    """What a comparison reads of a recipe's model."""

    arch: str


class _Recipe(TypedDict):
    """What a comparison reads of a recipe."""

    name: str
    target: str
    seed: int
    data: Json
    model: _Model
    stages: list[Json]


class _Environment(TypedDict):
    """What a comparison reads of an environment."""

    target: NotRequired[str | None]
    versions: NotRequired[Json]


def read_subjects(folders: Sequence[Path]) -> dict[str, Subject]:
    """Return what each folder's run or bundle measured, by the shortest names that tell them apart.

    Raises ArtifactError or BundleError, in one sentence, for a folder that holds neither or whose report cannot be read.
    """
    if len(folders) < 2:
        raise ArtifactError(f"takes two or more runs or bundles to compare, got {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ArtifactError("a run cannot be compared with itself: name each folder once")
    subjects = [_read(folder) for folder in folders]
    return dict(zip(_names(folders, subjects), subjects, strict=True))


def page_of(folder: Path) -> Path | None:
    """Return the report's page in a run or bundle."""
    page = folder / "report" / "index.html"
    return page if page.is_file() else None


def _names(folders: Sequence[Path], subjects: Sequence[Subject]) -> list[str]:
    """Return the recipes' names, else the folders' (the students of a recipe), else their whole paths."""
    recipes = [str(subject.report["recipe"]["name"]) for subject in subjects]
    places = [folder.resolve() for folder in folders]
    short = [place.parent.name if place.name == "bundle" else place.name for place in places]
    paths = [str(folder) for folder in folders]
    return next(names for names in (recipes, short, paths) if len(set(names)) == len(names) or names is paths)


def _read(folder: Path) -> Subject:
    if (folder / MANIFEST).is_file():
        return _read_bundle(folder)
    if (folder / REPORT).is_file():
        report = _parse(_text(folder / REPORT), str(folder / REPORT))
        return Subject(report, _opset(folder / "bundle", report))
    raise ArtifactError(
        students_of(folder, REPORT)
        or f"{folder}: holds no finished run and no bundle (no {REPORT}, no {MANIFEST}); give a run's folder, such as runs/quickstart, or its bundle"
    )


def _read_bundle(folder: Path) -> Subject:
    """Return a bundle's report; of what is read, the digests are checked."""
    digests = read_sums(folder)
    for name in (MANIFEST, REPORT):
        if name not in digests:
            raise BundleError(f"{folder / name}: is missing, and a comparison reads it: get the bundle again")
        if digests[name] != sha256(contained(folder, name)):
            raise BundleError(
                f"{folder / name}: is not the file the bundle was made with (SHA-256 differs): get the bundle again"
            )
    report = _parse(read_text(folder, REPORT), str(folder / REPORT))
    return Subject(report, _opset(folder, report))


def _opset(bundle: Path, report: Report) -> int | None:
    """Return the opset of the deployed file, None where no bundle tells it."""
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
    """Return a report.json's report after checking the type of all that a comparison reads; numbers that are not finite are refused."""
    try:
        document = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: must be JSON ({error}); run the recipe again") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != REPORT_VERSION:
        raise ArtifactError(
            f"{where}: is a report of version {version}, this tool reads {REPORT_VERSION}; run the recipe again, what is finished is kept"
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
        raise ValueError(f"{text} is no finite number")
    return number
