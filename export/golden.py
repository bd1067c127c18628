"""Golden inputs and outputs: real images, what the network sees of them, and what every file answered where the bundle was made.

Equal to the last bit on every machine: the inputs, since normalizing is a chain of single IEEE operations. Equal to the
last bit on the machine and the ONNX Runtime that environment.json names, one thread, one image at a time: the outputs.
Elsewhere kernels add up in another order, and what lies between two levels of a grid rounds to either; so each file has
a tolerance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from export.errors import BundleError
from export.session import DTYPES, open_session

FOLDER, IMAGES, INPUTS = "golden", "images", "inputs"
MAX_HEADER_BYTES = 1024
# The largest difference of a logit, in standard deviations of all expected ones. Seen on 1,000 photographs and 897 digits in
# ONNX Runtime 1.15 to 1.32 on x86-64, aarch64 and WebAssembly, and in OpenVINO: fp32 1e-6, fp16 0.05 (Arm), int8 0.13.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "int8": 0.25}


@dataclass(frozen=True)
class Golden:
    """The golden arrays; `outputs` and `tolerance` (largest difference of a logit) are by file."""

    images: NDArray[np.uint8]  # (n, size, size, 3), RGB, resized and cropped
    inputs: NDArray[np.float32]  # (n, 3, size, size), the same normalized
    labels: NDArray[np.int64]  # (n,)
    outputs: dict[str, NDArray[np.float32]]  # (n, classes) each
    tolerance: dict[str, float]

    def differing(self, name: str, logits: NDArray[np.generic]) -> list[int]:
        """Return the images whose `logits` (n, classes) are not the expected ones of the file `name` within its tolerance."""
        apart = np.abs(logits.astype(np.float64) - self.outputs[name]).max(axis=1)  # (n,)
        return [int(index) for index in np.flatnonzero(~(apart <= self.tolerance[name]))]  # NaN is different


def answer(path: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits (n, classes) of `inputs` (n, 3, size, size), one image at a time on one thread of the CPU."""
    session = open_session(path, threads=1)
    (given,) = session.get_inputs()
    images = inputs.astype(DTYPES[given.type], copy=False)
    return np.concatenate([session.run(None, {given.name: image[None]})[0] for image in images]).astype(np.float32)


def make_golden(
    files: Mapping[str, tuple[Path, str]],
    images: NDArray[np.uint8],
    inputs: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> Golden:
    """Return the golden arrays of `files` (name to path and precision), run on this machine.

    Raises BundleError where a file answers with infinity or no number.
    """
    outputs = {name: answer(path, inputs) for name, (path, _) in files.items()}
    for name, logits in outputs.items():
        if not np.isfinite(logits).all():
            raise BundleError(f"{name}: answers a golden image with logits that are not finite: export it again")
    tolerance = {name: TOLERANCE[kind] * float(outputs[name].std()) for name, (_, kind) in files.items()}
    return Golden(images, inputs, labels, outputs, {name: float(f"{value:.3g}") for name, value in tolerance.items()})


def write_arrays(folder: Path, golden: Golden) -> None:
    """Write the arrays, each as a .npy file."""
    (folder / FOLDER).mkdir()
    arrays: dict[str, NDArray[Any]] = {IMAGES: golden.images, INPUTS: golden.inputs, **golden.outputs}
    for name, array in arrays.items():
        np.save(folder / FOLDER / f"{name}.npy", array, allow_pickle=False)


def read_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Return the array of a .npy file, which must have just this type, this shape and this length.

    Raises BundleError before anything is allocated that the file is not long enough for.
    """
    wanted = f"{np.dtype(dtype)} {shape}"
    with path.open("rb") as stream:
        try:
            if npy.read_magic(stream) != (1, 0):
                raise ValueError("a version other than 1.0")
            found = npy.read_array_header_1_0(stream, max_header_size=MAX_HEADER_BYTES)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise BundleError(
                f"{path.name}: must be a .npy file of {wanted}, got {error}: get the bundle again"
            ) from error
        data = stream.read(np.dtype(dtype).itemsize * int(np.prod(shape)) + 1)
    if found != (shape, False, np.dtype(dtype)) or len(data) != np.dtype(dtype).itemsize * int(np.prod(shape)):
        raise BundleError(f"{path.name}: must hold {wanted}, got {found[2]} {found[0]}: get the bundle again")
    return np.frombuffer(data, dtype).reshape(shape)
