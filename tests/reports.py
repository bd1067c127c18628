"""Runs and reports as a ResNet-50 on digits leaves them, built from planted numbers."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from compress.artifact import Meta, Metrics, finish, read_meta
from compress.recipe.schema import Recipe
from compress.report.collect import collect
from compress.report.comparison.compare import RunComparison, compare
from compress.report.comparison.read import FinishedRun
from compress.report.comparison.show import print_comparison
from compress.report.page.terminal import print_report
from compress.report.shape import Report
from export.runtime.accuracy import Score
from export.runtime.accuracy import accuracy as accuracy_of
from export.tasks.classification import by_class

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
STAGES = ("source", "prune", "distill", "ptq", "qat", "export", "bench")
METRICS: dict[str, Metrics] = {
    "source": {"score": 0.98333, "params_m": 23.53, "macs_m": 332.4, "size_mb": 94.1},
    "prune": {"score": 0.61111, "score_as_cut": 0.11111, "params_m": 10.91, "macs_m": 156.2, "size_mb": 43.7},
    "distill": {"score": 0.98056, "params_m": 10.91, "macs_m": 156.2, "size_mb": 43.7},
    "ptq": {"score": 0.98056, "ptq_score": 0.97222, "ptq_drop": 0.00834},
    "qat": {
        "score": 0.97778,
        "score_calibrated": 0.96944,
        "trained": 1.0,
        "float_groups": 0.0,
        "params_m": 10.88,
        "macs_m": 156.2,
        "size_mb": None,
    },
    "export": {"score": None},
    "bench": {"score": 0.97778, "size_mb": 11.3},
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


def build_recipe(
    stages: tuple[str, ...] = STAGES,
    *,
    target: str = "auto",
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    targets: Mapping[str, float] | None = None,
) -> Recipe:
    """Return a recipe with these stages and targets; `sections` adds settings to a stage's."""
    filled: list[dict[str, Any]] = [{"stage": stage, **(sections or {}).get(stage, {})} for stage in stages]
    for section in filled:
        if section["stage"] in FITS:
            section["fit"] = FITS[section["stage"]]
        if section["stage"] == "prune":
            section["keep_macs"] = 0.47
    model = {"arch": "torchvision:resnet50"}
    return Recipe.model_validate(
        {
            "name": "resnet50_int8",
            "target": target,
            "model": model,
            "stages": filled,
            "targets": targets or {},
        }
    )


def build_run(
    root: Path, stages: tuple[str, ...] = STAGES, *, int8: Mapping[str, Any] | None = None, **bench: Any
) -> list[Path]:
    """Write a run's finished stage directories.

    `int8` holds ptq.json, audit.json, verify.json and limits.json by their names without the ending; `bench` goes to `build_bench`.
    """
    int8 = int8 or {}
    artifacts: list[Path] = []
    for index, stage in enumerate(stages):
        final = root / f"{index:02}-{stage}-{index:012x}"
        directory = root / f".{final.name}.partial"
        directory.mkdir(parents=True)
        if stage in FITS:
            write_log(directory / "log.jsonl", score=METRICS[stage]["score"] or 0.0, **FITS[stage])
        if stage == "prune":
            (directory / "plan.json").write_text(json.dumps({"layers": list(resnet50_layers()), "cuts": []}))
        if stage == "bench":
            (directory / "bench.json").write_text(json.dumps(build_bench(**bench)))
        for name in {"ptq": ("ptq",), "export": ("audit", "verify", "limits")}.get(stage, ()):
            if name in int8:
                (directory / f"{name}.json").write_text(json.dumps(int8[name]))
        parent = artifacts[-1] if artifacts else None
        meta = Meta(
            stage=stage,
            key=f"{index:012x}",
            parent=parent.name if parent else None,
            parent_digest=read_meta(parent).digest if parent else None,
            kind="float",
            section={},
            version=1,
            seconds=7.3 * 2.4**index,
            metrics=METRICS[stage] | ({"score": None} if bench.get("answers") else {}),  # the stages saw none of these
            files={},
        )
        finish(directory, final, meta)
        artifacts.append(final)
    return artifacts


