"""Run the recipes and write their tables into recipes/README.md, and the main ones into README.md: `make results DATA=FOLDER`.

FOLDER has the data sets tin20, bccd and camvid. Goes on where it stopped, as runs do: each lies in runs/results, and its table is written
as soon as it is finished. Names of rows in ARGS choose some; otherwise all are run.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from safetensors.numpy import load_file, save_file

from compress.report.judge.verdict import deployed_name, first_and_last, headline_provider, headline_row, runs_in
from compress.report.numbers import GAP, UNKNOWN, duration, heading, percent, significant
from compress.report.page import summary
from compress.report.page.table import ReportTable, markdown
from compress.report.shape import DeployedRow, Report
from export.command.main import end
from export.errors import UserError
from export.images.size import area, said
from export.names import REPORT_JSON
from export.onnx_file.roles import FP16, TEACHER
from export.runtime.providers import PLAIN
from export.runtime.rows import Speedup, is_headline

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "results"
TABLES, MAIN = ROOT / "recipes" / "README.md", ROOT / "README.md"
END = "<!-- end of table -->"
MAIN_TABLE = "| recipe | score, teacher → INT8 | size | MACs kept | latency | speed-up |"
FURTHER = {"tensors": 2, "multilabel": 2}  # a task's further metrics in its table, in place of the agreement


class Row(NamedTuple):
    """A recipe, its data set if it is not embedded, the row whose trained teacher it takes, and its settings.

    A teacher is an encoder without its last layer.
    """

    recipe: str
    data: str = ""
    teacher: str = ""
    settings: tuple[str, ...] = ()
    is_encoder: bool = False


PHOTOGRAPHS = ("data.image_size=64", "data.augment.crop=random_resized", "data.augment.flip=true")
SGD = tuple(
    f"source.{name}"
    for name in ("fit.batch_size=64", "fit.optimizer=sgd", "fit.lr=0.05", "fit.weight_decay=0.0005", "label_smoothing=0.1")
)  # fmt: skip
ROWS = {
    "quickstart": Row("quickstart"),
    "students": Row("students"),
    "multilabel_int8": Row("multilabel_int8"),
    "segmentation_int8": Row("segmentation_int8"),
    "detection_int8": Row("detection_int8"),
    "resnet18_latency": Row("resnet18_latency", "tin20"),
    "no_training": Row("no_training", "tin20", "resnet18_latency", ("model.arch=torchvision:resnet18", "data.image_size=64")),
    "embedding_int8": Row("embedding_int8", "tin20", "resnet18_latency", ("model.arch=timm:resnet18", "data.image_size=64"), is_encoder=True),
    "detection_bccd": Row("detection_bccd", "bccd"),
    "segmentation_camvid": Row("segmentation_camvid", "camvid"),
    "resnet50_int8_photographs": Row("resnet50_int8", "tin20", "", (*PHOTOGRAPHS, *SGD)),
    "no_training_resnet50": Row("no_training", "tin20", "resnet50_int8_photographs", PHOTOGRAPHS[:1]),
}  # fmt: skip
LEADING = {  # the rows of README.md: what they show
    "quickstart": "ResNet-18, digits",
    "resnet18_latency": "ResNet-18, photographs",
    "resnet50_int8_photographs": "ResNet-50, photographs",
    "no_training_resnet50": "the same at 64 pixels, without labels or training",
    "detection_int8": "SSD, digits in scenes, mAP",
}


def folder_of(name: str) -> Path:
    """Return the folder of a row's run."""
    return RUNS / name / ROWS[name].recipe


def run(name: str, data: Path | None, *options: str) -> None:
    """Run a row's recipe, its teacher's first; a missed target is a result, a mistake or a crash ends the command.

    Raises UserError.
    """
    row = ROWS[name]
    words = ["run", f"recipes/{row.recipe}.yaml", "--out", str(RUNS / name), *options]
    words += ["--data", str(data / row.data)] if data and row.data else []
    words += ["--weights", str(weights_of(row, data))] if row.teacher else []
    words += [word for setting in row.settings for word in ("--set", setting)]
    command = [str(Path(sys.executable).with_name("compress")), *words]
    sys.stderr.write(f"\n{name}: {' '.join(command[1:])}\n")
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code not in (0, 1):
        raise UserError(
            f"{name}: `compress run` ended with exit code {code}; see above, then run the same command again"
        )


