"""Gather a run's report from its stages' `meta.json` and the measurements of its last ptq, export and bench stages."""

import json
import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, cast

from compress.artifact import read_meta
from compress.data.digest import NOTES, images_digest
from compress.recipe.arguments import data_settings
from compress.recipe.schema import Recipe, Targets
from compress.report.judge.classes import doubts
from compress.report.judge.parity import mismatches
from compress.report.judge.recommend import recommend
from compress.report.judge.verdict import METRIC_DROP, audited_name, guesses, has_targets, judge, judged_classes
from compress.report.shape import REPORT_VERSION, DeployedRow, Json, Report, StageRow
from export.names import AUDIT_JSON, BENCH_JSON, LIMITS_JSON, NOTES_JSON, PTQ_JSON, VERIFY_JSON
from export.runtime.environment import environment
from export.runtime.rows import accuracy_of, metric_json
from export.tasks import TASKS


def collect(
    recipe: Recipe, artifacts: Sequence[Path], *, root: Path, made: Set[Path], command: str, student: str = ""
) -> Report:
    """Return the report of the finished stages in `artifacts`, with paths relative to `root`; targets are judged only if all stages ran.

    `made` are the artifacts that this run made; it reused the others. `command` reproduces the run; `student` is "" for a single one.
    """
    bench: Json = _last(artifacts, BENCH_JSON) or {"accuracy": {}, "timings": [], "warnings": []}
    is_whole = len(artifacts) == len(recipe.stages)
    report = Report(
        schema_version=REPORT_VERSION,
        metric=metric_json(TASKS[recipe.task].metric),
        recipe=recipe.model_dump(mode="json"),
        command=command,
        environment=bench.get("environment") or environment(),
        data_digest=images_digest(data_settings(recipe)),
        stages=[_stage_row(path, root, path not in made) for path in artifacts],
        deployed=_deployed(bench),
        end_to_end=bench.get("end_to_end", {}),
        float_times=bench.get("float_times", {}),
        classes=bench.get("classes"),
        ptq=_last(artifacts, PTQ_JSON),
        audit=_last(artifacts, AUDIT_JSON),
        verify=_last(artifacts, VERIFY_JSON),
        limits=[],
        recommendation=None,
        targets=_targets(recipe.targets if is_whole else Targets()),
        verdict="pass",
        failures=[],
        warnings=[
            *(_last(artifacts, NOTES) or []),
            *_trainings(artifacts),
            *bench["warnings"],
            *(_last(artifacts, NOTES_JSON) or []),
        ],
    )
    if student:
        report["student"] = student
    report["recommendation"] = recommend(report)  # first: targets judge the INT8 file that is recommended
    report["limits"] = (_last(artifacts, LIMITS_JSON) or {}).get(audited_name(report), [])
    report["verdict"], report["failures"] = judge(report)
    if wrong := mismatches(report):  # fails whatever the targets say
        report["verdict"], report["failures"] = "fail", [*wrong, *report["failures"]]
    report["warnings"] += [] if has_targets(report) else guesses(report).values()
    if judged := judged_classes(report):
        report["warnings"] += doubts(*judged, report["targets"])
    if report["verdict"] == "pass" and not is_whole:
        report["verdict"] = "partial"
    return report


def _targets(targets: Targets) -> dict[str, float | None]:
    found = targets.model_dump()
    drops: dict[str, float] = found.pop("max_metric_drop")
    return found | {f"{METRIC_DROP}{name}": drop for name, drop in drops.items()}


def _deployed(bench: Json) -> list[DeployedRow]:
    """Return every timing with the accuracy of its file in the provider that ran it."""
    elsewhere = bench.get("accuracy_elsewhere", [])
    rows = [(row, accuracy_of(row, bench["accuracy"], elsewhere)) for row in bench["timings"]]
    return [cast(DeployedRow, {**row, **scored}) for row, scored in rows if scored is not None]


def _stage_row(path: Path, root: Path, cached: bool) -> StageRow:
    meta = read_meta(path)
    return StageRow(
        stage=meta.stage,
        key=meta.key,
        directory=os.path.relpath(path, root),
        cached=cached,
        seconds=meta.seconds,
        metrics=meta.metrics,
    )


def _trainings(artifacts: Sequence[Path]) -> list[str]:
    """Return unplanned events of the trainings: early ends, rollbacks, images left out."""
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for stage in artifacts
        for path in sorted(stage.glob("training-*.json"))
    ]
    phases: dict[str, list[str]] = {}
    for training in found:
        for event in training["events"]:
            phases.setdefault(event, []).append(training["phase"])
    return [f"{', '.join(dict.fromkeys(names))}: {event}" for event, names in phases.items()]


def _last(artifacts: Sequence[Path], name: str) -> Any:
    """Return the last artifact's JSON file of this name, or None if no stage wrote one."""
    found = [path / name for path in artifacts if (path / name).exists()]
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else None
