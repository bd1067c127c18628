"""Golden inputs and outputs: real images, the network's inputs for them, and every file's outputs where the bundle was made.

The inputs are equal to the last bit on every machine, since normalizing is a chain of single IEEE operations. The outputs are
equal to the last bit only with the ONNX Runtime and processor of bundle.json's `golden.made_with`, on one thread, one image at
a time. Elsewhere kernels sum in another order, and ties between levels may round the other way; so each file has a tolerance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray

from export.bundle.inside import Json, contained, get
from export.errors import BundleError, ContentError
from export.images.preprocess import Preprocess
from export.names import MANIFEST, SUMS
from export.onnx_file.outputs import Output, columns, matched
from export.onnx_file.rounding import rounded, rounded_values
from export.runtime.environment import runtime
from export.runtime.providers import PLAIN, Runtime
from export.runtime.session import infer, open_session
from export.tasks.task import OutputTask

FOLDER, IMAGES, INPUTS = "golden", "images", "inputs"
MAX_GOLDEN = 64  # images
# The largest allowed difference of an output value, in standard deviations of the expected values. Largest seen on 1,000 photographs and
# 897 digits in ONNX Runtime 1.15 to 1.32 on x86-64, aarch64 and WebAssembly, and in OpenVINO: fp32 1e-6, fp16 0.05 (Arm), int8 0.13.
WIDEST = {"fp32": 1e-3, "fp16": 0.1, "int8": 0.25}
# For INT8 also in changes by noise of half a pixel's level, which rounds about as many values the other way as another runtime does: on
# 897 digits and two networks OpenVINO's largest difference was 0.7 to 1.4 times the largest change of NOISY images.
CHANGES, NOISY = 2, 32
# In bf16 and TF32 also in changes by rounding the file's constants and inputs to it, computed in the CPU provider's f32: activations round as
# often, by as much (docs/decisions.md).
COARSE = 1.0  # the most that is allowed there

Tolerance = dict[str, float]
"""The largest allowed difference of a value of each output by its name; of a network with one output by ""."""


@dataclass(frozen=True)
class Golden:
    """The golden arrays; `outputs` and `tolerance` (largest difference of a value) are by file, `made_with` is their runtime.

    Several outputs lie side by side, and each has its own tolerance.
    """

    images: NDArray[Any]  # uint8 or uint16 (n, height, width, channels), resized and cropped
    inputs: NDArray[np.float32]  # (n, channels, height, width), the images normalized
    truths: NDArray[Any]  # (n, ...)
    outputs: dict[str, NDArray[np.float32]]  # (n, ...) each
    tolerance: dict[str, Tolerance]
    made_with: Json  # empty in older bundles
    several: tuple[Output, ...] = ()
    elsewhere: dict[str, dict[str, Tolerance]] = field(default_factory=dict)  # by runtime, then file

    def differing(self, name: str, outputs: NDArray[np.generic], allowed: Tolerance | None = None) -> list[int]:
        """Return the indices of images whose `outputs` (n, ...) differ from a file's by more than `allowed`, by default its tolerance."""
        allowed = self.tolerance[name] if allowed is None else allowed
        apart = distances(outputs.astype(np.float64), self.outputs[name], self.several)
        sound = [largest(part) <= allowed[one] for one, part in apart.items()]  # NaN differs
        return [int(index) for index in np.flatnonzero(~np.all(sound, axis=0))]


def largest(differences: NDArray[Any]) -> NDArray[Any]:
    """Return each image's largest value, (n,)."""
    return np.asarray(differences.reshape(len(differences), -1).max(axis=1))


def outputs_of(model: Path | bytes, inputs: NDArray[np.float32], runs_in: Runtime = PLAIN) -> NDArray[np.float32]:
    """Return a file's outputs (n, ...) for `inputs` (n, channels, height, width), one image at a time on one CPU thread."""
    session = open_session(model, threads=1, runs_in=runs_in)
    return np.concatenate([infer(session, image[None]) for image in inputs]).astype(np.float32)


