"""Time files against each other at every setting, in all providers and arithmetics that are asked for."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import BundleError
from export.images.size import Shape, Size, area
from export.onnx_file.model_file import ModelFile, inspect
from export.onnx_file.roles import FP32
from export.onnx_file.targets import CPU, TARGET_PROVIDERS, host_target
from export.runtime.cuda_options import ON_CUDA, fastest
from export.runtime.latency import speedup, time_sessions
from export.runtime.memory import peak_memory_mb
from export.runtime.providers import (
    PLAIN,
    PROVIDERS,
    Runtime,
    available_providers,
    left_to_others,
    missing,
    provider_named,
    runtimes,
)
from export.runtime.rows import Entry, Opened, Setting, TimingRow, is_headline, timing_row
from export.runtime.session import bind, infer, open_session, resize_input

COMPARED = 2  # images on which bf16 is compared with f32
FAR = 0.5  # standard deviations of the outputs; measured: 0.01 (ResNet-18), 0.05 (MobileNetV3-L), 0.2 (its INT8 file); wrong numbers give 1 or more
TINY = 1e-12
SLOW = 3.0  # a float16 file slower than float32 by this factor runs on emulated kernels; one timing of it is enough

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BenchPlan:
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
    files: Mapping[str, Path], plan: BenchPlan, *, target: str | None = None, progress: Progress = lambda _: None
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
        entries, wrong = trusted(files, plan, channels=channels, size=(own[0], own[1]))
        result.warnings.extend(wrong)
        every = list(settings(plan, list(sized)))
        for index, setting in enumerate(every, 1):
            progress(f"{setting} ({index}/{len(every)})")
            shape = (channels, *setting.image_size)
            device = provider_named(setting.provider).device
            is_first = is_headline(setting.provider, setting.threads, setting.batch)
            live = [
                entry
                for entry in entries
                if entry.runs_in.provider.device == device
                and (is_first or entry.runs_in != PLAIN or entry.name not in emulated)
            ]
            opened, skipped = prepare(live, sized[setting.image_size], setting, shape, plan, progress=progress)
            result.warnings.extend(skipped)
            runs = {entry.key(setting): found.run for entry, found in opened.items()}
            timed = time_sessions(runs, seconds=plan.seconds, blocks=plan.blocks, seed=plan.seed)
            for entry, found in opened.items():
                path, runs_in = sized[setting.image_size][entry.name], entry.runs_in
                memory = memory_mb(path, batch=setting.batch, shape=shape, runs_in=runs_in) if device == "cpu" else None
                row = timing_row(
                    entry, files[entry.name], facts[entry.name], setting, timed, opened=found, peak_memory_mb=memory
                )
                result.timings.append(row)
            if setting.provider == CPU:
                halves = {
                    name for name, fact in facts.items() if fact.precision == "fp16" and {name, FP32} <= timed.keys()
                }
                # Certainly so much slower than the float32 student that its kernels must be emulated.
                emulated |= {name for name in halves if speedup(timed[FP32], timed[name]).high < 1 / SLOW}
    result.warnings.extend(
        f"{name}: this CPU has no fast float16 kernels (over {SLOW:g} times slower than float32): timed with one thread and batch 1 only"
        for name in sorted(emulated)
    )
    return result


def settings(plan: BenchPlan, sizes: Sequence[Size]) -> Iterator[Setting]:
    """Yield the settings to time on each device that has a provider here, the headline's first; threads vary only on the CPU.

    Providers of one device are timed in turns, so their settings are one.
    """
    rows = [PROVIDERS[key] for key in plan.providers if missing(PROVIDERS[key]) is None]
    for device in dict.fromkeys(row.device for row in rows):
        first = next(row.name for row in rows if row.device == device)
        # 0 is all cores, the largest count.
        counts = sorted(set(plan.threads), key=lambda count: count or sys.maxsize) if device == "cpu" else [1]
        yield from (
            Setting(first, count, batch, image_size=size)
            for size in sizes
            for batch in sorted(set(plan.batches))
            for count in counts
        )


def trusted(files: Mapping[str, Path], plan: BenchPlan, *, channels: int, size: Size) -> tuple[list[Entry], list[str]]:
    """Return every file in every provider and arithmetic of the plan that this machine has, and warnings on those left out.

    Left out is an arithmetic whose outputs for noise are not those of f32: bf16 is wrong on some processors (openvino's issue 38256).
    """
    found, warnings = list[Entry](), list[str]()
    images = np.random.default_rng(plan.seed).standard_normal((COMPARED, channels, *size), dtype=np.float32)
    for runs_in in runtimes(plan.providers):
        for name, path in files.items():
            distance = 0.0 if runs_in.arithmetic == "f32" else distance_from_f32(path, runs_in, images)
            if distance <= FAR:
                found.append(Entry(name, runs_in))
            else:
                warnings.append(
                    f"{name}: {runs_in} computes it wrongly on this machine (root mean square {distance:.2g} standard deviations of its "
                    f"outputs away from f32, at most {FAR:g} is rounding): left out"
                )
    return found, warnings


def distance_from_f32(path: Path, runs_in: Runtime, images: NDArray[np.float32]) -> float:
    """Return how far a file's outputs are from those in f32: the root mean square, in standard deviations of all values."""
    exact, other = (
        infer(open_session(path, runs_in=one), images).astype(np.float64)
        for one in (Runtime(runs_in.provider, "f32"), runs_in)
    )
    return float(np.sqrt(np.mean((other - exact) ** 2)) / max(float(np.std(exact)), TINY))


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
    entries: Sequence[Entry],
    files: Mapping[str, Path],
    setting: Setting,
    shape: Shape,
    plan: BenchPlan,
    *,
    progress: Progress,
) -> tuple[dict[Entry, Opened], list[str]]:
    """Open the entries' files at one setting, for images of this shape; return them with warnings.

    All get the same images: noise with unit variance, like normalized photographs.
    """
    images = np.random.default_rng(plan.seed).standard_normal((setting.batch, *shape), dtype=np.float32)
    found: dict[Entry, Opened] = {}
    warnings: list[str] = []
    for entry in entries:
        path, runs_in = files[entry.name], entry.runs_in
        start = time.perf_counter()
        if runs_in == ON_CUDA:
            progress(f"{setting}: provider options for {entry.name}")
            run, options, skipped = fastest(path, images, seconds=plan.seconds / 4)
            found[entry] = Opened(run, options, None, [])
            warnings.extend(f"{setting}: {entry.name}: {sentence}" for sentence in skipped)
            continue
        fixed = setting.batch if runs_in.provider.plugin else None  # a plugin compiles for it
        session = open_session(path, runs_in=runs_in, threads=setting.threads, batch=fixed)
        milliseconds = (time.perf_counter() - start) * 1e3
        found[entry] = Opened(bind(session, images), {}, milliseconds, left_to_others(session, runs_in.provider))
    return found, warnings


def target_warnings(target: str | None) -> list[str]:
    """Return a warning if the files were made for another kind of machine, or for a provider that is not available."""
    if target is None or target == host_target().name:
        return []
    if (provider := TARGET_PROVIDERS.get(target)) is not None:
        absent = provider not in available_providers()
        return [
            f"the files are made for {target}, but this machine has no {provider}: their speed there is not measured"
        ] * absent
    return [
        f"the INT8 files are made for {target} and this machine is {host_target().name}: "
        "their times and accuracy here are not the target's"
    ]


def provider_warnings(providers: Sequence[str], facts: Mapping[str, ModelFile]) -> list[str]:
    """Return warnings on missing providers, and on INT8 with CUDA."""
    absent = {name: sentence for name in providers if (sentence := missing(PROVIDERS[name]))}
    warnings = [
        f"not timed: {sentence}" if PROVIDERS[name].plugin else f"this machine has no {PROVIDERS[name].name}: not timed"
        for name, sentence in absent.items()
    ]
    if "cuda" in set(providers) - set(absent) and any(fact.precision == "int8" for fact in facts.values()):
        warnings.append(
            "ONNX Runtime's CUDA provider has no INT8 convolution: INT8 files compute in float there, serve FP16"
        )
    return warnings
