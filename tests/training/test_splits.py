"""A batch in micro-batches, or over ranks, has the gradient of the whole batch, whatever a loss is a mean over."""

from pathlib import Path

import pytest
import torch
from several import ended, start
from splits import ALONE, TOGETHER, gradient
from torch import Tensor

SPLIT = [(kind, name) for kind, names in ALONE.items() for name in ["labels", *names]] + list(TOGETHER.items())
RANK = """
import sys
from pathlib import Path
import torch
from compress.ranks import joined
from splits import TOGETHER, gradient

out = Path(sys.argv[1])
with joined():
    for kind, names in TOGETHER.items():
        for losses, micro_batches in (("labels", 1), (names, 1), (names, 2)):
            found = gradient(kind, losses, out, micro_batches=micro_batches, rank=rank, ranks=2)
            if rank == 0:
                torch.save(found, out / f"{kind} {losses} {micro_batches}.pt")
"""


def distance(one: Tensor, other: Tensor) -> float:
    assert float(other.norm()) > 0
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("kind", "names"), SPLIT, ids=lambda name: name.replace(" ", "+"))
def test_micro_batches_have_the_gradient_of_the_whole_batch(tmp_path: Path, kind: str, names: str) -> None:
    whole = gradient(kind, names, tmp_path)
    for micro_batches in (2, 5):
        assert distance(gradient(kind, names, tmp_path, micro_batches=micro_batches), whole) < 1e-6


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    """Three images and two, in one part or two."""
    said = ended(start(RANK, str(tmp_path)), within_s=300)
    assert [code for code, _ in said] == [0, 0], said
    far = {}
    for file in sorted(tmp_path.glob("*.pt")):
        kind, *names, _ = file.stem.split()
        far[file.stem] = distance(torch.load(file, weights_only=True), gradient(kind, " ".join(names), tmp_path))
    assert len(far) == 3 * len(TOGETHER)
    assert max(far.values()) < 1e-6, far
