"""The report's tables: stages, deployed files, classes; `sections` adds those on INT8."""

from collections.abc import Sequence
from itertools import groupby

from compress.report.judge import gain
from compress.report.judge.classes import worst_first
from compress.report.judge.verdict import any_row, judged_classes, runs_in
from compress.report.numbers import UNKNOWN, duration, heading, interval, points, significant, times
from compress.report.page import summary, tables_int8
from compress.report.page.table import PageSection, ReportTable, count
from compress.report.shape import DeployedRow, Report
from export.onnx_file.roles import TEACHER

MATRIX_CLASSES = 20  # with more classes, only the most confused pairs are shown
PAIRS = 20
ELSEWHERE = "A file named after another target was scored and timed on this machine; on its own target, score and time can differ."


def sections(report: Report) -> list[PageSection]:
    """Return everything that was measured, in the order of the page."""
    return [
        PageSection("Stage by stage", [stages(report)]),
        deployed(report),
        PageSection(
            "Class by class" if report["classes"] else "Accuracy",
            [*accuracy(report), *recalls(report), *confusion(report)],
        ),
        *tables_int8.sections(report),
    ]


def stages(report: Report) -> ReportTable:
    """Return each stage's metrics, and whether it was reused from an earlier run."""
    score = summary.score_text(report)
    rows = [
        (
            stage["stage"],
            score(stage["metrics"].get("score")),
            *(significant(stage["metrics"].get(name), "M") for name in ("params_m", "macs_m")),
            significant(stage["metrics"].get("size_mb"), "MB"),
            duration(stage["seconds"]),
            "cached" if stage["cached"] else "",
            stage["key"],
        )
        for stage in report["stages"]
    ]
    columns = ("Stage", summary.metric_title(report), "Parameters", "MACs", "Size", "Time", "", "Key")
    return ReportTable("Stages", columns, rows, more=1)


def deployed(report: Report) -> PageSection:
    """Return every file under the headline's conditions, and every timing."""
    rows = report["deployed"]
    after = [
        f"Agreement with student_fp32: the fraction of {summary.metric(report).alike}. p50 is the median of one call, p90 and p99 are "
        "the slow ones. Peak MB: the memory that the file adds to ONNX Runtime's own."
    ]
    after += [ELSEWHERE] if any(row["name"] not in summary.TITLES for row in rows) else []
    return PageSection(
        "Deployed files",
        [*(files(report, rows) for rows in summary.compared_rows(report)), *end_to_end(report)],
        after=[*after, *gain.sentences(report, summary.decimals(report))] if rows else [],
        folded=[files(report, list(own)) for _, own in groupby(summary.ordered(rows), summary.conditions)],
    )


def end_to_end(report: Report) -> list[ReportTable]:
    """Return the time of one image from its bytes to the prediction."""
    rows = [
        (name, *map(significant, (*(parts := (row["read_ms"], row["network_ms"], row["answer_ms"])), sum(parts))))
        for name, row in report.get("end_to_end", {}).items()
    ]
    columns = ("File", "Read ms", "Network ms", "Prediction ms", "Total")
    note = "Medians: read and preprocess an image file of its own size, run the network, turn its output into a prediction."
    return [ReportTable("From file to prediction: one image, one thread", columns, rows, note=note)] if rows else []


def files(report: Report, rows: Sequence[DeployedRow]) -> ReportTable:
    """Return the table of files that were timed under the same conditions, with the provider of each if there are several."""
    several = len({runs_in(row) for row in rows}) > 1
    tuned = any(row["provider_options"] for row in rows)
    score = summary.score_text(report)
    cells = [
        (
            row["name"],
            *((str(runs_in(row)),) if several else ()),
            score(row["score"]),
            score(row["agreement"]),
            *(significant(row[key]) for key in ("size_mb", "p50_ms", "p99_ms")),
            times(row["speedup"] and row["speedup"]["ratio"]),
            interval(row["speedup"]["ci95"]) if row["speedup"] else "",
            times(row["speedup_vs_student_fp32"] and row["speedup_vs_student_fp32"]["ratio"]),
            *(significant(row[key]) for key in ("p90_ms", "throughput_ips", "peak_memory_mb")),
            *((significant(row.get("open_ms")), str(len(row.get("left_to_others", [])))) if several else ()),
            *((", ".join(f"{key}={value}" for key, value in row["provider_options"].items()),) if tuned else ()),
        )
        for row in rows
    ]
    place, opened = (("Runs in",), ("Open ms", "Left to others")) if several else ((), ())
    columns = ("File", *place, summary.metric_title(report), "Agree", "MB", "p50 ms", "p99 ms", "vs teacher", "95 %")
    further = ("p90 ms", "Images/s", "Peak MB", *opened, *(("Provider options",) if tuned else ()))
    return ReportTable(summary.conditions(rows[0]), (*columns, "vs FP32", *further), cells, more=len(further))


