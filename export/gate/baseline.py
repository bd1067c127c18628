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
from export.images.preprocess import Look
from export.onnx_file.outputs import Output
from export.runtime.environment import fingerprint
from export.runtime.providers import PLAIN, PROVIDERS, Arithmetic, Runtime, runtime_named
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
    provider: str = PLAIN.provider.name  # in which it was scored and timed; both are missing in older baselines
    arithmetic: Arithmetic = "f32"

    @property
    def runs_in(self) -> Runtime:
        """The provider and the arithmetic that recorded it."""
        return runtime_named(self.provider, self.arithmetic)

    outputs: tuple[Output, ...] = ()  # several

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


def name_of(machine: str, runs_in: Runtime) -> str:
    """Return the file of a machine's baseline in a provider and an arithmetic."""
    return f"{machine}{_ending(runs_in)}"


def _ending(runs_in: Runtime) -> str:
    words = [] if runs_in == PLAIN else [runs_in.provider.key, *(["bf16"] if runs_in.arithmetic == "bf16" else [])]
    return f"{'.' * bool(words)}{'-'.join(words)}.json"


def find_baseline(place: Path, machine: str, runs_in: Runtime = PLAIN) -> Path:
    """Return `place` itself if it is a file, else this machine's file in the folder, else the first of another machine.

    In a folder only the provider's own count. Raises BundleError if there is none.
    """
    if not place.is_dir():
        if not place.is_file():
            raise BundleError(f"{place}: no such baseline: record one with --update-baseline")
        return place
    own = place / name_of(machine, runs_in)
    others = tuple(_ending(Runtime(row, one)) for row in PROVIDERS.values() for one in ("f32", "bf16"))[1:]
    ending, names = _ending(runs_in), sorted(place.glob("*.json"))
    found = [
        path for path in names if path.name.endswith(ending) and (runs_in != PLAIN or not path.name.endswith(others))
    ]
    found = [own] if own.is_file() else found
    if not found:
        where = "" if runs_in == PLAIN else f" in {runs_in}"
        raise BundleError(f"{place}: has no baseline{where}: record one with --update-baseline")
    return found[0]


def check_own(was: Baseline, now: Baseline) -> None:
    """Raise BundleError for a baseline of another provider or arithmetic, of another task, or of another name with other classes."""
    if was.runs_in != now.runs_in:
        raise BundleError(
            f"the baseline was recorded in {was.runs_in}, and this run is in {now.runs_in}: {said(was.runs_in)}, or record one with "
            "--update-baseline"
        )
    if was.task != now.task or (was.bundle != now.bundle and was.classes != now.classes):
        raise BundleError(
            f"the baseline is of another bundle, {was.bundle} ({was.task}, {len(was.classes)} classes), and this one is {now.bundle} "
            f"({now.task}, {len(now.classes)} classes): give its own, or record it with --update-baseline"
        )


def said(runs_in: Runtime) -> str:
    """Return the options that mean a provider and an arithmetic."""
    return f"give --provider {runs_in.provider.key} --arithmetic {runs_in.arithmetic}"


def require_baseline(path: Path) -> None:
    """Raise BundleError for a file that is there and is no baseline, so that none is written over it."""
    if path.exists():
        read_baseline(path)


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
    outputs = tuple(Output(**{**one, "shape": tuple(one["shape"])}) for one in document.get("outputs", ()))
    # Raise KeyError if one of them is missing.
    _ = fingerprint(document["environment"]), runtime_of(document["environment"]), document["files"][document["served"]]
    return Baseline(
        **{key: document[key] for key in ("bundle", "task", "served", "environment", "data")},
        classes=classes,
        preprocess={"upright": False, "look": asdict(Look()), **document["preprocess"]},  # missing in older baselines
        files={name: Facts(**facts) for name, facts in document["files"].items()},
        predictions=None
        if rows is None
        else predictions_from_json(task_named(document["task"], outputs), classes, rows, document.get("own")),
        outputs=outputs,
        latency=None if latency is None else Recorded(**latency),
        **{key: document[key] for key in ("provider", "arithmetic") if key in document},
    )


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write the file in one step; the same baseline gives the same bytes, with one line per image."""
    document = {"schema_version": BASELINE_VERSION, **vars(baseline)}
    predictions: Predictions | None = document.pop("predictions")
    if not baseline.outputs:
        del document["outputs"]
    document["answers"] = None if predictions is None else predictions.to_json()
    document |= {"own": predictions.own} if predictions and predictions.own else {}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False, default=asdict) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror}): name another place") from error