def write_log(path: Path, *, epochs: int, lr: float, score: float) -> None:
    """Write a training that converges to `score`."""
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
            file.write(json.dumps(entry | {"score": score - 0.3 * left**2}) + "\n")


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
    answers: Mapping[str, Score] | None = None,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a bench stage's bench.json; with `nulls` what may be unknown is. `answers` of all files say what they do with each class."""
    draw = random.Random(0)
    timings: list[dict[str, Any]] = []
    for provider in providers:
        for size in (32, 224):
            for batch in batches:
                for threads in (1, 0) if provider == CPU else (0,):
                    timings.extend(timing(draw, name, provider, size, batch, threads, nulls=nulls) for name in files)
    accuracy = {
        name: {"score": facts_of(name)[1], "further": {}, "agreement": facts_of(name)[2], "images": 360}
        for name in files
    }
    environment = {
        "machine": "x86_64",
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
    if answers:
        accuracy = {name: dict(row) for name, row in accuracy_of(answers, reference=answers["student_fp32"]).items()}
    return {
        "metric": {"name": "top1", "title": "top-1"},
        "accuracy": accuracy,
        "classes": by_class(
            {name: found.rows for name, found in answers.items()}, classes, ("teacher_fp32", "student_int8")
        )
        if answers
        else None,
        "timings": timings,
        "environment": environment,
        "warnings": list(warnings),
    }


def timing(
    draw: random.Random, name: str, provider: str, size: int, batch: int, threads: int, *, nulls: bool
) -> dict[str, Any]:
    """Return one row of bench.json."""
    precision, _, _, size_mb, cpu_ms, cuda_ms = facts_of(name)
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
        "p90_ms": p50 * 1.04,
        "p99_ms": p50 * draw.uniform(1.1, 1.5),
        "throughput_ips": 1000 * batch / p50,
        "runs": 41,
        "block_ms": blocks,
        "size_mb": size_mb,
        "peak_memory_mb": None if nulls else 3.1 * size_mb + 60,
        "provider_options": {"cudnn_conv_use_max_workspace": "1", "prefer_nhwc": "1"} if provider == CUDA else {},
        "speedup": None if nulls else speedup("teacher_fp32", name, provider),
        "speedup_vs_student_fp32": None if nulls else speedup("student_fp32", name, provider),
    }


def facts_of(name: str) -> tuple[Any, ...]:
    """Return a file's row of FILES; files for further targets are as the target's own."""
    return FILES[next(known for known in FILES if name == known or name.startswith(f"{known}_"))]


def speedup(reference: str, name: str, provider: str) -> dict[str, Any]:
    """Return how many times faster `name` is, with an interval of 3 % around it."""
    column = 4 if provider == CPU else 5
    ratio = float(facts_of(reference)[column]) / float(facts_of(name)[column])
    return {"vs": reference, "ratio": ratio, "ci95": [ratio * 0.97, ratio * 1.03]}


def build_ptq(images: int = 360) -> dict[str, Any]:
    """Return a ptq stage's ptq.json: minmax and entropy in ONNX Runtime, percentile here, neural-compressor in PyTorch."""
    methods = [
        method("onnxruntime", "minmax", 0.96111, 0.97222, 53, 0),
        method("onnxruntime", "entropy", 0.96944, 0.98056, 53, 0),
        method("neural-compressor", "static", 0.95, 0.96111, None, None, "31 of 53 convolutions fuse in ONNX Runtime"),
        method("compress", "percentile", 0.97222, 0.98333, 53, 0),
    ]
    groups = [
        {"group": f"layer{1 + index // 3}.{index % 3}.conv2", "kl": 0.09 / 1.6**index, "drop": 0.011 / 2**index}
        for index in range(12)
    ]
    trials = [
        trial("minmax", [], 0.96111, 1.93, met=False),
        trial("percentile", [], 0.97222, 1.92, met=True),
    ]
    found = {"methods": methods, "sensitivity": groups[::-1], "trials": trials, "chosen": 1}
    found |= {"calibration": "percentile", "score": 0.97222}
    return {"images": images, "float_score": 0.98056, "tuning_images": 1437, "targets": {"cpu_avx2": found}}


def method(
    engine: str,
    name: str,
    score: float,
    agreement: float,
    integer: int | None,
    floats: int | None,
    note: str | None = None,
) -> dict[str, Any]:
    """Return one method of ptq.json."""
    return {
        "engine": engine,
        "method": name,
        "scored_in": "pytorch" if engine == "neural-compressor" else "onnxruntime",
        "score": score,
        "agreement": agreement,
        "integer_layers": integer,
        "float_layers": floats,
        "note": note,
    }


def trial(
    calibration: str, keep_float: list[str], score: float, latency_ratio: float | None, *, met: bool
) -> dict[str, Any]:
    """Return one trial of ptq.json."""
    return {
        "number_format": "int8",
        "engine": "compress",
        "calibration": calibration,
        "keep_float": keep_float,
        "score": score,
        "drop": 0.98056 - score,
        "agreement": score + 0.01,
        "kl": 0.001,
        "latency_ratio": latency_ratio,
        "met": met,
    }


def build_audit(**changes: Any) -> dict[str, Any]:
    """Return one file's entry of audit.json."""
    return {
        "provider": "cpu",
        "operators": {"QLinearConv": 53, "QLinearAdd": 16, "QLinearGlobalAveragePool": 1, "Gemm": 1},
        "providers": {CPU: {"QLinearConv": 53, "QLinearAdd": 16, "QLinearGlobalAveragePool": 1, "Gemm": 1}},
        "quantized_by_runtime": [],
        "integer_layers": [layer["name"] for layer in resnet50_layers()][:-1],
        "float_layers": ["fc"],
        "float_fraction": 0.0002,
        "leftover_qdq": [],
        "float_biases": ["fc"],
        "float_initializer_mb": 0.0615,
        "copies": [],
        "float_operators": {"softmax": "Softmax"},
        "reasons": {"fc": "its weights are float in the file: it was not quantized"},
        **changes,
    }