def tolerance_of(
    path: Path,
    precision: str,
    inputs: NDArray[np.float32],
    outputs: NDArray[np.float32],
    preprocess: Preprocess,
    several: Sequence[Output] = (),
    runs_in: Runtime = PLAIN,
) -> Tolerance:
    """Return by how much a value of each of a file's outputs may differ in a provider of another correct machine.

    `outputs` are this machine's CPU provider's for `inputs`.
    """
    spreads = {name: spread(part) for name, part in parts(outputs, several).items()}
    if runs_in.bits < PLAIN.bits:
        coarse = outputs_of(
            rounded(onnx.load(path), runs_in.bits).SerializeToString(), rounded_values(inputs, runs_in.bits)
        )
        own = tolerance_of(path, precision, inputs, outputs, preprocess, several)
        moved = {name: float(change.max()) for name, change in distances(coarse, outputs, several).items()}
        return {name: max(own[name], min(COARSE * spreads[name], CHANGES * moved[name])) for name in own}
    most = {name: WIDEST[precision] * deviation for name, deviation in spreads.items()}
    if precision != "int8":
        return most
    level = 1 / (255 * np.array(preprocess.std)[:, None, None])  # (channels, 1, 1)
    random, moved = np.random.default_rng(0), dict.fromkeys(spreads, 0.0)
    for _ in range(-(-NOISY // len(inputs))):
        noisy = inputs + random.uniform(-0.5, 0.5, inputs.shape) * level
        changes = distances(outputs_of(path, noisy.astype(np.float32)), outputs, several)
        moved = {name: max(moved[name], float(change.max())) for name, change in changes.items()}
    return {
        name: min(most[name], max(CHANGES * moved[name], WIDEST["fp32"] * deviation))
        for name, deviation in spreads.items()
    }


def parts(array: NDArray[Any], several: Sequence[Output]) -> Mapping[str, NDArray[Any]]:
    """Return the columns of each output; a single one's name is ""."""
    return {name: array[:, place] for name, place in columns(several).items()} if several else {"": array}


def distances(outputs: NDArray[Any], expected: NDArray[Any], several: Sequence[Output]) -> Mapping[str, NDArray[Any]]:
    """Return each output's distances from the expected values, of sets after matching."""
    return parts(np.abs(matched(outputs, expected, several) - expected), several)


def spread(outputs: NDArray[np.float32]) -> float:
    """Return the standard deviation of the values that vary from image to image: a detector's outputs contain constants."""
    varying = outputs[:, (outputs != outputs[:1]).any(axis=0)]
    return float((varying if varying.size else outputs).std())


def make_golden(
    files: Mapping[str, tuple[Path, str]],
    images: NDArray[Any],
    inputs: NDArray[np.float32],
    truths: NDArray[Any],
    preprocess: Preprocess,
    elsewhere: Sequence[Runtime] = (),
    several: Sequence[Output] = (),
) -> Golden:
    """Return the golden arrays of `files` (name to path and precision), run on this machine.

    Also runs them `elsewhere`, for tolerances as tight as the distances that are found there; none where the outputs are too far away.

    Raises BundleError if an output is not finite.
    """
    outputs = {name: outputs_of(path, inputs) for name, (path, _) in files.items()}
    for name, logits in outputs.items():
        if not np.isfinite(logits).all():
            raise BundleError(f"{name}: its outputs for a golden image are not finite: export it again")
    tolerance = {
        name: tolerance_of(path, kind, inputs, outputs[name], preprocess, several)
        for name, (path, kind) in files.items()
    }
    found: dict[str, dict[str, Tolerance]] = {}
    for runs_in in elsewhere:
        for name, (path, kind) in files.items():
            found_there = distances(outputs_of(path, inputs, runs_in), outputs[name], several)
            apart = {one: float(distance.max()) for one, distance in found_there.items()}
            most = tolerance_of(path, kind, inputs, outputs[name], preprocess, several, runs_in)
            if all(apart[one] <= most[one] for one in most):
                wanted = {one: min(most[one], max(tolerance[name][one], CHANGES * apart[one])) for one in most}
                found.setdefault(runs_in.key, {})[name] = _short(wanted)
    short = {name: _short(value) for name, value in tolerance.items()}
    return Golden(images, inputs, truths, outputs, short, runtime(), tuple(several), found)


def _short(values: Tolerance) -> Tolerance:
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def tolerances_json(tolerances: Mapping[str, Tolerance]) -> Mapping[str, float | Tolerance]:
    """Return tolerances by file as JSON values: a number where there is one output."""
    return {name: one.get("", one) for name, one in tolerances.items()}


def write_arrays(folder: Path, golden: Golden) -> None:
    """Write each array as a .npy file."""
    (folder / FOLDER).mkdir()
    arrays: dict[str, NDArray[Any]] = {IMAGES: golden.images, INPUTS: golden.inputs, **golden.outputs}
    for name, array in arrays.items():
        (folder / FOLDER / f"{name}.npy").write_bytes(npy_header(array.dtype, array.shape) + array.tobytes())


def read_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Return the array of a .npy file that must have exactly this type and shape.

    Nothing is parsed: with damaged files, numpy's reader raises many kinds of errors, or fills the memory.
    Raises BundleError for any other file, before allocating more than the file's size.
    """
    header, size = npy_header(dtype, shape), np.dtype(dtype).itemsize * math.prod(shape)
    if path.stat().st_size != len(header) + size or not (data := path.read_bytes()).startswith(header):
        raise ContentError(
            f"{path.name}: must be a .npy file of {np.dtype(dtype)} {shape} and nothing else: get the bundle again"
        )
    return np.frombuffer(data, dtype, offset=len(header)).reshape(shape)


def npy_header(dtype: DTypeLike, shape: tuple[int, ...]) -> bytes:
    """Return the header of numpy's format version 1.0, the same with every version of numpy."""
    kind = np.dtype(dtype).newbyteorder("<").str
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    padded = text.ljust(-(-(len(text) + 11) // 64) * 64 - 11) + "\n"  # after ten bytes of magic and length
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode()


def read_golden(
    folder: Path,
    manifest: Json,
    digests: Mapping[str, str] | None,
    task: OutputTask,
    *,
    preprocess: Preprocess,
    output: tuple[int, ...],
    outputs: tuple[Output, ...],
) -> Golden:
    """Return the golden arrays, whose shapes follow from the manifest and the models."""
    listed, where = get(manifest, MANIFEST, "golden", dict), "bundle.json: golden"
    names = list(get(manifest, MANIFEST, "files", dict))
    values, stated = get(listed, where, "truths", list), get(listed, where, "tolerance", dict)
    if not 0 < len(values) <= MAX_GOLDEN:
        raise ContentError(f"{where}.truths: must be of 1 to {MAX_GOLDEN} images, got {len(values)}")
    truths = task.truths(values, output)
    elsewhere = get({"elsewhere": {}} | listed, where, "elsewhere", dict)
    wanted = {one.name for one in outputs} or {""}

    def tolerances(given: object, *, of_all: bool) -> dict[str, Tolerance]:
        by_file: dict[str, Any] = given if isinstance(given, dict) else {"": given}
        found = by_file if outputs else {name: {"": value} for name, value in by_file.items()}
        if not (set(found) == set(names) if of_all else isinstance(given, dict)) or not all(
            isinstance(one, dict)
            and set(one) == wanted
            and all(type(value) is float and 0 <= value < math.inf for value in one.values())
            for one in found.values()
        ):
            raise ContentError(
                f"{where}.tolerance: must be a number >= 0 for each file{' and output' * bool(outputs)}, got {given!r:.200}"
            )
        return found

    def array(name: str, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
        file = f"{FOLDER}/{name}.npy"
        if digests is not None and file not in digests:
            raise BundleError(f"{SUMS}: lists no {file}: get the bundle again", defect="unlisted_file")
        return read_array(contained(folder, file), dtype, (len(values), *shape))

    channels, height, width = preprocess.shape
    images = array(IMAGES, preprocess.pixel.dtype, height, width, channels)
    inputs = array(INPUTS, np.float32, channels, height, width)
    found = {name: array(name, np.float32, *output) for name in names}
    made_with = get({"made_with": {}} | listed, where, "made_with", dict)
    return Golden(
        images,
        inputs,
        truths,
        found,
        tolerances(stated, of_all=True),
        made_with,
        outputs,
        {place: tolerances(given, of_all=False) for place, given in elsewhere.items()},
    )


def check_inputs(golden: Golden, preprocess: Preprocess) -> None:
    """Raise BundleError if normalizing the golden images as preprocess.json says does not give the golden inputs."""
    if not np.array_equal(preprocess.normalize(golden.images), golden.inputs):
        raise BundleError(
            f"preprocess.json: mean and std: do not give the inputs in {FOLDER}/{INPUTS}.npy: get the bundle again",
            defect="preprocess_differs",
        )
