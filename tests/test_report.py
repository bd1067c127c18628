import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.recipe import Recipe
from compress.report import charts, numbers
from compress.report.collect import collect
from compress.report.html import render
from compress.report.shape import Report
from compress.report.terminal import print_report
from compress.report.verdict import judge

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
STAGES = ("source", "prune", "distill", "qat", "export", "bench")
METRICS: dict[str, dict[str, float | None]] = {
    "source": {"top1": 0.98333, "params_m": 23.53, "macs_m": 332.4, "size_mb": 94.1},
    "prune": {"top1": 0.61111, "params_m": 10.91, "macs_m": 156.2, "size_mb": 43.7},
    "distill": {"top1": 0.98056, "params_m": 10.91, "macs_m": 156.2, "size_mb": 43.7},
    "qat": {"top1": 0.97778, "params_m": 10.88, "macs_m": 156.2, "size_mb": 11.1},
    "export": {"top1": None},
    "bench": {"top1": 0.97778, "size_mb": 11.3},
}
FILES = {  # name: precision, top-1, agreement, MB, ms on the CPU with one thread at 224 px, on CUDA
    "teacher_fp32": ("fp32", 0.98333, 0.98611, 94.1, 91.2, 1.52),
    "student_fp32": ("fp32", 0.98056, 1.0, 43.7, 42.8, 1.21),
    "student_fp16": ("fp16", 0.98056, 1.0, 21.9, 48.9, 0.861),
    "student_ptq_int8": ("int8", 0.97222, 0.98333, 11.2, 22.4, 2.58),
    "student_int8": ("int8", 0.97778, 0.9944, 11.3, 22.1, 2.55),
}
FITS: dict[str, dict[str, Any]] = {
    "source": {"epochs": 12, "lr": 0.05},
    "distill": {"epochs": 8, "lr": 0.02},
    "qat": {"epochs": 2, "lr": 0.0005},
}


def build_recipe(stages: tuple[str, ...] = STAGES, **targets: float) -> Recipe:
    """Return a recipe with these stages and targets."""
    sections: list[dict[str, Any]] = [{"stage": stage} for stage in stages]
    for section in sections:
        if section["stage"] in FITS:
            section["fit"] = FITS[section["stage"]]
        if section["stage"] == "prune":
            section["keep_macs"] = 0.47
    model = {"arch": "torchvision:resnet50"}
    return Recipe.model_validate({"name": "resnet50_int8", "model": model, "stages": sections, "targets": targets})


def build_run(root: Path, stages: tuple[str, ...] = STAGES, **bench: Any) -> list[Path]:
    """Write a run's finished stage directories as a ResNet-50 on digits leaves them; `bench` goes to `build_bench`."""
    artifacts: list[Path] = []
    for index, stage in enumerate(stages):
        directory = root / f"{index:02}-{stage}-{index:012x}"
        directory.mkdir(parents=True)
        if stage in FITS:
            write_log(directory / "log.jsonl", top1=METRICS[stage]["top1"] or 0.0, **FITS[stage])
        if stage == "prune":
            (directory / "plan.json").write_text(json.dumps({"layers": list(resnet50_layers()), "cuts": []}))
        if stage == "bench":
            (directory / "bench.json").write_text(json.dumps(build_bench(**bench)))
        meta = {
            "stage": stage,
            "key": f"{index:012x}",
            "parent": artifacts[-1].name if artifacts else None,
            "kind": "float",
            "section": {},
            "version": 1,
            "seconds": 7.3 * 2.4**index,
            "metrics": METRICS[stage],
            "files": {},
            "schema_version": 1,
        }
        (directory / "meta.json").write_text(json.dumps(meta))
        artifacts.append(directory)
    return artifacts


def write_log(path: Path, *, epochs: int, lr: float, top1: float) -> None:
    """Write a training that converges to `top1`."""
    with path.open("w") as file:
        file.write('{"note": "training images 1437"}\n')
        for epoch in range(1, epochs + 1):
            left = 1 - epoch / epochs
            entry = {
                "epoch": epoch,
                "epochs": epochs,
                "loss": 0.08 + 2.1 * left**3,
                "lr": lr * left,
                "images_per_s": 224.0,
            }
            file.write(json.dumps(entry | {"top1": top1 - 0.3 * left**2}) + "\n")


