"""A teacher's logits on disk: one memory-mapped file for each view of the training images, so memory need not hold them."""

import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data.batches import Views
from export.command.files import put

Records = NDArray[np.void]


@dataclass(frozen=True)
class Layout:
    """How an image's logits are stored in float16: all, or the `top_k` largest and the log-sum-exp of the rest."""

    images: int
    classes: int
    top_k: int | None

    @property
    def record(self) -> np.dtype[np.void]:
        """One image's record."""
        if self.top_k is None:
            return np.dtype([("logits", "<f2", (self.classes,))])
        return np.dtype([("logits", "<f2", (self.top_k,)), ("classes", "<u4", (self.top_k,)), ("rest", "<f2")])

    @property
    def bytes_per_view(self) -> int:
        """The size of one view's file."""
        return self.images * self.record.itemsize

    def pack(self, logits: Tensor) -> Records:
        """Return logits (n, classes) as records (n,)."""
        records = np.empty(len(logits), self.record)
        if self.top_k is None:
            records["logits"] = logits.numpy()
            return records
        values, classes = logits.topk(self.top_k, dim=1)
        others = logits.scatter(1, classes, -torch.inf)
        records["logits"], records["classes"] = values.numpy(), classes.numpy()
        records["rest"] = torch.logsumexp(others, dim=1).numpy()
        return records

    def unpack(self, records: Records) -> Tensor:
        """Return records (n,) as logits (n, classes); classes beyond `top_k` share the remaining probability evenly."""
        logits = torch.from_numpy(records["logits"].astype(np.float32))
        if self.top_k is None:
            return logits
        rest = torch.from_numpy(records["rest"].astype(np.float32)) - math.log(self.classes - self.top_k)
        spread = rest[:, None].repeat(1, self.classes)
        kept = torch.from_numpy(records["classes"].astype(np.int64))
        return spread.scatter(1, kept, logits)


class LogitCache:
    """One teacher's logits in a folder named by their cache key. A view is written under a temporary name, then renamed."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self._view = cache(self._open)

    def has(self, view: int) -> bool:
        """Tell whether a view is stored and complete."""
        path = self._path(view)
        return path.is_file() and path.stat().st_size == self.layout.bytes_per_view

    def logits(self, views: Views) -> Tensor:
        """Return the teacher's logits for a batch, float32 (n, classes) on the CPU."""
        return self.layout.unpack(self._view(views.view)[views.indices.numpy()])

    def begin(self, view: int) -> None:
        """Create a view's file at full size; every rank then writes its part."""
        with self._partial(view).open("wb") as file:
            file.truncate(self.layout.bytes_per_view)

    @contextmanager
    def writing(self, view: int) -> Iterator[Records]:
        """Give the writable records (images,) of a view that `begin` created; flush them at the end."""
        records = np.memmap(self._partial(view), self.layout.record, "r+")
        yield records
        records.flush()

    def finish(self, view: int) -> None:
        """Give a view its final name once all ranks have written their parts."""
        put(self._partial(view), self._path(view))

    def clear(self) -> None:
        """Delete every view."""
        self._view.cache_clear()
        for path in self.folder.glob("view-*"):
            path.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder's lock, which only one run has at a time; wait for it if needed."""
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _open(self, view: int) -> Records:
        return np.memmap(self._path(view), self.layout.record, "r")

    def _path(self, view: int) -> Path:
        return self.folder / f"view-{view:04d}.logits"

    def _partial(self, view: int) -> Path:
        return self.folder / f".view-{view:04d}.partial"
