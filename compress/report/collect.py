"""Gather a run's report from the `meta.json` of its stages and the `bench.json` of its last bench stage."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from compress.artifact import read_meta
from compress.recipe import Recipe
from compress.report.shape import DeployedRow, Json, Report, StageRow
from compress.report.verdict import judge
from export.environment import environment

ROW_KEYS = tuple(DeployedRow.__annotations__)


def collect(recipe: Recipe, artifacts: Sequence[Path], *, cached: Mapping[str, bool], command: str) -> Report:
    """Return the report of the finished stages in `artifacts`, in their order.

    `cached` says for each directory's name whether an earlier run made it; `command` reproduces the run.
    """
    benches = [_read(path / "bench.json") for path in artifacts if (path / "bench.json").exists()]
    bench: Json = benches[-1] if benches else {"accuracy": {}, "timings": [], "warnings": []}
    report = Report(
        schema_version=1,
        recipe=recipe.model_dump(mode="json"),
        command=command,
        environment=bench.get("environment") or environment(),
        stages=[_stage_row(path, cached[path.name]) for path in artifacts],
        deployed=[_deployed_row(timing, bench["accuracy"].get(timing["name"], {})) for timing in bench["timings"]],
        targets=recipe.targets.model_dump(),
        verdict="pass",
        failures=[],
        warnings=bench["warnings"],
    )
    report["verdict"], report["failures"] = judge(report)
    return report


def _stage_row(path: Path, cached: bool) -> StageRow:
    meta = read_meta(path)
    return StageRow(
        stage=meta.stage,
        key=meta.key,
        directory=path.name,
        cached=cached,
        seconds=meta.seconds,
        metrics=meta.metrics,
    )


def _deployed_row(timing: Json, accuracy: Json) -> DeployedRow:
    """Return a timing without its blocks and with its file's accuracy."""
    return cast(DeployedRow, {key: {**accuracy, **timing}.get(key) for key in ROW_KEYS})


def _read(path: Path) -> Json:
    return cast(Json, json.loads(path.read_text(encoding="utf-8")))
