"""The ONNX files of a run: their names, in the order of the tables."""

from collections.abc import Collection
from pathlib import Path

from export.names import DECODER
from export.onnx_file.targets import Target

TEACHER, FP32, FP16 = "teacher_fp32", "student_fp32", "student_fp16"
PTQ, QAT = "student_ptq_int8", "student_int8"
PTQ_DYNAMIC = "student_dynamic_int8"  # in the ptq stage's folder only: nothing proves it
UINT8 = "_uint8"  # ends the name of an INT8 file's twin that takes pixels
SERVED = (FP32, FP16, PTQ, QAT)
ORDER = (TEACHER, *SERVED)


def name_for(name: str, target: Target, primary: Target) -> str:
    """Return the name of an INT8 file; for a further target it ends in the target's name."""
    return name if target == primary else f"{name}_{target.name}"


def is_int8(name: str) -> bool:
    """Tell whether a file of this name computes in integers."""
    return name.startswith((PTQ, QAT))


def files_in(directory: Path) -> dict[str, Path]:
    """Return the networks' ONNX files of an export by name, without those with uint8 input, whose images differ."""
    names = [path.stem for path in directory.glob("*.onnx") if path.name != DECODER and not path.stem.endswith(UINT8)]
    ranked = sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: directory / f"{name}.onnx" for name in ranked}


def deployed(names: Collection[str], target: Target) -> str:
    """Return the file to serve on the target: trained INT8, else calibrated INT8, else FP32; FP16 if the target has no INT8."""
    order = (FP16, FP32) if target.precision == "fp16" else (QAT, PTQ, FP32)
    return next(name for name in order if name in names)
