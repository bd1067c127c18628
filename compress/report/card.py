"""The model card: Markdown with the front-matter that Hugging Face reads, every number from the report, what is unknown left out."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from compress.report import numbers, summary
from compress.report.shape import DeployedRow, Json, Report, StageRow
from compress.report.tables import recalls
from compress.report.verdict import headline_provider, headline_row, target_of

CLASSES = 10  # of more, those that lose most
STAGE_TAGS = {"prune": "pruning", "distill": "knowledge-distillation", "qat": "quantization-aware-training"}


def card(report: Report, *, name: str, served: str, classes: int, golden: int, tensors: Mapping[str, Any]) -> str:
    """Return the card; `tensors` are the model's `input` and `output` as bundle.json has them."""
    environment = Environment(  # Markdown, not HTML: nothing is escaped
        loader=PackageLoader("compress.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    rows = headline_rows(report)
    return environment.get_template("card.md.j2").render(
        report=report,
        name=name,
        recipe=report["recipe"],
        front_matter=yaml.safe_dump(front_matter(report, name, served), sort_keys=False, allow_unicode=True),
        stages=", ".join(row["stage"] for row in report["stages"]),
        target=target_of(report),
        served=served,
        classes=classes,
        golden=golden,
        files=table([file_cells(row, report["metric"]["title"], summary.decimals(report)) for row in rows]),
        notes=notes(report, rows),
        classes_table=class_rows(report),
        plain=plain,
        made=table([stage_cells(row, report["metric"]["title"], summary.decimals(report)) for row in report["stages"]]),
        **tensors,
    )


def front_matter(report: Report, name: str, served: str) -> Json:
    """Return the metadata of Hugging Face's model cards; the result is the served file's."""
    row = next((row for row in report["deployed"] if row["name"] == served), None)
    tags = [
        "onnx",
        "onnxruntime",
        *(STAGE_TAGS[row["stage"]] for row in report["stages"] if row["stage"] in STAGE_TAGS),
    ]
    if row:
        tags.append(row["precision"])
    data: Json = {"library_name": "onnx", "pipeline_tag": "image-classification", "tags": tags}
    if row and row["score"] is not None:
        dataset = report["recipe"]["data"]["dataset"]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset, "split": "validation"},
            "metrics": [
                {
                    "type": "accuracy",
                    "value": row["score"],
                    "name": f"{numbers.heading(report['metric']['title'])} of {served}.onnx in ONNX Runtime",
                }
            ],
        }
        data["model-index"] = [{"name": name, "results": [result]}]
    return data


def headline_rows(report: Report) -> list[DeployedRow]:
    """Return the rows of all files under the headline's conditions."""
    provider, names = headline_provider(report), dict.fromkeys(row["name"] for row in report["deployed"])
    rows = [headline_row(report, name, provider) for name in names]
    return [row for row in rows if row]


def file_cells(row: DeployedRow, title: str, digits: int) -> dict[str, str | None]:
    """Return what the table says of a file."""
    speedup = row["speedup"]
    interval = (
        f"{numbers.times(speedup['ratio'])} [{speedup['ci95'][0]:.2f}, {speedup['ci95'][1]:.2f}]" if speedup else None
    )
    return {
        "file": f"`{row['name']}.onnx`",
        "precision": row["precision"],
        title: known(row["score"], lambda score: numbers.percent(score, digits)),
        **{
            name: known(value, lambda found: numbers.percent(found, digits))
            for name, value in row.get("further", {}).items()
        },
        "agrees with the float student": known(row["agreement"], lambda share: numbers.percent(share, digits)),
        "size": known(row["size_mb"], lambda size: numbers.significant(size, "MB")),
        "median latency": known(row["p50_ms"], lambda time: numbers.significant(time, "ms")),
        "speed-up over the teacher [95 %]": interval,
    }


def class_rows(report: Report) -> str:
    """Return the table of the classes that lose most, none where they were not counted; their names come from strangers."""
    return "\n\n".join(
        table([dict(zip(found.columns, map(plain, row), strict=True)) for row in found.rows[:CLASSES]])
        for found in recalls(report)
    )


def plain(text: str) -> str:
    """Return a text that is nothing but text in a cell of Markdown."""
    return html.escape(" ".join(text.split()).replace("|", "\\|"), quote=False)


def stage_cells(row: StageRow, title: str, digits: int) -> dict[str, str | None]:
    """Return what the table says of a stage."""
    metric = row["metrics"].get
    return {
        "stage": row["stage"],
        title: known(metric("score"), lambda score: numbers.percent(score, digits)),
        "parameters": known(metric("params_m"), lambda count: numbers.significant(count, "M")),
        "MACs": known(metric("macs_m"), lambda count: numbers.significant(count, "M")),
    }


def notes(report: Report, rows: Sequence[DeployedRow]) -> str:
    """Return the conditions of the files' numbers."""
    if not rows:
        return "The files were not timed."
    where = report["environment"]
    images = (
        f"{report['metric']['title']} on {rows[0]['images']:,} validation images in ONNX Runtime; "
        if rows[0]["images"]
        else ""
    )
    machine = ", ".join(str(part) for part in (where.get("gpu"), where.get("cpu")) if part)
    version = (where.get("versions") or {}).get("onnxruntime")
    engine = f", ONNX Runtime {version}" if version else ""
    return f"Conditions: {images}latency: {summary.conditions(rows[0])}, {machine or 'an unnamed machine'}{engine}."


def known(value: float | None, show: Any) -> str | None:
    """Return a value in words, None where it is unknown."""
    return None if value is None else str(show(value))


def table(rows: Sequence[Mapping[str, str | None]]) -> str:
    """Return a Markdown table without the columns that no row knows anything of."""
    header = [name for name in (rows[0] if rows else ()) if any(row[name] is not None for row in rows)]
    lines = [header, ["---"] * len(header), *([row[name] or "" for name in header] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
