"""Describe the machine and the versions that a number was measured with."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import onnxruntime

from export.onnx_file.targets import host_instruction_sets, host_target

# CPU flags that decide which integer and half-precision kernels run, as Linux names them on x86-64 and Arm.
INSTRUCTION_SETS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino", "onnx", "numpy", "torch", "torchvision", "torch-pruning",
)  # fmt: skip
HARDWARE = ("machine", "cpu", "cores", "instruction_sets", "gpu")


def environment() -> dict[str, object]:
    """Return hardware, system and versions as JSON values; unknown ones are None."""
    here = runtime()
    return {
        "machine": platform.machine(),
        "cpu": here["cpu"],
        "cores": usable_cores(),
        "instruction_sets": here["instruction_sets"],
        "target": host_target().name,
        "memory_gb": memory_gb(),
        "gpu": gpu("name"),
        "gpu_driver": gpu("driver_version"),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "providers": list(onnxruntime.get_available_providers()),
    }


def runtime() -> dict[str, object]:
    """Return all that affects how outputs are rounded: ONNX Runtime's version, the processor, its instruction sets."""
    found = host_instruction_sets()
    return {
        "onnxruntime": onnxruntime.__version__,
        "cpu": cpu_model(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in found],
    }


def fingerprint(env: dict[str, object]) -> str:
    """Return a short name of the hardware; times of environments with the same name may be compared."""
    digest = hashlib.sha256(json.dumps([env[key] for key in HARDWARE]).encode()).hexdigest()
    words = re.findall(r"[a-z0-9]+", str(env["cpu"] or env["machine"]).lower())
    return "-".join([*words[:4], f"{env['cores']}c", digest[:8]])


def cpu_model() -> str | None:
    """Return the processor's name from Linux or the platform, or None."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or None


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float | None:
    """Return the machine's memory in GB."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def gpu(field: str) -> str | None:
    """Return one of nvidia-smi's fields for the first GPU, or None if there is no GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def version(package: str) -> str | None:
    """Return a package's installed version without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
