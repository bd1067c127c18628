"""The uncompressed network's outputs for images without labels, which become their truths."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from compress.data.batches import eval_batches, in_order
from compress.data.dataset import Dataset
from compress.data.images import ImageSet
from compress.errors import ModelError
from compress.models.outputs import signature_of
from compress.ranks import first_decides
from export.command.files import key_of, write_json
from export.images.preprocess import Preprocess
from export.onnx_file.outputs import Output
from export.tasks.tensors import channels_of

Build = Callable[[], nn.Module]
OUTPUTS = "outputs.json"


def with_references(
    images: Dataset,
    build: Build,
    facts: Mapping[str, object],
    *,
    memory: Path,
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> Dataset:
    """Return the images with the outputs of the network that `build` returns as truths, float32, cached in `memory`.

    `facts` name the network. The classes are the names of the outputs' channels. Rank 0 computes, all read.
    """
    folder = memory / f"outputs-{key_of({'data': images.digest, **facts})}"
    files = {"train": images.train, "val": images.val}

    def compute() -> None:
        missing = [name for name, part in files.items() if not _holds(folder / f"{name}.npy", part)]
        network = build().to(device).to(memory_format=torch.channels_last).eval() if missing else nn.Identity()
        folder.mkdir(parents=True, exist_ok=True)
        if missing and (outputs := signature_of(network, images.preprocess.shape)):
            write_json(folder / OUTPUTS, [asdict(one) for one in outputs])
        for name in missing:
            partial = folder / f"{name}.{os.getpid()}.partial"  # another run may compute the same
            _write(partial, files[name], images.preprocess, network, batch_size, workers, device)
            partial.rename(folder / f"{name}.npy")

    first_decides(compute)
    # Copy-on-write: nothing is written, and only what is read is loaded.
    train, val = (torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in files)
    outputs = _read_outputs(folder / OUTPUTS)
    if outputs:
        names = [f"{one.name}_{index:04d}" for one in outputs for index in range(channels_of(one.shape) or 0)]
    else:
        names = [f"channel_{index:04d}" for index in range(channels_of(train.shape[1:]) or 0)]
    return replace(
        images,
        classes=tuple(names),
        outputs=outputs,
        train=replace(images.train, labels=_of(images.train, train)),
        val=replace(images.val, labels=_of(images.val, val)),
        held_out=replace(images.held_out, labels=val),
    )


def _read_outputs(path: Path) -> tuple[Output, ...]:
    """Return the outputs that lie side by side in the truths; empty for a single one."""
    listed = json.loads(path.read_text()) if path.exists() else []
    return tuple(Output(one["name"], tuple(one["shape"])) for one in listed)


def _holds(path: Path, images: ImageSet) -> bool:
    """Tell whether a file has an output for every image; a run that knew of fewer, as the last are broken, wrote a shorter one."""
    return path.exists() and len(np.load(path, mmap_mode="r")) > int(images.labels.max())


def _of(images: ImageSet, outputs: Tensor) -> Tensor:
    """Return the outputs of a set's images, whose labels are still their numbers."""
    numbers = images.labels
    return outputs if torch.equal(numbers, torch.arange(len(outputs))) else outputs[numbers]


@torch.no_grad()
def _write(
    path: Path,
    images: ImageSet,
    preprocess: Preprocess,
    network: nn.Module,
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> None:
    """Write the outputs (n, ...) for images by their number; zeros for those that cannot be read, which are never used."""
    table: np.memmap | None = None
    number = int(images.labels.max()) + 1
    for batch in eval_batches(
        images, preprocess, in_order(len(images)).split(batch_size), device=device, workers=workers
    ):
        outputs = network(batch.images)
        if not isinstance(outputs, Tensor) or outputs.dim() not in (2, 3, 4) or not outputs.is_floating_point():
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise ModelError(
                f"{type(network).__name__}: must return one tensor (n, channels), (n, tokens, channels) or (n, channels, height, width), "
                f"returned {got}: wrap it in file.py:factory"
            )
        if not outputs.shape[1:].numel():
            raise ModelError(
                f"{type(network).__name__}: its output is empty, as of a classifier without classes: give an encoder, "
                "such as timm:NAME or file.py:factory"
            )
        if not outputs.isfinite().all():
            raise ModelError(
                f"{type(network).__name__}: an output is not finite: check data.mean, data.std and the weights"
            )
        if table is None:
            table = open_memmap(path, "w+", np.float32, (number, *outputs.shape[1:]))
        table[batch.targets.cpu().numpy()] = outputs.float().cpu().numpy()
    assert table is not None, "a set has images"
    table.flush()
