"""A small bundle of an INT8 file and its float twin, and images that both answer in every class, for tests of the gate."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnx_files import LABELS, save, small_contents
from quantized_files import SIZE, changed, constant, quantized_network

from export.bundle.write import Contents, write_bundle
from export.gate.checks import Limits
from export.gate.commands import update
from export.gate.latency import Plan
from export.gate.run import Terms
from export.images.preprocess import Preprocess
from export.runtime.session import open_session

LAYERS = ("conv1", "conv2", "head")
QUANTIZERS = tuple(f"quantizer_{name}" for name in ("x", "conv1", "conv2", "add", "pool", "flatten"))
PREPROCESS = {"image_size": SIZE, "resize_to": SIZE, "mean": [0.0, 0.0, 0.0], "std": [0.25, 0.25, 0.25]}


def pixels(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return noise of different colours and brightness."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count, SIZE, SIZE, 3))
    return (noise * rng.uniform(0, 1, (count, 1, 1, 3))).astype(np.uint8)


def logits(model: ModelProto, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what the network makes of images, (n, classes)."""
    inputs = Preprocess((SIZE, SIZE), (SIZE, SIZE), (0.0, 0.0, 0.0), (0.25, 0.25, 0.25)).normalize(images)
    found: NDArray[np.float32] = open_session(model.SerializeToString()).run(None, {"input": inputs})[0]
    return found


def networks() -> dict[str, ModelProto]:
    """Return the float and the INT8 network, their biases set so that all classes are answered."""
    in_float, in_int8 = quantized_network(63, plain=(*LAYERS, *QUANTIZERS)), quantized_network(63)
    mean = logits(in_float, pixels(500, seed=1)).mean(axis=0)
    bias, levels, step = (
        constant(in_float, "head.bias"),
        constant(in_int8, "head.bias"),
        constant(in_int8, "head.bias_scale"),
    )
    return {
        "student_fp32": changed(in_float, {"head.bias": (bias - mean).astype(np.float32)}),
        "student_int8": changed(in_int8, {"head.bias": (levels - mean / step).round().astype(np.int32)}),
    }


def contents(folder: Path, models: dict[str, ModelProto]) -> Contents:
    """Return what a bundle of the models is made of; their files are written into `folder`."""
    files = {name: save(model, folder / f"{name}.onnx") for name, model in models.items()}
    small = small_contents(files)
    return replace(small, preprocess=PREPROCESS, images=pixels(4, seed=2), metrics={})


def write_gated_bundle(out: Path, models: dict[str, ModelProto]) -> Path:
    """Write a bundle of the models and return where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bundle(out, contents(out.parent, models))
    return out


def write_images(path: Path, count: int) -> Path:
    """Write images, labelled as the float network answers them but for one in ten, as an archive; return where."""
    images = pixels(count)
    labels = logits(networks()["student_fp32"], images).argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % len(LABELS)
    np.savez(path, images=images, labels=labels)
    return path


def gated_place(folder: Path) -> Path:
    """Write a bundle, images, and the bundle's baseline without times into a folder; return the folder."""
    write_gated_bundle(folder / "bundle", networks())
    write_images(folder / "images.npz", 600)
    limits = Limits(max_latency_ratio=None)
    update(folder / "bundle", folder / "baselines", Terms(folder / "images.npz", limits, Plan()))
    return folder


def flip_a_byte(bundle: Path) -> None:
    """Damage the INT8 file."""
    content = bytearray((bundle / "student_int8.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "student_int8.onnx").unlink()  # the server's copy may be the same file on the disk
    (bundle / "student_int8.onnx").write_bytes(content)
