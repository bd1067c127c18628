"""The kinds of machines that INT8 will run on, and the number grid for each.

Training, post-training quantization and export all read a target's one row, so the trained grid is the deployed grid.
"""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Target:
    """The numerics of one kind of machine; if `precision` is fp16, the INT8 fields are unused."""

    name: str
    precision: Literal["int8", "fp16"]
    activation_min: int
    activation_max: int
    weight_min: int
    weight_max: int
    symmetric_activations: bool
    integer_bias: bool  # int32 in the file, else float
    why: str

    @property
    def unsigned_activations(self) -> bool:
        """Whether activations are stored as uint8 (else int8)."""
        return self.activation_min == 0

    @property
    def weight_scale_divisor(self) -> int:
        """The largest weight level whose negative is on the grid too; a channel's scale is max|w| divided by it."""
        return min(-self.weight_min, self.weight_max)


TARGETS = {
    "cpu_avx2": Target("cpu_avx2", "int8", 0, 255, -64, 63, False, True,
        "vpmaddubsw adds two U8xS8 products into 16 bits and saturates: 7-bit weights cannot, and run at the same speed"),
    "cpu_vnni": Target("cpu_vnni", "int8", 0, 255, -128, 127, False, True,
        "VNNI accumulates U8xS8 into 32 bits: the full weight range is exact"),
    "cpu_arm": Target("cpu_arm", "int8", -128, 127, -128, 127, False, True,
        "Arm's integer kernels multiply S8xS8"),
    "tensorrt": Target("tensorrt", "int8", -128, 127, -128, 127, True, False,
        "TensorRT takes symmetric S8 with zero-point 0 only, and no int32 DequantizeLinear: the bias stays float"),
    "cuda": Target("cuda", "fp16", -128, 127, -128, 127, True, False,
        "ONNX Runtime's CUDA provider has no INT8 convolution: FP16 is the file for it"),
}  # fmt: skip
CPU, CUDA, TENSORRT, OPENVINO = (  # of ONNX Runtime
    "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider",
)  # fmt: skip
TARGET_PROVIDERS = {"cuda": CUDA, "tensorrt": TENSORRT}  # of targets that are not CPUs
# For each machine, the targets whose files its integer kernels compute with the same results.
RUNS = {"cpu_avx2": ("cpu_avx2",), "cpu_vnni": ("cpu_vnni", "cpu_avx2"), "cpu_arm": ("cpu_arm",)}


def host_instruction_sets() -> frozenset[str]:
    """Return the CPU's feature flags as Linux names them, empty if unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def host_target() -> Target:
    """Return this machine's target; without VNNI flags, the 7-bit grid, which is exact everywhere."""
    if platform.machine() in ("aarch64", "arm64"):
        return TARGETS["cpu_arm"]
    if host_instruction_sets() & {"avx512_vnni", "avx_vnni", "avxvnni"}:
        return TARGETS["cpu_vnni"]
    return TARGETS["cpu_avx2"]


def provider_title(provider: str) -> str:
    """Return CPU for CPUExecutionProvider."""
    return provider.removesuffix("ExecutionProvider")


def resolve_target(name: str) -> Target:
    """Return the named target; `auto` is this machine's."""
    return host_target() if name == "auto" else TARGETS[name]
