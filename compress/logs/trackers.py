"""Send a run's log to experiment trackers beside TensorBoard: MLflow, trackio, Weights & Biases.

Each finds its server by its own environment variables, and is imported only if the recipe names it. Imports no torch.
"""

import importlib
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from export.names import BUNDLE, REPORT_JSON

PROJECT, IDENTITY = "compress", ".logged-as"
PATIENCE = {  # otherwise an unreachable server blocks a run for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "WANDB_INIT_TIMEOUT": "30",
}
LEFT = (REPORT_JSON, "report", BUNDLE)  # sent from a finished run's folder


@dataclass(frozen=True)
class Tracker:
    """A run on a server: sends an epoch's numbers, and a finished run's files and folders, keyed by their names there.

    `close` takes whether the run came to its end.
    """

    numbers: Callable[[Mapping[str, float], int], None]
    files: Callable[[Mapping[str, Path]], None]
    close: Callable[[bool], None]


def _mlflow(mlflow: Any, name: str, key: str, parameters: Mapping[str, str]) -> Tracker:
    if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
        mlflow.set_experiment(PROJECT)
    found = mlflow.search_runs(filter_string=f"tags.compress = '{key}'", output_format="list", max_results=1)
    mlflow.start_run(found[0].info.run_id if found else None, run_name=name, tags={"compress": key})
    mlflow.log_params({} if found else parameters)  # a resumed run's parameters cannot be changed

    def files(paths: Mapping[str, Path]) -> None:
        for name, path in paths.items():
            if path.is_dir():
                mlflow.log_artifacts(str(path), name)
            else:
                mlflow.log_artifact(str(path), name.rpartition("/")[0] or None)

    def close(whole: bool) -> None:
        mlflow.end_run("FINISHED" if whole else "FAILED")

    return Tracker(lambda numbers, epoch: mlflow.log_metrics(dict(numbers), step=epoch), files, close)


def _wandb(wandb: Any, name: str, key: str, parameters: Mapping[str, str]) -> Tracker:
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, name=name, id=key, resume="allow", config=parameters)
    return _like_wandb(wandb, run, name, lambda whole: run.finish(exit_code=0 if whole else 1))


def _trackio(trackio: Any, name: str, key: str, parameters: Mapping[str, str]) -> Tracker:
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run = trackio.init(project, f"{name}-{key}", resume="allow", config=parameters, embed=False)
    return _like_wandb(trackio, run, name, lambda _: run.finish())


def _like_wandb(library: Any, run: Any, name: str, close: Callable[[bool], None]) -> Tracker:
    def files(paths: Mapping[str, Path]) -> None:
        artifact = library.Artifact(name, type="model")
        for inside, path in paths.items():
            (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path), inside)
        run.log_artifact(artifact)

    return Tracker(lambda numbers, epoch: run.log({**numbers, "epoch": epoch}), files, close)


TRACKERS: dict[str, Callable[[Any, str, str, Mapping[str, str]], Tracker]] = {
    "mlflow": _mlflow,
    "trackio": _trackio,
    "wandb": _wandb,
}


class Trackers:
    """The open trackers of a run. One that fails is reported once and dropped; the run goes on, and its own log is complete."""

    def __init__(self) -> None:
        self.open: dict[str, Tracker] = {}

    def epoch(self, phase: str, epoch: int, measured: Mapping[str, float]) -> None:
        """Send an epoch's measurements."""
        numbers = {f"{phase}/{name}": value for name, value in measured.items()}
        self.each(lambda tracker: tracker.numbers(numbers, epoch))

    def finish(self, folders: Mapping[str, Path]) -> None:
        """Send the numbers, report and bundle of each student; a run without students has the single name ""."""
        numbers, paths = dict[str, float](), dict[str, Path]()
        if not self.open:
            return
        for student, folder in folders.items():
            start = f"{student}/" if student else ""
            paths |= {f"{start}{name}": path for name in LEFT if (path := folder / name).exists()}
            for row in json.loads((folder / REPORT_JSON).read_text(encoding="utf-8"))["stages"]:
                found = {f"{start}{row['stage']}/final_{name}": value for name, value in row["metrics"].items()}
                numbers |= {name: value for name, value in found.items() if value is not None}
        self.each(lambda tracker: tracker.numbers(numbers, 0))
        self.each(lambda tracker: tracker.files(paths))

    def each(self, send: Callable[[Tracker], None]) -> None:
        """Call `send` with every tracker that is still open."""
        for name, tracker in list(self.open.items()):
            try:
                send(tracker)
            except Exception as error:  # noqa: BLE001 (a server's failure must not end a training)
                del self.open[name]
                sys.stderr.write(f"log_to: {name}: {_short(error)}; the run goes on without it\n")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


@contextmanager
def opened(names: Sequence[str], name: str, folder: Path, settings: Mapping[str, Any]) -> Iterator[Trackers]:
    """Open the trackers of the run in a folder; a run that is resumed continues its log on the server.

    A run that fails, is interrupted or gets SIGTERM is marked as failed. Raises CompressError if a library is missing or its server
    cannot be reached.
    """
    trackers, identity, whole = Trackers(), folder / IDENTITY, False
    before = signal.getsignal(signal.SIGTERM)
    if names:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # else servers show the run as running for ever
        os.environ.update({variable: os.environ.get(variable, value) for variable, value in PATIENCE.items()})
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12])
    try:
        for tracker in names:
            if find_spec(tracker) is None:
                raise CompressError(f"log_to: {tracker} is not installed: pip install {tracker}, or leave it out")
            library, parameters = importlib.import_module(tracker), dict(_flat("", settings))
            try:
                trackers.open[tracker] = TRACKERS[tracker](library, name, identity.read_text(), parameters)
            except Exception as error:  # each library has its own errors for an unreachable server
                raise CompressError(f"log_to: {tracker}: {_short(error)}; start its server, or leave it out") from error
        yield trackers
        whole = True
    finally:
        trackers.each(lambda tracker: tracker.close(whole))
        if names:
            signal.signal(signal.SIGTERM, before)


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield a recipe's fields as (dotted path, text); a stage's number is followed by its name."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{path}.{name}" if path else str(name), inner)
    elif isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(f"{path}.{number}.{inner['stage']}" if "stage" in inner else f"{path}.{number}", inner)
    else:
        yield path, str(value)
