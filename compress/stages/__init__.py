"""The stages: plain functions from one directory to another; `source`, the first, gets None as its `src`."""

from collections.abc import Callable

from compress.artifact import Metrics
from compress.stages import bench, distill, export, prune, ptq, qat, source, student

STAGES: dict[str, Callable[..., Metrics]] = {
    "source": source.apply,
    "student": student.apply,
    "prune": prune.apply,
    "distill": distill.apply,
    "ptq": ptq.apply,
    "qat": qat.apply,
    "export": export.apply,
    "bench": bench.apply,
}