def weights_of(row: Row, data: Path | None) -> Path:
    """Return the weights of a row's teacher, which is trained if it is not there yet."""
    pattern = "00-source-*/weights.safetensors"
    if not list(folder_of(row.teacher).glob(pattern)):
        run(row.teacher, data, "--until", "source")
    [found] = folder_of(row.teacher).glob(pattern)
    if not row.is_encoder:
        return found
    encoder = RUNS / f"{row.teacher}-encoder.safetensors"
    save_file({key: value for key, value in load_file(found).items() if not key.startswith("fc.")}, encoder)
    return encoder


def reports(name: str) -> list[Report]:
    """Return a row's reports: one, or one a student; none before its run is finished."""
    folder = folder_of(name)
    files = (
        [folder / REPORT_JSON] if (folder / REPORT_JSON).exists() else sorted(folder.glob(f"students/*/{REPORT_JSON}"))
    )
    found: list[Report] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return found if all(report["deployed"] for report in found) else []


def section(name: str, found: Sequence[Report]) -> str:
    """Return a row's conditions and tables."""
    here, versions = found[0]["environment"], found[0]["environment"]["versions"]
    versions = ", ".join(
        f"{title} {versions[key]}" for title, key in (("ONNX Runtime", "onnxruntime"), ("torch", "torch"))
    )
    lines = [
        f'{here["cpu"]}, `{here["target"]}`, {here["cores"]} cores, {versions}, `SET="{" ".join(ROWS[name].settings)}"`.'
    ]
    lines = [line.replace(', `SET=""`', "") for line in lines]
    if len(found) == 1:
        return "\n\n".join([f"{lines[0]} {_stages(found[0])}", *_sizes(found[0])])
    lines += [f"`{report['student']}`: {_stages(report)}" for report in found]
    size = found[0]["recipe"]["data"]["image_size"]
    rows = [
        (row, "" if row["name"] == TEACHER else report["student"], report)
        for at, report in enumerate(found)
        for row in _timed(report)
        if row["image_size"] == size and row["name"] != FP16 and (at == 0 or row["name"] != TEACHER)
    ]
    return "\n\n".join([*lines, f"{said(size)} px:", _table(found[0], rows)])


def _stages(report: Report) -> str:
    """Return what each stage took and, in PyTorch, scored."""
    score, parts = summary.score_text(report), list[str]()
    for stage in report["stages"]:
        metrics = stage["metrics"]
        cut = metrics.get("score_as_cut")
        scores = [f"as cut {score(cut)}"] if cut is not None else []
        if stage["stage"] in {"source", "student", "prune", "distill", "qat"} and metrics.get("score") is not None:
            scores.append(score(metrics["score"]))
        parts.append(f"{stage['stage']} {', '.join([*scores, duration(stage['seconds'])])}")
    total = duration(sum(stage["seconds"] for stage in report["stages"]))
    return f"Time: {total}. {report['metric']['title']} in PyTorch, and time: {'; '.join(parts)}."


def _timed(report: Report) -> list[DeployedRow]:
    """Return the rows of one call on one thread, the largest image size first."""
    rows = [row for row in report["deployed"] if is_headline(row["provider"], row["threads"], row["batch"])]
    return sorted(summary.ordered(rows), key=lambda row: -area(row["image_size"]))


def _sizes(report: Report) -> Iterator[str]:
    for size, rows in groupby(_timed(report), lambda row: row["image_size"]):
        yield f"{said(size)} px:"
        yield _table(report, [(row, "", report) for row in rows])


