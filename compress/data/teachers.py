"""Networks that other programs saved, as a recipe names them: as teachers, with how they see images."""

from dataclasses import dataclass
from pathlib import Path

FOREIGN = ("onnx", "hf", "exported")  # kinds of files that hold a network with its weights


@dataclass(frozen=True)
class GivenTeacher:
    """One teacher as a recipe names it; None is as the student has it."""

    network: str
    weights: str | None
    image_size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: Path | None


def foreign(arch: str) -> tuple[str, str] | None:
    """Return the kind and the path of a network that a file holds whole; None for others."""
    kind, _, path = arch.partition(":")
    return (kind, path) if kind in FOREIGN else None
