"""Time the files of a bundle against each other in ONNX Runtime, and score them if images are given.

`python -m export.bench BUNDLE` runs it, without torch, on the machine that will serve.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np

from export.bundle.read import Bundle, read_bundle
from export.bundle.sandbox import vet
from export.command.arguments import at_least, positive
from export.command.files import json_text, write_text
from export.command.main import run
from export.command.table import print_live, table
from export.errors import BundleError
from export.images.size import Shape, Size, area, size_of
from export.onnx_file.model_file import MAX_IMAGE_SIZE, ModelFile, inspect
from export.onnx_file.roles import FP32
from export.onnx_file.targets import CPU, TARGET_PROVIDERS, host_target
from export.runtime.accuracy import accuracy, score_files
from export.runtime.cuda_options import describe, fastest
from export.runtime.environment import environment
from export.runtime.latency import MIN_BLOCKS, Timing, speedup, time_sessions
from export.runtime.memory import peak_memory_mb
from export.runtime.rows import AccuracyRow, BenchJson, Setting, TimingRow, is_headline, metric_json, timing_row
from export.runtime.session import PROVIDERS, Run, available_providers, bind, open_session, resize_input

SLOW = 3.0  # a float16 file slower than float32 by this factor runs on emulated kernels; one timing of it is enough

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to time, and for how long: `seconds` for each file at each setting, in `blocks` that are interleaved.

    `image_sizes` are timed in addition to the files' own.
    """

    batches: Sequence[int] = (1, 8)
    threads: Sequence[int] = (1, 0)
    image_sizes: Sequence[Size] = ()
    providers: Sequence[str] = ("cpu", "cuda")
    seconds: float = 2.0
    blocks: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Bench:
    """The rows in the order they were measured, and warnings about them."""

    timings: list[TimingRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def bench(
    files: Mapping[str, Path], plan: Plan, *, target: str | None = None, progress: Progress = lambda _: None
) -> Bench:
    """Time `files` (name to ONNX file) at every setting of the plan, interleaved within a setting.

    Left out with a warning: a provider that this machine lacks, an image size that a network cannot take, and emulated
    float16 except at the headline setting. A machine other than `target` gives a warning too.
    Raises BundleError for a file that cannot be read or run at its own size.
    """
    facts = {name: inspect(path) for name, path in files.items()}
    result = Bench(warnings=[*target_warnings(target), *provider_warnings(plan.providers, facts)])
    memory_mb = cache(peak_memory_mb)
    emulated: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        channels, *own = own_shape(facts)
        sized, baked_in = at_sizes(files, plan.image_sizes, own=(own[0], own[1]), folder=Path(folder))
        result.warnings.extend(baked_in)
        every = list(settings(plan, list(sized)))
        for index, setting in enumerate(every, 1):
            progress(f"{setting} ({index}/{len(every)})")
            shape = (channels, *setting.image_size)
            left_out = (
                set() if setting.provider != CPU or is_headline(CPU, setting.threads, setting.batch) else emulated
            )
            live = {name: path for name, path in sized[setting.image_size].items() if name not in left_out}
            runs, options, skipped = prepare(live, setting, shape, plan, progress=progress)
            result.warnings.extend(skipped)
            timed = time_sessions(runs, seconds=plan.seconds, blocks=plan.blocks, seed=plan.seed)
            for name, path in live.items():
                memory = memory_mb(path, batch=setting.batch, shape=shape) if setting.provider == CPU else None
                row = timing_row(
                    name,
                    files[name],
                    facts[name],
                    setting,
                    timed,
                    provider_options=options[name],
                    peak_memory_mb=memory,
                )
                result.timings.append(row)
            if setting.provider == CPU:
                emulated |= {name for name in live if facts[name].precision == "fp16" and is_slow(timed, name)}
    result.warnings.extend(
        f"{name}: this CPU has no fast float16 kernels (over {SLOW:g} times slower than float32): timed with one thread and batch 1 only"
        for name in sorted(emulated)
    )
    return result


def settings(plan: Plan, sizes: Sequence[Size]) -> Iterator[Setting]:
    """Yield the settings to time whose provider is available, the headline's first; threads vary only on the CPU."""
    for provider in (PROVIDERS[name] for name in plan.providers):
        if provider not in available_providers():
            continue
        # 0 is all cores, the largest count.
        counts = sorted(set(plan.threads), key=lambda count: count or sys.maxsize) if provider == CPU else [1]
        yield from (
            Setting(provider, count, batch, size)
            for size in sizes
            for batch in sorted(set(plan.batches))
            for count in counts
        )


def own_shape(facts: Mapping[str, ModelFile]) -> Shape:
    """Return what image the files; BundleError if they differ."""
    shapes = {fact.shape for fact in facts.values()}
    if len(shapes) != 1:
        raise BundleError(f"images: must be the same in all files, got {sorted(shapes)}: time the files of one run")
    return shapes.pop()


def at_sizes(
    files: Mapping[str, Path], sizes: Sequence[Size], *, own: Size, folder: Path
) -> tuple[dict[Size, Mapping[str, Path]], list[str]]:
    """Return the files at each size and their own, smallest first, and a warning for each size that a file cannot take."""
    sized: dict[Size, Mapping[str, Path]] = {}
    warnings: list[str] = []
    for size in sorted({own, *sizes}, key=area):
        try:
            sized[size] = files if size == own else {name: at_size(path, size, folder) for name, path in files.items()}
        except BundleError as error:
            warnings.append(f"{error}; left out")
    return sized, warnings


def at_size(path: Path, size: Size, folder: Path) -> Path:
    """Write a copy of `path` with its input resized into `folder`, and return its path."""
    resized = folder / f"{path.stem}-{size[0]}-{size[1]}{path.suffix}"
    resized.write_bytes(resize_input(path.read_bytes(), size))
    return resized


def prepare(
    files: Mapping[str, Path], setting: Setting, shape: Shape, plan: Plan, *, progress: Progress
) -> tuple[dict[str, Run], dict[str, dict[str, str]], list[str]]:
    """Open all files at one setting, for images of this shape; return a function that runs each, its provider options, and warnings.

    All get the same images: noise with unit variance, like normalized photographs.
    """
    images = np.random.default_rng(plan.seed).standard_normal((setting.batch, *shape), dtype=np.float32)
    runs: dict[str, Run] = {}
    options: dict[str, dict[str, str]] = {name: {} for name in files}
    warnings: list[str] = []
    for name, path in files.items():
        if setting.provider == CPU:
            runs[name] = bind(open_session(path, threads=setting.threads), images)
            continue
        progress(f"{setting}: provider options for {name}")
        runs[name], options[name], skipped = fastest(path, images, seconds=plan.seconds / 4)
        warnings.extend(f"{setting}: {name}: {sentence}" for sentence in skipped)
    return runs, options, warnings


def is_slow(timed: Mapping[str, Timing], name: str) -> bool:
    """Tell whether a float16 file is certainly so much slower than the float32 student that its kernels must be emulated."""
    return FP32 in timed and speedup(timed[FP32], timed[name]).high < 1 / SLOW


def target_warnings(target: str | None) -> list[str]:
    """Return a warning if the files were made for another kind of machine, or for a provider that is not available."""
    if target is None or target == host_target().name:
        return []
    if (provider := TARGET_PROVIDERS.get(target)) is not None:
        missing = provider not in available_providers()
        return [
            f"the files are made for {target}, but this machine has no {provider}: their speed there is not measured"
        ] * missing
    return [
        f"the INT8 files are made for {target} and this machine is {host_target().name}: "
        "their times and accuracy here are not the target's"
    ]


def provider_warnings(providers: Sequence[str], facts: Mapping[str, ModelFile]) -> list[str]:
    """Return warnings on missing providers, and on INT8 with CUDA."""
    missing = [name for name in providers if PROVIDERS[name] not in available_providers()]
    warnings = [f"this machine has no {PROVIDERS[name]}: not timed" for name in missing]
    if "cuda" in set(providers) - set(missing) and any(fact.precision == "int8" for fact in facts.values()):
        warnings.append(
            "ONNX Runtime's CUDA provider has no INT8 convolution: INT8 files compute in float there, serve FP16"
        )
    return warnings


def measure(bundle: Bundle, arguments: argparse.Namespace) -> BenchJson:
    """Return the accuracy (if there are data) and the timings of a bundle's files."""
    scored: dict[str, AccuracyRow] = {}
    notes: tuple[str, ...] = ()
    if arguments.data:
        examples = bundle.examples(arguments.data)
        notes = examples.notes
        scores = score_files(bundle.files, examples.batches(), bundle.task, progress=print_live)
        scored = accuracy(scores, reference=FP32 if FP32 in scores else min(scores))
    plan = Plan(
        batches=arguments.batches,
        threads=arguments.threads,
        image_sizes=arguments.image_sizes,
        seconds=arguments.seconds,
        blocks=arguments.blocks,
    )
    found = bench(bundle.files, plan, target=bundle.target, progress=print_live)
    print_live("")
    warnings = [*notes, *found.warnings]
    metric = metric_json(bundle.task.metric)
    return BenchJson(
        metric=metric, accuracy=scored, timings=found.timings, environment=environment(), warnings=warnings
    )


def as_text(found: BenchJson) -> str:
    """Return a table for each setting, then the warnings."""
    header = (
        "file",
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
        parts.append(f"{setting}\n{table(header, [cells(row, found['accuracy'].get(row['name'])) for row in rows])}")
    return "\n\n".join([*parts, *(f"note: {warning}" for warning in found["warnings"])])


def setting_of(row: TimingRow) -> Setting:
    """Return the conditions of a row."""
    return Setting(row["provider"], row["threads"], row["batch"], size_of(row["image_size"]))


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
