"""Time three standard blocks in every provider and precision of this machine: what INT8 and bf16 gain here."""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.scoring import Served
from export.command.table import table
from export.onnx_file.targets import CPU, host_target
from export.runtime.conditions import Conditions
from export.runtime.measure import Bench, BenchPlan, bench
from export.runtime.providers import present, runtime_named
from export.runtime.rows import TimingRow

DEPTH, CHANNELS, SIZE = 4, 64, 64  # blocks in a row, their channels, the image's side; the stem quarters the image
SECONDS, BLOCKS = 1.0, 6


class AttentionBlock(nn.Module):
    """Self-attention over the pixels with four heads, and a perceptron of four times the width, both residual."""

    def __init__(self, width: int = CHANNELS) -> None:
        """Make the layers."""
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return pixels (n, channels, height, width) of the same shape."""
        shape = pixels.shape
        tokens = pixels.flatten(2).transpose(1, 2)  # (n, height × width, channels)
        parts = self.query_key_value(self.first(tokens)).chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts
        )  # (n, 4, tokens, channels / 4)
        weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)
        tokens = tokens + self.project((weights @ value).transpose(1, 2).flatten(2))
        tokens = tokens + self.perceptron(self.second(tokens))
        found: Tensor = tokens.transpose(1, 2).unflatten(2, shape[2:])
        return found


def convolution() -> nn.Module:
    """Return a 3 × 3 convolution with batch-norm and ReLU."""
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())


def depthwise() -> nn.Module:
    """Return a MobileNetV2 block without its addition: widen by four, a depthwise 3 × 3 convolution, narrow."""
    wide = 4 * CHANNELS
    return nn.Sequential(
        nn.Conv2d(CHANNELS, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS),
    )  # fmt: skip


KINDS: dict[str, Callable[[], nn.Module]] = {
    "convolution": convolution,
    "depthwise": depthwise,
    "attention": AttentionBlock,
}


class Gain(NamedTuple):
    """How many times faster than the CPU provider's FP32 a file's precision is in a provider, over the blocks' geometric mean."""

    place: str
    times: float


def network(kind: str) -> nn.Module:
    """Return a small untrained network of DEPTH blocks of one kind, for 10 classes."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 4, stride=4), nn.ReLU())
    blocks = [KINDS[kind]() for _ in range(DEPTH)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10)).eval()


def measure(*, seconds: float = SECONDS) -> dict[str, Bench]:
    """Time each kind's FP32 and INT8 files with one thread on one image, all providers of this machine in turns."""
    plan = BenchPlan(batches=(1,), threads=(1,), providers=present("auto"), seconds=seconds, blocks=BLOCKS)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            files = {}
            for precision in ("fp32", "int8"):
                path = Path(folder, f"{kind}_{precision}.onnx")
                Served(Conditions(CPU, 1, 1), precision, (3, SIZE, SIZE), host_target()).write(network(kind), path)
                files[f"student_{precision}"] = path
            found[kind] = bench(files, plan)
    return found


def place_of(row: TimingRow) -> str:
    """Return for example "INT8 in OpenVINO"; a float file in bf16 is "bf16 in OpenVINO"."""
    runs_in = runtime_named(row["provider"], row.get("arithmetic", "f32"))
    is_float = row["precision"] == "fp32"
    if is_float and runs_in.arithmetic != "f32":
        return f"{runs_in.arithmetic} in {runs_in.provider.title}"
    return f"{row['precision'].upper()} in {runs_in}"


def gains(found: Mapping[str, Bench]) -> list[Gain]:
    """Return every place's gain, the fastest first; a place that some block lacks is left out."""
    times: dict[str, list[float]] = {}
    for timed in found.values():
        for row in timed.timings:
            if row["speedup_vs_student_fp32"]:
                times.setdefault(place_of(row), []).append(row["speedup_vs_student_fp32"]["ratio"])
    whole = [
        Gain(place, math.prod(ratios) ** (1 / len(ratios)))
        for place, ratios in times.items()
        if len(ratios) == len(found)
    ]
    return sorted(whole, key=lambda gain: -gain.times)


def as_text(found: Mapping[str, Bench]) -> str:
    """Return one table, in ms and in times the CPU provider's FP32, warnings, and one sentence."""
    rows = [
        (kind, place_of(row), row["p50_ms"], row["speedup_vs_student_fp32"] and row["speedup_vs_student_fp32"]["ratio"])
        for kind, timed in found.items()
        for row in timed.timings
    ]
    notes = dict.fromkeys(f"note: {warning}" for timed in found.values() for warning in timed.warnings)
    said = ", ".join(f"{place} {times:.1f}×" for place, times in gains(found) if place != "FP32 in CPU")
    return "\n".join(
        [table(("block", "runs in", "p50 ms", "times FP32 in CPU"), rows), *notes, f"On these three blocks: {said}."]
    )
