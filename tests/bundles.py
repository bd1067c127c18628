"""A bundle of a quantized network with real images: handwritten digits, in three precisions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx_files import save, small_contents
from quantized_files import SIZE, quantized_network
from sklearn.datasets import load_digits

from export.bundle.write import Contents
from export.onnx_file.graph import to_float16
from export.serving.triton import Serving

LAYERS = ("conv1", "conv2", "head")
GRIDS = tuple(f"quantizer_{name}" for name in ("x", "conv1", "conv2", "add", "pool", "flatten"))
# The network's grid of inputs goes from 0 to 4.
PREPROCESS = {"image_size": SIZE, "resize_to": SIZE, "mean": [0.0, 0.0, 0.0], "std": [0.25, 0.25, 0.25]}
SERVING = Serving(
    {"cpu": "student_int8", "cuda": "student_fp16", "tensorrt": "student_fp16"}, "cpu", threads=2, instances=1, max_batch_size=8
)  # fmt: skip


def digits(count: int) -> NDArray[np.uint8]:
    """Return grey RGB images, uint8 (count, 8, 8, 3)."""
    grey = (load_digits().images[:count] * (255 / 16)).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def digit_contents(folder: Path) -> Contents:
    """Write the network in three precisions into `folder` and return what a bundle of them is made of."""
    whole = quantized_network(63, plain=LAYERS + GRIDS)
    files = {
        "student_fp32": save(whole, folder / "student_fp32.onnx"),
        "student_fp16": save(to_float16(onnx.ModelProto.FromString(whole.SerializeToString())), folder / "fp16.onnx"),
        "student_int8": save(quantized_network(63), folder / "student_int8.onnx"),
    }
    return replace(
        small_contents(files), preprocess=PREPROCESS, serving=SERVING, images=digits(6), truths=np.arange(6) % 3
    )
