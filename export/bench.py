"""Time the files of a bundle against each other in ONNX Runtime, and score them if images are given.

`python -m export.bench BUNDLE` runs it, without torch, on the machine that will serve.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Literal

from export.bundle.read import Bundle, read_bundle
from export.bundle.sandbox import vet
from export.command.arguments import at_least, positive
from export.command.files import json_text, write_text
from export.command.main import run
from export.command.table import print_live, table
from export.images.size import Size, size_of
from export.onnx_file.model_file import MAX_IMAGE_SIZE
from export.onnx_file.roles import FP32
from export.onnx_file.targets import CPU
from export.runtime.accuracy import accuracy, accuracy_elsewhere, score_elsewhere, score_files
from export.runtime.cuda_options import describe
from export.runtime.environment import environment
from export.runtime.latency import MIN_BLOCKS
from export.runtime.measure import BenchPlan, bench
from export.runtime.providers import PLAIN, PROVIDERS, Runtime, present, runtime_named
from export.runtime.rows import AccuracyRow, BenchJson, OtherAccuracy, Setting, TimingRow, accuracy_of, metric_json


def measure(bundle: Bundle, arguments: argparse.Namespace) -> BenchJson:
    """Return the accuracy (if there are data) and the timings of a bundle's files."""
    scored: dict[str, AccuracyRow] = {}
    elsewhere: list[OtherAccuracy] = []
    notes: tuple[str, ...] = ()
    providers = present(arguments.providers)
    if arguments.data:
        examples = bundle.examples(arguments.data)
        notes = examples.notes
        scores = score_files(bundle.files, examples.batches(), bundle.task, progress=print_live)
        reference = scores[FP32 if FP32 in scores else min(scores)]
        scored = accuracy(scores, reference=reference)
        others = score_elsewhere(bundle.files, examples.batches, bundle.task, providers=providers, progress=print_live)
        elsewhere = accuracy_elsewhere(dict(others), reference=reference)
    plan = BenchPlan(
        batches=arguments.batches,
        threads=arguments.threads,
        image_sizes=arguments.image_sizes,
        providers=providers,
        seconds=arguments.seconds,
        blocks=arguments.blocks,
    )
    found = bench(bundle.files, plan, target=bundle.target, progress=print_live)
    print_live("")
    warnings = [*notes, *found.warnings]
    return BenchJson(
        metric=metric_json(bundle.task.metric),
        accuracy=scored,
        accuracy_elsewhere=elsewhere,
        timings=found.timings,
        environment=environment(),
        warnings=warnings,
    )


def as_text(found: BenchJson) -> str:
    """Return a table for each setting, with the provider of each row if there are several, then the warnings."""
    elsewhere = found.get("accuracy_elsewhere", [])
    plugins = any(runs_in(row) != PLAIN and runs_in(row).provider.device == "cpu" for row in found["timings"])
    header = (
        "file",
        *(["runs in", "open ms"] if plugins else []),
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "images/s",
        "MB",
        "peak MB",
        "speed-up",
        "95 %",
        found["metric"]["title"],
        "agreement",
    )
    parts = []
    for setting, rows in groupby(found["timings"], key=setting_of):
        lines = [
            [name, *([str(runs_in(row)), row.get("open_ms")] if plugins else []), *numbers]
            for row in rows
            for name, *numbers in [cells(row, accuracy_of(row, found["accuracy"], elsewhere))]
        ]
        parts.append(f"{setting}\n{table(header, lines)}")
    return "\n\n".join([*parts, *(f"note: {warning}" for warning in found["warnings"])])


def setting_of(row: TimingRow) -> Setting:
    """Return the conditions of a row; all providers on the CPU share theirs."""
    provider = CPU if runs_in(row).provider.device == "cpu" else row["provider"]
    return Setting(provider, row["threads"], row["batch"], image_size=size_of(row["image_size"]))


def runs_in(row: TimingRow) -> Runtime:
    """Return a row's provider and arithmetic."""
    return runtime_named(row["provider"], row.get("arithmetic", "f32"))


def cells(row: TimingRow, scored: AccuracyRow | None) -> list[str | float | None]:
    """Return a row as one line of the table."""
    faster = row["speedup"]
    return [
        f"{row['name']} ({describe(row['provider_options'])})" if row["provider_options"] else row["name"],
        row["p50_ms"],
        row["p90_ms"],
        row["p99_ms"],
        row["throughput_ips"],
        row["size_mb"],
        row["peak_memory_mb"],
        faster["ratio"] if faster else None,
        f"{faster['ci95'][0]:.2f}-{faster['ci95'][1]:.2f}" if faster else None,
        scored["score"] if scored else None,
        scored["agreement"] if scored else None,
    ]


def numbers(lowest: int) -> Callable[[str], list[int]]:
    """Return a parser for `1,8` as integers >= `lowest`, for argparse."""
    return lambda text: [at_least(lowest)(part) for part in text.split(",")]


def providers(text: str) -> Literal["auto"] | list[str]:
    """Read `auto`, or providers of the table; argparse makes a sentence of the ValueError."""
    if text == "auto":
        return "auto"
    if not set(found := text.split(",")) <= PROVIDERS.keys():
        raise ValueError(text)
    return found


def sizes(text: str) -> list[Size]:
    """Read `224,96x320` as sizes, height before width; argparse makes a sentence of the ValueError."""
    found = [[int(side) for side in part.split("x")] for part in text.split(",")]
    if not all(len(sides) in (1, 2) and min(sides) > 0 and max(sides) <= MAX_IMAGE_SIZE for sides in found):
        raise ValueError(text)
    return [(sides[0], sides[-1]) for sides in found]


def print_bench(arguments: argparse.Namespace) -> int:
    """Measure, and print the tables."""
    found = measure(read_bundle(arguments.bundle, inspect=vet), arguments)
    sys.stdout.write(f"{as_text(found)}\n")
    if arguments.json:
        write_text(arguments.json, json_text(found))
    return 0


def main() -> int:
    """Time a bundle's files against each other on this machine, and score them if images are given."""
    parser = argparse.ArgumentParser(prog="python -m export.bench", description=main.__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=numbers(0), default=[1, 0], metavar="1,0", help="CPU threads; 0 is all cores")
    parser.add_argument(
        "--providers",
        type=providers,
        default=["cpu", "cuda"],
        metavar="cpu,openvino",
        help=f"of {', '.join(PROVIDERS)}, or auto: all that this machine has",
    )
    parser.add_argument("--batches", type=numbers(1), default=[1, 8], metavar="1,8", help="images per run")
    parser.add_argument(
        "--image-sizes",
        type=sizes,
        default=[],
        metavar="224,96x320",
        help="pixels, in addition to the bundle's own size",
    )
    parser.add_argument("--seconds", type=positive, default=2.0, help="time for each file at each setting")
    parser.add_argument(
        "--blocks", type=at_least(MIN_BLOCKS), default=10, help="interleaved blocks that the time is divided into"
    )
    parser.add_argument("--data", type=Path, help="a folder of class folders, or an .npz file with images and labels")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return run(parser, print_bench)


if __name__ == "__main__":
    sys.exit(main())
