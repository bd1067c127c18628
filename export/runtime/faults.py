"""Versions of ONNX Runtime that compute INT8 wrongly, and the processors on which they do."""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Versions from `first` up to the `repaired` one (major, minor), and the processor's flag as Linux names it."""

    first: tuple[int, int]
    repaired: tuple[int, int]
    instruction_set: str
    processors: str

    @property
    def repair(self) -> str:
        """The command that installs a version without the fault."""
        return f"pip install 'onnxruntime>={_text(self.repaired)}'"

    @property
    def versions(self) -> str:
        """The first and the last faulty version."""
        return f"{_text(self.first)} to {_text((self.repaired[0], self.repaired[1] - 1))}"


# Measured: 1.21.1, 1.22.1, 1.23.2, 1.24.1 and 1.24.4 are off by up to 255 levels in a fifth of random QLinearConv and QGemm shapes, with
# 7-bit weights too; 1.20.1 and 1.25.0, 1.25.1 and 1.32.0 are exact. Repaired by microsoft/onnxruntime's pull request 27671.
FAULTS = (Fault((1, 21), (1, 25), "amx_int8", "processors with AMX"),)


def fault_of(version: str, flags: Collection[str]) -> Fault | None:
    """Return what is wrong with a version of ONNX Runtime on a processor with these flags, or None."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    here = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    return next((one for one in FAULTS if one.first <= here < one.repaired and one.instruction_set in flags), None)


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