def _table(report: Report, rows: Sequence[tuple[DeployedRow, str, Report]]) -> str:
    score = summary.score_text(report)
    first = rows[0][0]
    columns: dict[str, Callable[[DeployedRow], str]] = {
        heading(report["metric"]["title"]): lambda row: score(row["score"]),
        **{
            name: partial(_further, score, name)
            for name in list(first["further"])[: FURTHER.get(report["recipe"]["task"], 0)]
        },
    }
    if len(columns) == 1:
        columns["agreement"] = lambda row: score(row["agreement"])
    columns |= {
        "MB": lambda row: significant(row["size_mb"]),
        "p50, p99 ms": lambda row: f"{significant(row['p50_ms'])}, {significant(row['p99_ms'])}",
        "speed-up": lambda row: _ratio(row["speedup"]),
    }
    if "agreement" in columns:
        columns["× FP32"] = lambda row: _ratio(row["speedup_vs_student_fp32"]).partition(" ")[0]
    cells = []
    for row, student, own in rows:
        place = f", {runs_in(row)}" if runs_in(row) != PLAIN else ""
        served = ", the one served" if row["name"] == deployed_name(own) and not place else ""
        name = f"{f'`{student}` ' if student else ''}`{row['name']}`{place}{served}"
        cells.append((name, *(column(row) for column in columns.values())))
    return markdown(ReportTable("", ("file", *columns), cells))


def _further(score: Callable[[float | None], str], name: str, row: DeployedRow) -> str:
    return score(row["further"][name])


def _ratio(speed: Speedup | None) -> str:
    return f"{speed['ratio']:.2f} [{speed['ci95'][0]:.2f}, {speed['ci95'][1]:.2f}]" if speed else UNKNOWN


def leading(name: str, report: Report) -> str:
    """Return a row of README.md's table."""
    file, provider = deployed_name(report), headline_provider(report)
    teacher, student = (headline_row(report, one, provider) for one in (TEACHER, file))
    before, after = first_and_last(report, "macs_m")
    if not (teacher and student and before and after):
        raise UserError(f"{name}: its report has no time of {TEACHER} and {file} on one thread")
    score = summary.score_text(report)
    cells = (
        f"[{name}](recipes/{ROWS[name].recipe}.yaml), {LEADING[name]}",
        f"{score(teacher['score'])} → {score(student['score'])}",
        f"{significant(teacher['size_mb'])} → {significant(student['size_mb'])} MB",
        percent(after / before, 0),
        f"{significant(teacher['p50_ms'])} → {significant(student['p50_ms'])} ms",
        _ratio(student["speedup"]),
    )
    return f"| {' | '.join(cells)} |"


def replaced(text: str, name: str, table: str) -> str:
    """Return a page with another table between a row's marks.

    Raises UserError without marks.
    """
    head, begin, rest = text.partition(f"<!-- table: make results, {name} -->\n")
    if not begin:
        raise UserError(f"{name}: its page has no mark `<!-- table: make results, {name} -->`")
    return f"{head}{begin}{table}\n{END}{rest.partition(END)[2]}"


def write(name: str) -> None:
    """Write the tables of a row, if its run is finished, and its row of README.md."""
    found = reports(name)
    if not found:
        return
    TABLES.write_text(
        replaced(TABLES.read_text(encoding="utf-8"), name, section(name, found).replace(GAP, " ")), encoding="utf-8"
    )
    if name in LEADING:
        lines, new = MAIN.read_text(encoding="utf-8").splitlines(), leading(name, found[0]).replace(GAP, " ")
        places = [at for at, line in enumerate(lines) if line.startswith(f"| [{name}](")]
        at = places[0] if places else lines.index(MAIN_TABLE) + 2
        lines[at : at + len(places)] = [new]
        MAIN.write_text("\n".join([*lines, ""]), encoding="utf-8")


def main() -> int:
    """Run the chosen rows and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*ROWS, []], metavar="NAME", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--data", type=Path, help="the folder of tin20, bccd and camvid")
    arguments = parser.parse_args()
    names = arguments.names or list(ROWS)
    if arguments.data is None and (in_need := [name for name in names if ROWS[name].data]):
        parser.error(f"{', '.join(in_need)}: need DATA=, the folder of tin20, bccd and camvid")
    for name in names:
        run(name, arguments.data)
        write(name)
    return 0


if __name__ == "__main__":
    sys.exit(end(main, repairs={}))