LOCAL = {"max_lsb": 1, "mean_lsb": 0.001, "differing": 0.001, "snr_db": 70.0}


def build_verify(**changes: Any) -> dict[str, Any]:
    """Return one file's entry of verify.json."""
    tensors = [
        {"name": f"layer{stage}.0.conv{index}", "max_lsb": 1, "mean_lsb": 0.004 * index, "differing": 0.004 * index,
         "snr_db": 62.0 - 3 * stage - index, "layers": [], "local": LOCAL}
        for stage in (1, 2, 3, 4)
        for index in (1, 2, 3)
    ]  # fmt: skip
    tensors.insert(
        0,
        {
            "name": "conv1",
            "max_lsb": 0,
            "mean_lsb": 0.0,
            "differing": 0.0,
            "snr_db": None,
            "layers": [],
            "local": LOCAL,
        },
    )
    return {
        "images": 360,
        "tensor_images": 64,
        "agreement": 359 / 360,
        "agreement_ci95": [0.98462, 0.99993],
        "score_reference": 0.97778,
        "score": 0.97778,
        "tensors": tensors,
        "first_divergence": "layer1.0.conv1",
        "saturation": [],
        "saturation_possible": [],
        **changes,
    }


def build_int8() -> dict[str, Any]:
    """Return what a run's ptq and export stages write."""
    files = ("student_ptq_int8", "student_int8")
    return {
        "ptq": build_ptq(),
        "audit": {"teacher_fp32": build_audit(), **{name: build_audit() for name in files}},
        "verify": {"student_int8": build_verify()},
    }


def build_report(
    root: Path,
    stages: tuple[str, ...] = STAGES,
    targets: Mapping[str, float] | None = None,
    *,
    target: str = "auto",
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    **run: Any,
) -> Report:
    """Build a run until the last of the stages and collect its report; `run` goes to `build_run`."""
    artifacts = build_run(root, stages, **run)
    behind = STAGES[STAGES.index(stages[-1]) + 1 :]
    recipe = build_recipe((*stages, *behind), target=target, sections=sections, targets=targets)
    return collect(
        recipe,
        artifacts,
        root=root,
        made=set(artifacts[2:]),
        command="make compress RECIPE=recipes/resnet50_int8.yaml",
    )


def build_student(
    root: Path,
    name: str,
    *,
    scale: float = 1.0,
    score: float = 0.97778,
    targets: Mapping[str, float] | None = None,
    **settings: Any,
) -> Report:
    """Return the report of a student of its own name whose deployed file is `scale` times as large and slow as the usual one.

    `settings` are a stage's, such as prune={"keep_macs": 0.3}, or else the recipe's own.
    """
    report = build_report(root / name, int8=build_int8(), batches=(1,), targets=targets)
    report["recipe"]["name"] = name
    for key, value in settings.items():
        section = next((stage for stage in report["recipe"]["stages"] if stage["stage"] == key), None)
        if section is None:
            report["recipe"][key] = value
        else:
            section.update(value)
    for row in report["deployed"]:
        if row["name"] == "student_int8":
            row["score"], row["size_mb"], row["p50_ms"] = score, 11.3 * scale, (row["p50_ms"] or 0) * scale
            for speed in (row["speedup"], row["speedup_vs_student_fp32"]):
                if speed:
                    speed["ratio"], speed["ci95"] = speed["ratio"] / scale, [end / scale for end in speed["ci95"]]
    for stage in report["stages"]:
        if stage["metrics"].get("macs_m") and stage["stage"] != "source":
            stage["metrics"]["macs_m"] = 156.2 * scale
    return report


def slowed(report: Report, factor: float) -> Report:
    """Return the report as a machine that is so many times slower would have left it: the ratios stay."""
    for row in report["deployed"]:
        row["p50_ms"] = (row["p50_ms"] or 0) * factor
    return report


def save_report(report: Report, root: Path) -> Path:
    """Write a run's folder with nothing but its report, and return it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "report.json").write_text(json.dumps(report))
    return root


def compared(*reports: Report) -> RunComparison:
    """Compare reports by their recipes' names."""
    return compare({report["recipe"]["name"]: FinishedRun(report) for report in reports})


def printed(comparison: RunComparison, width: int = 80, *, verbose: bool = True) -> str:
    screen = StringIO()
    print_comparison(comparison, Console(file=screen, width=width), verbose=verbose)
    return screen.getvalue()


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