def resnet50_layers() -> Iterator[dict[str, Any]]:
    """Yield the pruning plan of a ResNet-50's convolutions and its head."""
    yield layer("conv1", 3, 64, 3, 48)
    width = 64
    for stage, (blocks, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name, kept = f"layer{stage}.{block}", inner * (6 - block % 3) // 8
            yield layer(f"{name}.conv1", width, inner, width, kept)
            yield layer(f"{name}.conv2", inner, inner, kept, kept)
            yield layer(f"{name}.conv3", inner, 4 * inner, kept, 3 * inner)
            if block == 0:
                yield layer(f"{name}.downsample.0", width, 4 * inner, width, 3 * inner)
            width = 4 * inner
    yield layer("fc", 2048, 10, 1536, 10) | {"kind": "Linear"}


def layer(name: str, in_before: int, out_before: int, in_after: int, out_after: int) -> dict[str, Any]:
    """Return one line of a pruning plan."""
    widths = {"in_before": in_before, "in_after": in_after, "out_before": out_before, "out_after": out_after}
    return {"name": name, "kind": "Conv2d", **widths}


def build_bench(
    *,
    files: tuple[str, ...] = tuple(FILES),
    providers: tuple[str, ...] = (CPU,),
    batches: tuple[int, ...] = (1, 8),
    nulls: bool = False,
    warnings: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return a bench stage's bench.json; with `nulls` what may be unknown is."""
    draw = random.Random(0)
    timings: list[dict[str, Any]] = []
    for provider in providers:
        for size in (32, 224):
            for batch in batches:
                for threads in (1, 0) if provider == CPU else (0,):
                    timings.extend(timing(draw, name, provider, size, batch, threads, nulls=nulls) for name in files)
    accuracy = {name: {"top1": FILES[name][1], "agreement": FILES[name][2], "images": 360} for name in files}
    environment = {
        "cpu": "AMD EPYC 7B13",
        "cores": 2,
        "instruction_sets": ["avx2", "fma", "f16c"],
        "target": "cpu_avx2",
        "memory_gb": 8.2,
        "gpu": "NVIDIA H100 80GB HBM3" if CUDA in providers else None,
        "os": "Linux 6.1.0",
        "python": "3.12.4",
        "versions": {"onnxruntime": "1.32.0", "torch": "2.14.1", "torch-pruning": "1.6.1"},
    }
    return {
        "accuracy": {} if nulls else accuracy,
        "timings": timings,
        "environment": environment,
        "warnings": list(warnings),
    }


def timing(
    draw: random.Random, name: str, provider: str, size: int, batch: int, threads: int, *, nulls: bool
) -> dict[str, Any]:
    """Return one row of bench.json."""
    precision, _, _, size_mb, cpu_ms, cuda_ms = FILES[name]
    scale = batch**0.95 * (size / 224) ** 1.6 * (0.56 if threads == 0 and provider == CPU else 1)
    p50 = (cpu_ms if provider == CPU else cuda_ms) * scale
    blocks = [p50 * (1 + draw.gauss(0, 0.012)) for _ in range(10)]
    return {
        "name": name,
        "file": f"{name}.onnx",
        "precision": precision,
        "provider": provider,
        "threads": threads,
        "batch": batch,
        "image_size": size,
        "p50_ms": p50,
        "p90_ms": None if nulls else p50 * 1.04,
        "p99_ms": None if nulls else p50 * draw.uniform(1.1, 1.5),
        "throughput_ips": 1000 * batch / p50,
        "runs": 41,
        "block_ms": [] if nulls else blocks,
        "size_mb": size_mb,
        "peak_memory_mb": None if nulls else 3.1 * size_mb + 60,
        "provider_options": {"cudnn_conv_use_max_workspace": "1", "prefer_nhwc": "1"} if provider == CUDA else {},
        "speedup": None if nulls else speedup("teacher_fp32", name, provider),
        "speedup_vs_student_fp32": None if nulls else speedup("student_fp32", name, provider),
    }


def speedup(reference: str, name: str, provider: str) -> dict[str, Any]:
    """Return how many times faster `name` is, with an interval of 3 % around it."""
    column = 4 if provider == CPU else 5
    ratio = float(FILES[reference][column]) / float(FILES[name][column])
    return {"vs": reference, "ratio": ratio, "ci95": [ratio * 0.97, ratio * 1.03]}


def build_report(
    root: Path, stages: tuple[str, ...] = STAGES, targets: Mapping[str, float] | None = None, **bench: Any
) -> Report:
    """Build a run and collect its report."""
    artifacts = build_run(root, stages, **bench)
    cached = {path.name: path.name.startswith(("00", "01")) for path in artifacts}
    recipe = build_recipe(stages, **(targets or {}))
    return collect(recipe, artifacts, cached=cached, command="make compress RECIPE=recipes/resnet50_int8.yaml")


ALL_TARGETS = {
    "max_top1_drop": 0.015,
    "min_speedup": 2.5,
    "min_int8_speedup": 1.6,
    "max_size_ratio": 0.25,
    "max_macs_ratio": 0.5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "cuda": {"providers": (CPU, CUDA)},
    "only cuda": {"providers": (CUDA,)},
    "one batch": {"batches": (1,)},
    "no batch of one": {"batches": (8,)},
    "unknown values": {"nulls": True},
    "only the teacher": {"files": ("teacher_fp32",)},
    "no distill": {"stages": ("source", "prune", "qat", "export", "bench")},
    "no qat": {"stages": ("source", "prune", "distill", "export", "bench"), "files": tuple(FILES)[:4]},
    "no bench": {"stages": ("source", "prune", "distill", "qat", "export")},
    "only the source": {"stages": ("source",)},
}


class Tags(HTMLParser):
    """Check that tags close in order and gather their names and attributes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def with_row(report: Report, name: str, **values: Any) -> Report:
    """Change every deployed row of one file."""
    for row in report["deployed"]:
        if row["name"] == name:
            row.update(values)  # type: ignore[typeddict-item]
    return report


def shown(report: Report, width: int = 80, *, verbose: bool = False) -> str:
    screen = StringIO()
    print_report(report, Console(file=screen, width=width), verbose=verbose, page=Path("runs/a/report/index.html"))
    return screen.getvalue()


def test_a_report_has_one_row_for_each_file_provider_threads_batch_and_size(tmp_path: Path) -> None:
    rows = build_report(tmp_path, providers=(CPU, CUDA))["deployed"]
    settings = {(r["name"], r["provider"], r["threads"], r["batch"], r["image_size"]) for r in rows}
    assert len(rows) == len(settings) == 5 * (2 * 2 * 2 + 2 * 2)


def test_a_row_carries_its_own_file_s_accuracy(tmp_path: Path) -> None:
    rows = build_report(tmp_path)["deployed"]
    assert {(row["name"], row["top1"]) for row in rows} == {(name, facts[1]) for name, facts in FILES.items()}


def test_a_report_says_which_stages_were_kept(tmp_path: Path) -> None:
    stages = build_report(tmp_path)["stages"]
    assert [stage["stage"] for stage in stages if stage["cached"]] == ["source", "prune"]


def test_a_report_is_json_without_the_block_medians(tmp_path: Path) -> None:
    assert "block_ms" not in json.dumps(build_report(tmp_path), allow_nan=False)


def test_a_run_without_a_bench_still_says_where_it_ran(tmp_path: Path) -> None:
    report = build_report(tmp_path, ("source", "prune"))
    assert report["deployed"] == []
    assert report["environment"]["python"] == sys.version.split()[0]


def test_the_report_imports_no_torch() -> None:
    program = (
        "import sys, compress.report.collect, compress.report.html, compress.report.terminal; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_run_that_reaches_every_target_passes(tmp_path: Path) -> None:
    report = build_report(tmp_path, targets=ALL_TARGETS)
    assert (report["verdict"], report["failures"]) == ("pass", [])


def test_a_run_without_targets_passes(tmp_path: Path) -> None:
    assert build_report(tmp_path)["verdict"] == "pass"


@pytest.mark.parametrize(
    ("target", "exact"),
    [
        ("max_top1_drop", 2 / 360),
        ("min_speedup", 91.2 / 22.1),
        ("min_int8_speedup", 42.8 / 22.1),
        ("max_size_ratio", 11.3 / 94.1),
        ("max_macs_ratio", 156.2 / 332.4),
    ],
)
def test_a_target_is_met_exactly_at_its_value_and_missed_just_beyond(tmp_path: Path, target: str, exact: float) -> None:
    report = with_row(with_row(build_report(tmp_path), "teacher_fp32", top1=354 / 360), "student_int8", top1=352 / 360)
    beyond = exact * (1 + 1e-6 if target.startswith("min_") else 1 - 1e-6)
    verdicts = [judge(report | {"targets": {target: wanted}})[0] for wanted in (exact, beyond)]
    assert verdicts == ["pass", "fail"]


def test_a_failure_names_target_wanted_measured_and_conditions(tmp_path: Path) -> None:
    failures = build_report(tmp_path, targets={"min_speedup": 5})["failures"]
    assert failures == [
        "min_speedup: wanted at least 5.00×, measured 4.13× "
        "(95 % interval 4.00 to 4.25, student_int8 against teacher_fp32, CPU, 1 thread, batch 1, 224 px)"
    ]


def test_a_speed_target_is_judged_at_the_largest_image(tmp_path: Path) -> None:
    report = build_report(tmp_path, targets={"min_speedup": 2.5})
    for row in report["deployed"]:
        if row["image_size"] == 32 and row["speedup"]:
            row["speedup"]["ratio"] = 1.0
    assert judge(report)[0] == "pass"


@pytest.mark.parametrize("target", ["max_top1_drop", "min_speedup", "min_int8_speedup", "max_size_ratio"])
def test_without_a_bench_stage_a_target_is_not_measured_and_so_missed(tmp_path: Path, target: str) -> None:
    report = build_report(tmp_path, ("source", "prune"), {target: 1.0})
    assert report["verdict"] == "fail"
    assert "not measured" in report["failures"][0]


def test_gpu_timings_alone_do_not_reach_a_speed_target(tmp_path: Path) -> None:
    assert build_report(tmp_path, targets={"min_speedup": 0.1}, providers=(CUDA,))["verdict"] == "fail"


@pytest.mark.parametrize(
    ("count", "judged"), [(5, "student_int8"), (4, "student_ptq_int8"), (3, "student_fp32"), (2, "student_fp32")]
)
def test_the_best_trained_int8_file_is_judged(tmp_path: Path, count: int, judged: str) -> None:
    report = build_report(tmp_path, targets={"max_size_ratio": 0.001}, files=tuple(FILES)[:count])
    assert judged in report["failures"][0]


def test_an_fp32_student_has_no_int8_speedup(tmp_path: Path) -> None:
    report = build_report(tmp_path, targets={"min_int8_speedup": 0.5}, files=("teacher_fp32", "student_fp32"))
    assert "not measured" in report["failures"][0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_page_is_well_formed_self_contained_and_small(tmp_path: Path, variant: str) -> None:
    page = render(build_report(tmp_path, targets=ALL_TARGETS, **VARIANTS[variant]), tmp_path)
    tags = parse(page)
    assert (tags.open, tags.links) == ([], [])
    assert not tags.seen & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in page
    assert "@import" not in page
    assert len(page.encode()) < 1_000_000


def test_the_page_escapes_what_strangers_wrote(tmp_path: Path) -> None:
    evil = "</style><script>alert('x')</script>"
    report = build_report(tmp_path, warnings=(evil,))
    report["command"] = report["recipe"]["data"]["path"] = report["environment"]["cpu"] = evil
    assert "<script" not in render(report, tmp_path)


def test_the_page_draws_what_each_stage_changed(tmp_path: Path) -> None:
    page = render(build_report(tmp_path, targets=ALL_TARGETS), tmp_path)
    for text in (
        "−37.22\u00a0points",
        "−53\u00a0%",
        "layer3.0.downsample.0",
        "1024 → 768",
        "epoch 12",
        "all targets met",
    ):
        assert text in page


def test_the_page_says_which_target_was_missed(tmp_path: Path) -> None:
    page = render(build_report(tmp_path, targets={"min_speedup": 5, "max_top1_drop": 0.01}), tmp_path)
    assert "1 of 2 targets missed" in page
    assert "wanted at least 5.00×" in page


def test_a_training_with_a_lost_loss_is_drawn_with_a_gap() -> None:
    axis = charts.Axis(0, 10, 0, 10, ())
    assert charts.polylines([1, 2, 3, 4], [1, None, 3, 4], axis, axis) == ["1.0,1.0", "3.0,3.0 4.0,4.0"]


def test_labels_of_close_points_meet_neither_each_other_nor_a_point() -> None:
    points = [(f"file{i}", "Student INT8 (PTQ)", 150 + 5.0 * i, 100 + 4.0 * i) for i in range(5)]
    placed = charts.place_labels(points, charts.Box(0, 0, 440, 240))
    boxes = []
    for point in placed:
        width = charts.CHARACTER_WIDTH * len(point.label)
        left = point.label_x - {"start": 0, "middle": width / 2, "end": width}[point.anchor]
        boxes.append(charts.Box(left, point.label_y - 11, left + width, point.label_y + 3))
    assert not any(a.overlaps(b) for a, b in pairwise(sorted(boxes, key=lambda box: box.top)))


@pytest.mark.parametrize("values", [(0.5,), (97.2, 98.3), (0.0, 0.0), (1e-6, 2e-6), (-3, 5000)])
def test_a_linear_axis_covers_its_values_with_few_round_ticks(values: tuple[float, ...]) -> None:
    axis = charts.linear_axis(values, 0, 100)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 6


@pytest.mark.parametrize("values", [(1.0,), (17.9, 91.2), (0.05, 4000.0), (1.2, 1.3)])
def test_a_logarithmic_axis_covers_its_values_with_few_ticks(values: tuple[float, ...]) -> None:
    axis = charts.log_axis(values, 0, 100)
    assert axis.low < min(values) <= max(values) < axis.high
    assert 1 <= len(axis.ticks) <= 7


def test_a_waterfall_s_steps_join() -> None:
    first, second = charts.waterfall([200, 50], from_zero=True)
    assert (first.at, second.at, second.change_left, second.change_width, second.change) == (100, 25, 25, 75, -150)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.00025, "0.00025"),
        (0.4118, "0.412"),
        (17.94, "17.9"),
        (91.2, "91.2"),
        (1204.3, "1,204"),
    ],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert numbers.significant(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.84, "0.8 s"), (42.2, "42 s"), (59.7, "1 min 00 s"), (11100, "3 h 05 min")]
)
def test_durations_read_as_spoken(seconds: float | None, text: str) -> None:
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_terminal_s_tables_fit_80_columns(tmp_path: Path, variant: str) -> None:
    text = shown(build_report(tmp_path, **VARIANTS[variant]), verbose=True)
    tables = text.partition("\nINT8 by calibration")[0]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 80
    assert "…" not in text


def test_the_terminal_shows_batch_1_and_one_thread_unless_verbose(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    assert "batch 8" not in shown(report)
    assert "all threads" not in shown(report)
    assert "CPU · all threads · batch 8 · 224 px" in shown(report, verbose=True)


def test_the_terminal_ends_with_verdict_failures_and_the_page(tmp_path: Path) -> None:
    report = build_report(tmp_path, targets={"min_speedup": 5, "max_top1_drop": 0.01})
    *_, verdict, missed, met, _, page = shown(report).splitlines()
    assert (verdict, page) == ("FAIL 1 of 2 targets missed", "runs/a/report/index.html")
    assert missed == f"✗ {report['failures'][0]}"
    assert met == "✓ max_top1_drop: wanted at most 1.00 points, measured 0.56 points"


def test_a_file_shows_no_escape_codes_and_brackets_as_they_are(tmp_path: Path) -> None:
    text = shown(build_report(tmp_path, warnings=("class [red]x[/red]",)))
    assert "class [red]x[/red]" in text
    assert "\x1b" not in text
