"""Examine this machine: what is installed, what INT8 can gain here, and how to repair what is missing."""

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from compress.report.distribution import own_distribution
from export.onnx_file.targets import CUDA, Target, host_instruction_sets, host_target
from export.runtime.faults import fault_of

Status = Literal["ok", "warn", "missing"]
COLOURS = {"ok": "green", "warn": "yellow", "missing": "red"}
# Alternatives to a required distribution; installing both would overwrite files.
STANDS_FOR = {"onnxruntime": "onnxruntime-gpu"}
LITTLE_MEMORY_GB = 3.5  # a ResNet-50 recipe at 64 px needs about 2.5
LITTLE_DISK_GB = 2.0  # a ResNet-50 run with its checkpoints takes about 1


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `repair` is set unless the status is ok."""

    name: str
    status: Status
    value: str
    repair: str = ""


def examine(out: Path) -> int:
    """Print every finding; return 0, or 2 if something that a run needs is missing."""
    installed = [python(sys.version_info[:2]), *packages(own_distribution().requires or (), version_of)]
    found = list(installed)
    if all(finding.status != "missing" for finding in installed):
        found += machine(out)
    width = max(len(finding.name) for finding in found)
    console = Console()
    for finding in found:
        status = (f"{finding.status:7}", COLOURS[finding.status])
        console.print(Text.assemble(status, f"  {finding.name:{width}}  {finding.value}"), soft_wrap=True)
        if finding.repair:
            console.print(Text(f"{'':{9 + width}}  → {finding.repair}"), soft_wrap=True)
    return 2 if any(finding.status == "missing" for finding in found) else 0


def python(version: tuple[int, int]) -> Finding:
    """Judge the interpreter."""
    if (3, 11) <= version <= (3, 12):
        return Finding("Python", "ok", platform.python_version())
    return Finding("Python", "warn", platform.python_version(), "tested on 3.11 and 3.12: make setup PYTHON=python3.12")


def packages(requirements: Sequence[str], version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Check the installed packages against the distribution's requirements, without extras."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        version = version_of(name) or version_of(STANDS_FOR.get(name, name))
        repair = f"pip install '{requirement}', or make setup"
        if version is None:
            yield Finding(name, "missing", "not installed", repair)
        elif not requirement.specifier.contains(version, prereleases=True):
            fault = fault_of(version, host_instruction_sets()) if name in STANDS_FOR else None
            why = f"; it computes INT8 wrongly on {fault.processors}" if fault else ""
            yield Finding(name, "missing", f"{version}, needs {requirement.specifier}{why}", repair)
        else:
            yield Finding(name, "ok", version)


def version_of(name: str) -> str | None:
    """Return an installed distribution's version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine(out: Path) -> list[Finding]:
    """Examine the hardware; every package must be installed."""
    from export.runtime.environment import cpu_model, gpu, memory_gb, usable_cores
    from export.runtime.providers import available_providers

    card = gpu("name")
    return [
        cpu(cpu_model() or platform.machine(), host_target(), host_instruction_sets()),
        Finding("cores", "ok", str(usable_cores())),
        memory(memory_gb()),
        accelerator(card, *_torch_cuda()),
        providers(available_providers(), card),
        disk(out),
    ]


def cpu(model: str, target: Target, flags: Collection[str]) -> Finding:
    """Tell what INT8 can gain on this processor, and its target."""
    value = f"{model}: target {target.name}"
    if target.name == "cpu_arm":
        if "asimddp" in flags or not flags:
            return Finding("CPU", "ok", f"{value}, dot product: INT8 up to about 4x the arithmetic of FP32")
        return Finding(
            "CPU", "warn", f"{value}, no dot product", "expect little speed-up from INT8 here; pruning still helps"
        )
    if target.name == "cpu_vnni":
        return Finding("CPU", "ok", f"{value}, VNNI: INT8 up to about 4x the arithmetic of FP32, full-range weights")
    if "avx2" in flags:
        return Finding(
            "CPU", "ok", f"{value}, AVX2 without VNNI: INT8 about 1.9x the arithmetic of FP32, 7-bit weights"
        )
    return Finding("CPU", "warn", f"{value}, no AVX2", "expect no speed-up from INT8 here; pruning still helps")


def memory(total_gb: float | None) -> Finding:
    """Judge the memory."""
    if total_gb is None:
        return Finding("memory", "warn", "unknown", f"training needs about {LITTLE_MEMORY_GB} GB")
    if total_gb < LITTLE_MEMORY_GB:
        return Finding("memory", "warn", f"{total_gb} GB", "take smaller batches: --set data.eval_batch_size=32")
    return Finding("memory", "ok", f"{total_gb} GB")


def accelerator(card: str | None, cuda_build: str | None, usable: bool) -> Finding:
    """Check whether torch can train on this machine's GPU."""
    build = f"torch built for CUDA {cuda_build}" if cuda_build else "torch built for the CPU"
    if card is None:
        return Finding("GPU", "ok", f"none ({build}): training runs on the CPU")
    if usable:
        return Finding("GPU", "ok", f"{card} ({build})")
    repair = "update the driver, or install the torch build that fits it: https://pytorch.org/get-started/locally"
    return Finding("GPU", "warn", f"{card}, but torch cannot use it ({build})", repair)


def providers(names: Collection[str], card: str | None) -> Finding:
    """Check whether ONNX Runtime can use this machine's GPU."""
    value = ", ".join(names)
    if card is None or CUDA in names:
        return Finding("ONNX Runtime", "ok", value)
    repair = (
        "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu (without it the GPU is not timed)"
    )
    return Finding("ONNX Runtime", "warn", f"{value}, no {CUDA}", repair)


def disk(out: Path) -> Finding:
    """Check the folder of the runs, or its nearest parent that exists."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            "disk", "missing", f"{place}: cannot be written", "choose another folder with --out (OUT= under make)"
        )
    free_gb = shutil.disk_usage(place).free / 1e9
    if free_gb < LITTLE_DISK_GB:
        return Finding(
            "disk", "warn", f"{free_gb:.1f} GB free at {place}", "free some, or choose another folder with --out"
        )
    return Finding("disk", "ok", f"{free_gb:.1f} GB free at {place}")


def _torch_cuda() -> tuple[str | None, bool]:
    """Return torch's CUDA version and whether it can use a GPU; the warning about an old driver becomes a finding."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.version.cuda, torch.cuda.is_available()
