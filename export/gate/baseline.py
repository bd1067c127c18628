"""Record of an accepted bundle: a JSON file in git, one for each machine, named by the machine's fingerprint."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.command.files import writing
from export.errors import BundleError
from export.gate.facts import Facts
from export.gate.latency import Recorded
from export.gate.predictions import Predictions, predictions_from_json
from export.runtime.environment import fingerprint
from export.tasks import task_named

BASELINE_VERSION = 2
OWN_KEYS = {"answers", "classes"}  # of no other file that this project writes


@dataclass(frozen=True)
class Baseline:
    """One bundle on one machine, in the file's order; `data` is the path of its images. It is judged without what was measured."""

    bundle: str
    task: str
    served: str
    classes: tuple[str, ...]
    preprocess: dict[str, Any]
    environment: dict[str, Any]
    files: dict[str, Facts]
    latency: Recorded | None = None
    data: str | None = None
    predictions: Predictions | None = None

    @property
    def runtime(self) -> str | None:
        """The version of ONNX Runtime that recorded it."""
        return runtime_of(self.environment)

    @property
    def fingerprint(self) -> str:
        """The machine that recorded it."""
        return fingerprint(self.environment)


def runtime_of(environment: dict[str, Any]) -> str | None:
    """Return the installed ONNX Runtime's version, of either package."""
    versions: dict[str, str | None] = environment["versions"]
    return versions.get("onnxruntime-gpu") or versions.get("onnxruntime")


def find_baseline(place: Path, machine: str) -> Path:
    """Return `place` itself if it is a file, else this machine's file in the folder, else the first of another machine.

    Raises BundleError if there is none.
    """
    if not place.is_dir():
        if not place.is_file():
            raise BundleError(f"{place}: no such baseline: record one with --update-baseline")
        return place
    own = place / f"{machine}.json"
    found = [own] if own.is_file() else sorted(place.glob("*.json"))
    if not found:
        raise BundleError(f"{place}: has no baseline: record one with --update-baseline")
    return found[0]


def check_own(was: Baseline, now: Baseline) -> None:
    """Raise BundleError for another bundle's baseline: of another task, or of another name with other classes."""
    if was.task != now.task or (was.bundle != now.bundle and was.classes != now.classes):
        raise BundleError(
            f"the baseline is of another bundle, {was.bundle} ({was.task}, {len(was.classes)} classes), and this one is {now.bundle} "
            f"({now.task}, {len(now.classes)} classes): give its own, or record it with --update-baseline"
        )


def read_baseline(path: Path) -> Baseline:
    """Read a baseline file; BundleError if `write_baseline` did not write it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or OWN_KEYS.isdisjoint(document):
            reason = "is another file, no baseline: name one, or another name to record it with --update-baseline"
            raise BundleError(f"{path}: {reason}")
        if document["schema_version"] == BASELINE_VERSION:
            return _from_json(document)
        reason = f"schema_version: must be {BASELINE_VERSION}, got {document['schema_version']!r}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = f"is not a baseline ({type(error).__name__}: {error})"
    raise BundleError(f"{path}: {reason}: record it with --update-baseline")


def _from_json(document: dict[str, Any]) -> Baseline:
    classes, rows, latency = tuple(document["classes"]), document["answers"], document["latency"]
    # Raise KeyError if one of them is missing.
    _ = fingerprint(document["environment"]), runtime_of(document["environment"]), document["files"][document["served"]]
    return Baseline(
        **{key: document[key] for key in ("bundle", "task", "served", "environment", "data")},
        classes=classes,
        preprocess={"upright": False, **document["preprocess"]},  # missing in older baselines
        files={name: Facts(**facts) for name, facts in document["files"].items()},
        predictions=None
        if rows is None
        else predictions_from_json(task_named(document["task"]), classes, rows, document.get("own")),
        latency=None if latency is None else Recorded(**latency),
    )


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write the file in one step; the same baseline gives the same bytes, with one line per image."""
    document = {"schema_version": BASELINE_VERSION, **vars(baseline)}
    predictions: Predictions | None = document.pop("predictions")
    document["answers"] = None if predictions is None else predictions.to_json()
    document |= {"own": predictions.own} if predictions and predictions.own else {}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False, default=asdict) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror}): name another place") from error
