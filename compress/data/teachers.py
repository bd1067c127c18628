"""Teachers as a recipe names them, with their preprocessing; other programs may have saved them."""

from dataclasses import dataclass
from pathlib import Path

FOREIGN = ("onnx", "hf", "exported")  # kinds of files that contain a network with its weights


@dataclass(frozen=True)
class GivenTeacher:
    """One teacher of a recipe; where a setting is None, it takes the student's."""

    network: str
    weights: str | None
    image_size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: Path | None


def foreign(arch: str) -> tuple[str, str] | None:
    """Return kind and path of a network whose file contains it completely, None for other networks."""
    kind, _, path = arch.partition(":")
    return (kind, path) if kind in FOREIGN else None
