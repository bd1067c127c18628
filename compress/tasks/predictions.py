"""A network's predictions for images without labels, which become their labels."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress.data.batches import eval_batches, in_order
from compress.data.dataset import Dataset
from compress.data.teachers import GivenTeacher
from compress.errors import CompressError
from compress.models.architectures import build
from compress.models.digest import class_names, source_digest, teachers_digest
from compress.models.teachers import names_within, own_names, seen, teacher_of
from compress.models.weights import load_weights_
from export.command.files import key_of, writing
from export.images.preprocess import Preprocess

Numbers = NDArray[np.int64]
LOGITS = "teacher-logits"  # the folder of a run that holds what teachers gave


@dataclass(frozen=True)
class Labeller:
    """What names the network whose predictions become labels: teachers, else a network (architecture, weights)."""

    teachers: tuple[GivenTeacher, ...]
    network: tuple[str, str | None] | None
    classes: Path | None  # a file with the classes' names
    trust_code: bool

    def facts(self) -> dict[str, object]:
        """Return all that its predictions depend on besides the images."""
        network = self.network and source_digest(*self.network)
        return {"classes": self._given(), "teacher": teachers_digest(self.teachers), "model": network}

    def build(self, preprocess: Preprocess) -> tuple[nn.Module, tuple[str, ...] | None]:
        """Return the network on the CPU, and its classes' names, None if unknown."""
        given = self._given()
        if self.teachers:
            given = given or own_names(self.teachers[0])
            taught = teacher_of(self.teachers, given, seen(preprocess), trust_code=self.trust_code)
            return taught, given or names_within(taught.first)
        assert self.network is not None
        arch, weights = self.network
        if given is None and weights is not None:
            raise CompressError(
                "data.classes: missing: without labels the class names are unknown: list them in a text file, one a line"
            )
        network = build(arch, num_classes=len(given or ()), shape=preprocess.shape, trust_code=self.trust_code)
        if weights is not None:
            load_weights_(network, arch, weights, reset_head=False)
        return network, given or names_within(network)

    def _given(self) -> tuple[str, ...] | None:
        return None if self.classes is None else class_names(self.classes)


def labels_of(
    images: Dataset, labeller: Labeller, *, memory: Path, batch_size: int, workers: int | None, device: torch.device
) -> tuple[tuple[str, ...], Numbers, Numbers]:
    """Return the labeller's classes and its predictions for training (n,) and validation images (m,), cached in `memory`."""
    file = memory / f"{key_of({'data': images.digest, **labeller.facts()})}.npz"
    if not file.exists():
        network, names = labeller.build(images.preprocess)
        network.to(device).to(memory_format=torch.channels_last).eval()
        classes, train, val = predictions(images, network, names, batch_size=batch_size, workers=workers, device=device)
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file) as partial:
            np.savez(partial, classes=np.array(classes), train=train, val=val)
    with np.load(file, allow_pickle=False) as found:
        return tuple(found["classes"].tolist()), found["train"], found["val"]


@torch.no_grad()
def predictions(
    images: Dataset,
    network: nn.Module,
    names: Sequence[str] | None,
    *,
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> tuple[Sequence[str], Numbers, Numbers]:
    """Return the classes' names, and the likeliest class of every training image (n,) and validation image (m,).

    Classes without names are numbered. A broken image gets class 0, but is never used.
    """
    tables = []
    for views, stored in ((images.train, images.train), (images.val, images.held_out)):
        shares = in_order(len(views)).split(batch_size)
        batches = eval_batches(views, images.preprocess, shares, device=device, workers=workers)
        # The targets of images without labels are their numbers.
        rows = [(batch.targets.cpu().numpy(), network(batch.images).float().cpu().numpy()) for batch in batches]
        numbers, outputs = (np.concatenate(column) for column in zip(*rows, strict=True))
        names = names or [f"class_{index:04d}" for index in range(outputs.shape[1])]
        tables.append(_table(stored, numbers, outputs))
    assert names is not None  # both parts have images
    return names, tables[0], tables[1]


def _table(images: Sized, numbers: Numbers, outputs: NDArray[np.float32]) -> Numbers:
    table = np.zeros(max(len(images), int(numbers.max()) + 1), np.int64)
    table[numbers] = outputs.argmax(axis=1)
    return table
