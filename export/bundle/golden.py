"""Golden inputs and outputs: real images, what the network sees of them, and what every file answered where the bundle was made.

Equal to the last bit on every machine: the inputs, since normalizing is a chain of single IEEE operations. Equal to the
last bit in the ONNX Runtime and on the processor that bundle.json's `golden.made_with` names, one thread, one image at a time: the outputs.
Elsewhere kernels add up in another order, and what lies between two levels of a grid rounds to either; so each file has
a tolerance.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from export.bundle.inside import SUMS, Json, contained, get
from export.errors import BundleError
from export.images.preprocess import Preprocess
from export.runtime.environment import runtime
from export.runtime.session import DTYPES, open_session
from export.tasks.task import OutputTask

FOLDER, IMAGES, INPUTS = "golden", "images", "inputs"
MAX_GOLDEN = 64  # images
# The largest difference of an output's value, in standard deviations of all expected ones. Seen on 1,000 photographs and 897 digits in
# ONNX Runtime 1.15 to 1.32 on x86-64, aarch64 and WebAssembly, and in OpenVINO: fp32 1e-6, fp16 0.05 (Arm), int8 0.13.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "int8": 0.25}


@dataclass(frozen=True)
class Golden:
    """The golden arrays; `outputs` and `tolerance` (largest difference of a value) are by file, `made_with` is the outputs' runtime."""

    images: NDArray[np.uint8]  # (n, size, size, 3), RGB, resized and cropped
    inputs: NDArray[np.float32]  # (n, 3, size, size), the same normalized
    truths: NDArray[Any]  # (n, ...)
    outputs: dict[str, NDArray[np.float32]]  # (n, ...) each
    tolerance: dict[str, float]
    made_with: Json  # empty in bundles that were made before it was kept

    def differing(self, name: str, outputs: NDArray[np.generic]) -> list[int]:
        """Return the images whose `outputs` (n, ...) are not the expected ones of the file `name` within its tolerance."""
        apart = np.abs(outputs.astype(np.float64) - self.outputs[name]).reshape(len(outputs), -1).max(axis=1)  # (n,)
        return [int(index) for index in np.flatnonzero(~(apart <= self.tolerance[name]))]  # NaN is different


def answer(path: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the outputs (n, ...) of `inputs` (n, 3, size, size), one image at a time on one thread of the CPU."""
    session = open_session(path, threads=1)
    (given,) = session.get_inputs()
    images = inputs.astype(DTYPES[given.type], copy=False)
    return np.concatenate([session.run(None, {given.name: image[None]})[0] for image in images]).astype(np.float32)


def make_golden(
    files: Mapping[str, tuple[Path, str]],
    images: NDArray[np.uint8],
    inputs: NDArray[np.float32],
    truths: NDArray[Any],
) -> Golden:
    """Return the golden arrays of `files` (name to path and precision), run on this machine.

    Raises BundleError where a file answers with infinity or no number.
    """
    outputs = {name: answer(path, inputs) for name, (path, _) in files.items()}
    for name, logits in outputs.items():
        if not np.isfinite(logits).all():
            raise BundleError(f"{name}: answers a golden image with numbers that are not finite: export it again")
    tolerance = {name: TOLERANCE[kind] * float(outputs[name].std()) for name, (_, kind) in files.items()}
    rounded = {name: float(f"{value:.3g}") for name, value in tolerance.items()}
    return Golden(images, inputs, truths, outputs, rounded, runtime())


def write_arrays(folder: Path, golden: Golden) -> None:
    """Write the arrays, each as a .npy file."""
    (folder / FOLDER).mkdir()
    arrays: dict[str, NDArray[Any]] = {IMAGES: golden.images, INPUTS: golden.inputs, **golden.outputs}
    for name, array in arrays.items():
        (folder / FOLDER / f"{name}.npy").write_bytes(npy_header(array.dtype, array.shape) + array.tobytes())


def read_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Return the array of a .npy file that must have just this type and shape.

    Nothing is parsed: of what numpy's own reader takes, much raises errors of many kinds, and some fills the memory.
    Raises BundleError for any other file, before anything is allocated that it is not long enough for.
    """
    header, size = npy_header(dtype, shape), np.dtype(dtype).itemsize * math.prod(shape)
    if path.stat().st_size != len(header) + size or not (data := path.read_bytes()).startswith(header):
        raise BundleError(
            f"{path.name}: must be a .npy file of {np.dtype(dtype)} {shape} and nothing else: get the bundle again",
            defect="bad_content",
        )
    return np.frombuffer(data, dtype, offset=len(header)).reshape(shape)


def npy_header(dtype: DTypeLike, shape: tuple[int, ...]) -> bytes:
    """Return what stands before the values in version 1.0 of numpy's format, the same for every version of numpy."""
    kind = np.dtype(dtype).newbyteorder("<").str
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    padded = text.ljust(-(-(len(text) + 11) // 64) * 64 - 11) + "\n"  # ten bytes of magic and length stand before it
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode()


def read_golden(
    folder: Path,
    manifest: Json,
    digests: Mapping[str, str] | None,
    task: OutputTask,
    *,
    image_size: int,
    output: tuple[int, ...],
) -> Golden:
    """Return the golden arrays, whose shapes the manifest and the models leave no choice in."""
    listed, where = get(manifest, "bundle.json", "golden", dict), "bundle.json: golden"
    names = list(get(manifest, "bundle.json", "files", dict))
    values, tolerance = get(listed, where, "truths", list), get(listed, where, "tolerance", dict)
    if not 0 < len(values) <= MAX_GOLDEN:
        raise BundleError(
            f"{where}.truths: must be of 1 to {MAX_GOLDEN} images, got {len(values)}", defect="bad_content"
        )
    truths = task.truths(values, output)
    if set(tolerance) != set(names) or not all(
        type(one) is float and 0 <= one < math.inf for one in tolerance.values()
    ):
        raise BundleError(
            f"{where}.tolerance: must be a number >= 0 for each file, got {tolerance!r:.200}", defect="bad_content"
        )

    def array(name: str, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
        file = f"{FOLDER}/{name}.npy"
        if digests is not None and file not in digests:
            raise BundleError(f"{SUMS}: lists no {file}: get the bundle again", defect="unlisted_file")
        return read_array(contained(folder, file), dtype, (len(values), *shape))

    images = array(IMAGES, np.uint8, image_size, image_size, 3)
    inputs = array(INPUTS, np.float32, 3, image_size, image_size)
    outputs = {name: array(name, np.float32, *output) for name in names}
    made_with = get({"made_with": {}} | listed, where, "made_with", dict)
    return Golden(images, inputs, truths, outputs, tolerance, made_with)


def check_inputs(golden: Golden, preprocess: Preprocess) -> None:
    """Raise BundleError where the golden images, normalized as the bundle says, are not the golden inputs."""
    if not np.array_equal(preprocess.normalize(golden.images), golden.inputs):
        raise BundleError(
            f"preprocess.json: mean and std: give other inputs than {FOLDER}/{INPUTS}.npy: get the bundle again",
            defect="preprocess_differs",
        )