def accuracy(report: Report) -> list[ReportTable]:
    """Return every file's score, its further metrics and its score of each class, if the task has any of these."""
    classes, score, digits = report["classes"], summary.score_text(report), summary.decimals(report)
    if classes is not None and judged_classes(report) is None:
        return []
    names = sorted({row["name"] for row in report["deployed"]}, key=summary.order)
    found = [row for name in names if (row := any_row(report, name))]
    if classes is None and not any(row["further"] or row.get("measures") for row in found):
        return []
    known = [title for title in found[0]["further"] if {row["further"][title] for row in found} != {None}]
    measures = list(found[0].get("measures", {}))
    rows = [
        (
            row["name"],
            score(row["score"]),
            interval(row["score_ci95"], digits, 100) if "score_ci95" in row else "",
            *(score(row["further"][name]) for name in known),
            *(significant(row.get("measures", {}).get(name), digits=4) for name in measures),
        )
        for row in found
    ]
    columns = ("File", summary.metric_title(report), "95 %", *map(heading, known), *measures)
    note = "Balanced accuracy is the mean recall of the classes: each counts the same, however many images it has."
    tables = [ReportTable("Accuracy", columns, rows, note=note if "balanced accuracy" in known else "")]
    if classes is not None and "measure" in classes:
        names = sorted(classes["files"].keys() & set(names), key=summary.order)
        scores = zip(*(classes["files"][name].get("scores", []) for name in names), strict=True)
        each = [(label, *map(score, own)) for label, own in zip(classes["names"], scores, strict=True)]
        tables.append(ReportTable(f"{classes['measure']} of each class", ("Class", *names), each))
    return tables


def recalls(report: Report) -> list[ReportTable]:
    """Return the recall of teacher and deployed file in each class, largest drop first, classes without images last."""
    judged = judged_classes(report)
    if judged is None:
        return []
    (classes, file), score, counted = judged, summary.score_text(report), summary.counted(report)
    rows = [
        (
            line.name,
            count(line.images),
            score(line.teacher / line.images),
            score(line.student / line.images),
            points(-line.drop),
        )
        for line in worst_first(classes, file)
    ]
    pairs = zip(classes["names"], classes["images"], strict=True)
    rows += [(name, "0", UNKNOWN, UNKNOWN, UNKNOWN) for name, images in pairs if not images]
    columns = ("Class", heading(counted), "Teacher", "Deployed", "Change")
    note = f"Recall: the fraction of a class's validation {counted} that {TEACHER} and {file} predict right, in ONNX Runtime."
    return [ReportTable("Recall of each class, worst loss first", columns, rows, note=note)]


def confusion(report: Report) -> list[ReportTable]:
    """Return the deployed file's confusion matrix, or with many classes the most confused pairs."""
    judged = judged_classes(report)
    if judged is None or judged[0]["files"][judged[1]]["mistakes"] is None:
        return []
    classes, file = judged
    names, images = classes["names"], classes["images"]
    teacher, own = (
        {(truth, found): times for truth, found, times in classes["files"][name]["mistakes"] or ()}
        for name in (TEACHER, file)
    )
    if len(names) > MATRIX_CLASSES:
        most = sorted(own.items(), key=lambda item: (-item[1], item[0]))[:PAIRS]
        pairs = [
            (names[truth], names[found], *map(count, (times, teacher.get((truth, found), 0), images[truth])))
            for (truth, found), times in most
        ]
        columns = ("Class", "Taken for", heading(summary.counted(report)), "By the teacher", "Of")
        return [ReportTable(f"Most confused by {file}", columns, pairs, (0, 1))]
    counts = own | {(index, index): right for index, right in enumerate(classes["files"][file]["correct"])}
    rows = [
        (name, *(count(counts[truth, found]) if counts.get((truth, found)) else "·" for found in range(len(names))))
        for truth, name in enumerate(names)
    ]
    note = "A row for each class, a column for each prediction: mistakes lie off the diagonal."
    return [ReportTable(f"Confusion matrix of {file}", ("", *names), rows, note=note)]
