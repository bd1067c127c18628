"""The model card: Markdown with Hugging Face's front matter; every number is from the report, unknown ones are left out."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from compress.report.judge.verdict import mostly_float, runs_in, served_elsewhere, target_of
from compress.report.page import summary
from compress.report.page.table import ReportTable, markdown, plain
from compress.report.page.tables import files, recalls, stages
from compress.report.shape import DeployedRow, Json, Report
from export.onnx_file.outputs import Output
from export.runtime.faults import FAULTS
from export.tasks import TASKS, task_named
from export.tasks.decoder import Decoder

CLASSES = 10  # at most; those that lose most
STAGE_TAGS = {"prune": "pruning", "distill": "knowledge-distillation", "qat": "quantization-aware-training"}


def card(
    report: Report,
    *,
    name: str,
    served: str,
    classes: int,
    golden: int,
    tensors: Mapping[str, Any],
    outputs: Sequence[Output] = (),
    decoder: bytes | None = None,
) -> str:
    """Return the card; `tensors` are the model's `input` and `outputs` as bundle.json has them, `outputs` are several, `decoder` is a detector's file."""
    environment = Environment(  # Markdown, not HTML: `plain` escapes untrusted text
        loader=PackageLoader("compress.report.page", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    timed = next(iter(summary.compared_rows(report)), [])
    return environment.get_template("card.md.j2").render(
        report=report,
        name=name,
        recipe=report["recipe"],
        network=summary.network(report),
        front_matter=yaml.safe_dump(front_matter(report, name, served), sort_keys=False, allow_unicode=True),
        stages=", ".join(row["stage"] for row in report["stages"]),
        target=target_of(report),
        served=served,
        classes=classes,
        golden=golden,
        faults=FAULTS if any(row["precision"] == "int8" for row in report["deployed"]) else (),
        counted=summary.counted(report),
        task=task_named(report["recipe"]["task"], outputs, Decoder(decoder) if decoder else None),
        files=markdown(files(report, timed)) if timed else "",
        notes=notes(report, timed),
        classes_table="\n\n".join(markdown(table, CLASSES) for table in recalls(report)),
        plain=plain,
        plugin=plugin(report),
        made=markdown(_without(stages(report), "Time", "", "Key")),
        **tensors,
    )


def plugin(report: Report) -> dict[str, object] | None:
    """Return what opens the fastest file where a plugin runs it; None if another provider's file is the fastest."""
    row = served_elsewhere(report)
    if row is None or runs_in(row).provider.plugin is None:
        return None
    found, arithmetic = runs_in(row)
    return {
        "file": row["name"],
        "title": str(runs_in(row)),
        "package": found.package,
        "module": found.plugin,
        "name": found.name,
        "facts": dict(found.device_facts),
        "options": found.options(1, arithmetic) if found.options else {},
    }


def _without(table: ReportTable, *columns: str) -> ReportTable:
    """Return a table without some columns: those that change from run to run, so that the bundle does not."""
    kept = [index for index, column in enumerate(table.columns) if column not in columns]
    rows = [[row[index] for index in kept] for row in table.rows]
    return table._replace(columns=tuple(table.columns[index] for index in kept), rows=rows)


def front_matter(report: Report, name: str, served: str) -> Json:
    """Return the metadata for Hugging Face, with the served file's score as the result."""
    row = next((row for row in report["deployed"] if row["name"] == served), None)
    tags = [
        "onnx",
        "onnxruntime",
        *(STAGE_TAGS[row["stage"]] for row in report["stages"] if row["stage"] in STAGE_TAGS),
    ]
    if row:
        tags.append("mixed-precision" if mostly_float(report, served) else row["precision"])
    task, metric = TASKS[report["recipe"]["task"]].hub
    data: Json = {"library_name": "onnx", "pipeline_tag": task, "tags": tags}
    if row:
        dataset = report["recipe"]["data"]["dataset"]
        result = {
            "task": {"type": task},
            "dataset": {"name": dataset, "type": dataset, "split": "validation"},
            "metrics": [
                {
                    "type": metric,
                    "value": row["score"],
                    "name": f"{summary.metric_title(report)} of {served}.onnx in ONNX Runtime",
                }
            ],
        }
        data["model-index"] = [{"name": name, "results": [result]}]
    return data


def notes(report: Report, rows: Sequence[DeployedRow]) -> str:
    """Return the conditions under which the files were measured."""
    if not rows:
        return "The files were not timed."
    where = report["environment"]
    images = f"{report['metric']['title']} on {rows[0]['images']:,} validation images in ONNX Runtime; "
    machine = ", ".join(str(part) for part in (where.get("gpu"), where.get("cpu")) if part)
    version = (where.get("versions") or {}).get("onnxruntime")
    engine = f", ONNX Runtime {version}" if version else ""
    return f"Conditions: {images}latency: {summary.conditions(rows[0])}, {machine or 'an unnamed machine'}{engine}."
