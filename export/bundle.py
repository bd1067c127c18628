"""A bundle: one folder with everything a server needs to run the model, and the digests that prove it whole.

bundle.json         what the model is, which file to serve (`served`), and each file's precision, digest and metrics
preprocess.json     how an image becomes the network's input
labels.txt          one class name a line, in the order of the outputs
NAME.onnx           the model files
golden/images.npy   uint8 (n, size, size, 3): real validation images, resized and cropped
golden/inputs.npy   float32 (n, 3, size, size): the same normalized, to the last bit
golden/NAME.npy     float32 (n, classes): what NAME.onnx answered where the bundle was made; `golden` in bundle.json has the
                    images' labels and, for each file, the largest difference that another machine's logits may show
serving/            folders and requests for servers, made of the files above
README.md           the model card; recipe.yaml, environment.json, report.json, report/index.html, LICENSE, NOTICE: where it is from
SHA256SUMS          the digest of every other file; `sha256sum -c SHA256SUMS` passes
model.sig           a signature over all files, where the bundle was signed; no digest covers it

A reader needs the first seven lines and SHA256SUMS. The same inputs give the same bytes.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from export.errors import BundleError
from export.golden import FOLDER, IMAGES, INPUTS, Golden, read_array
from export.images import Preprocess
from export.model_file import ModelFile, inspect

MANIFEST, PREPROCESS, LABELS, SUMS = "bundle.json", "preprocess.json", "labels.txt", "SHA256SUMS"
SIGNATURE = "model.sig"
SCHEMA_VERSION = 2
MAX_TEXT_BYTES = 16 * 2**20
MAX_GOLDEN = 64  # images
NAME = re.compile(r"[a-z0-9][a-z0-9_\-]{0,63}")
SUMS_LINE = re.compile(r"([0-9a-f]{64})  (.+)")

Json = dict[str, object]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Bundle:
    """A bundle that was found whole; `files` are the models by name, `served` is the name of the one to serve."""

    path: Path
    name: str
    target: str | None
    preprocess: Preprocess
    labels: tuple[str, ...]
    files: dict[str, Path]
    served: str
    golden: Golden
    manifest: Json


def entry(path: Path, facts: ModelFile) -> Json:
    """Return what bundle.json says of one model file, before its metrics."""
    return {
        "file": path.name,
        "precision": facts.precision,
        "sha256": sha256(path),
        "bytes": facts.bytes,
        "opset": facts.opset,
        "ir_version": facts.ir_version,
    }


def read_bundle(path: Path) -> Bundle:
    """Return the bundle in the folder `path` after checking every digest, every name and every model file's facts.

    Reads nothing outside the folder and follows no link in it. Raises BundleError, naming the file, for anything amiss.
    """
    if not path.is_dir():
        raise BundleError(f"{path}: is no folder: give the bundle that a run left in runs/NAME/bundle")
    digests = read_sums(path)
    for name, digest in digests.items():
        if sha256(contained(path, name)) != digest:
            raise BundleError(
                f"{name}: is not the file the bundle was made with (SHA-256 differs): get the bundle again"
            )
    if missing := {MANIFEST, PREPROCESS, LABELS} - digests.keys():
        raise BundleError(f"{SUMS}: lists no {', '.join(sorted(missing))}: get the bundle again")
    manifest = read_json(path, MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST}: schema_version: must be {SCHEMA_VERSION}, got {manifest.get('schema_version')!r}"
        )
    preprocess = read_preprocess(path)
    labels = tuple(read_text(path, LABELS).splitlines())
    files = {
        name: check_model(path, name, listed, digests, preprocess=preprocess, classes=len(labels))
        for name, listed in get(manifest, MANIFEST, "files", dict).items()
    }
    if not files:
        raise BundleError(f"{MANIFEST}: files: must name at least one model")
    served = get(manifest, MANIFEST, "served", str)
    if served not in files:
        raise BundleError(
            f"{MANIFEST}: served: must be one of {', '.join(files)}, got {served!r}: get the bundle again"
        )
    name = get(manifest, MANIFEST, "name", str)
    if not NAME.fullmatch(name):
        raise BundleError(f"{MANIFEST}: name: must be lower-case letters, digits, - and _, got {name[:100]!r}")
    target = manifest.get("target")
    return Bundle(
        path=path,
        name=name,
        target=target if isinstance(target, str) else None,
        preprocess=preprocess,
        labels=labels,
        files=files,
        served=served,
        golden=read_golden(path, manifest, digests, names=list(files), preprocess=preprocess, classes=len(labels)),
        manifest=manifest,
    )


def check_model(
    folder: Path, name: str, listed: object, digests: Mapping[str, str], *, preprocess: Preprocess, classes: int
) -> Path:
    """Return the path of one listed model after comparing it with its entry, the preprocessing and the labels."""
    where = f"{MANIFEST}: files.{name}"
    if not NAME.fullmatch(name) or not isinstance(listed, dict):
        raise BundleError(f"{where}: must be a plain name with an object, got {listed!r}")
    file = get(listed, where, "file", str)
    path = contained(folder, file)
    facts = inspect(path)
    expected = entry(path, facts)
    if wrong := [key for key in expected if listed.get(key) != expected[key]]:
        raise BundleError(
            f"{where}.{wrong[0]}: {file} has {expected[wrong[0]]!r}, got {listed.get(wrong[0])!r}: get the bundle again"
        )
    if file not in digests:
        raise BundleError(f"{SUMS}: lists no {file}: get the bundle again")
    if facts.image_size != preprocess.image_size:
        raise BundleError(
            f"{PREPROCESS}: image_size: {file} takes {facts.image_size}, got {preprocess.image_size}: get the bundle again"
        )
    if facts.output.shape[1:2] != (classes,):
        raise BundleError(f"{LABELS}: {file} answers {facts.output.shape}, got {classes} labels: get the bundle again")
    return path


def read_golden(
    folder: Path,
    manifest: Json,
    digests: Mapping[str, str],
    *,
    names: Sequence[str],
    preprocess: Preprocess,
    classes: int,
) -> Golden:
    """Return the golden arrays, whose shapes the manifest and the models leave no choice in, and whose inputs are the images'."""
    listed, where = get(manifest, MANIFEST, "golden", dict), f"{MANIFEST}: golden"
    labels, tolerance = get(listed, where, "labels", list), get(listed, where, "tolerance", dict)
    if not 0 < len(labels) <= MAX_GOLDEN or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise BundleError(f"{where}.labels: must be 1 to {MAX_GOLDEN} integers below {classes}, got {labels[:9]!r}")
    if set(tolerance) != set(names) or not all(
        type(one) is float and 0 <= one < math.inf for one in tolerance.values()
    ):
        raise BundleError(f"{where}.tolerance: must be a number >= 0 for each file, got {str(tolerance)[:200]}")

    def array(name: str, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
        file = f"{FOLDER}/{name}.npy"
        if file not in digests:
            raise BundleError(f"{SUMS}: lists no {file}: get the bundle again")
        return read_array(contained(folder, file), dtype, (len(labels), *shape))

    size = preprocess.image_size
    images, inputs = array(IMAGES, np.uint8, size, size, 3), array(INPUTS, np.float32, 3, size, size)
    if not np.array_equal(preprocess.normalize(images), inputs):
        raise BundleError(
            f"{PREPROCESS}: mean and std: give other inputs than {FOLDER}/{INPUTS}.npy: get the bundle again"
        )
    outputs = {name: array(name, np.float32, classes) for name in names}
    return Golden(images, inputs, np.array(labels, np.int64), outputs, tolerance)


def read_sums(folder: Path) -> dict[str, str]:
    """Return SHA256SUMS as name to digest."""
    digests: dict[str, str] = {}
    for line in read_text(folder, SUMS).splitlines():
        found = SUMS_LINE.fullmatch(line)
        if not found or found[2] in digests:
            raise BundleError(f"{SUMS}: must hold one digest and one name a line, once each, got {line[:100]!r}")
        digests[found[2]] = found[1]
    return digests


def read_preprocess(folder: Path) -> Preprocess:
    """Return preprocess.json's numbers, checked."""
    return preprocess_of(read_json(folder, PREPROCESS))


def preprocess_of(document: Mapping[str, object]) -> Preprocess:
    """Return the numbers of preprocess.json's content, checked."""
    size, resize_to = get(document, PREPROCESS, "image_size", int), get(document, PREPROCESS, "resize_to", int)
    if not 0 < size <= resize_to:
        raise BundleError(f"{PREPROCESS}: resize_to: must be >= image_size ({size}), got {resize_to}")
    mean, std = (get(document, PREPROCESS, key, list) for key in ("mean", "std"))
    for key, numbers in (("mean", mean), ("std", std)):
        lowest = 0 if key == "std" else -math.inf
        if len(numbers) != 3 or not all(isinstance(one, int | float) and lowest < one < math.inf for one in numbers):
            raise BundleError(f"{PREPROCESS}: {key}: must be three numbers (std > 0), got {numbers!r}")
    return Preprocess(size, resize_to, tuple(mean), tuple(std))


def contained(folder: Path, name: str) -> Path:
    """Return the regular file `name` in `folder`; raise BundleError for a path that leaves it and for links."""
    parts = PurePosixPath(name).parts
    if not name.isprintable() or "\\" in name or not parts or parts[0] == "/" or ".." in parts:
        raise BundleError(f"{name!r}: must be a file inside the bundle")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{name}: must be a file of its own, not a link: get the bundle again")
    if not path.is_file():
        raise BundleError(f"{name}: is missing: get the bundle again")
    return path


def read_text(folder: Path, name: str) -> str:
    """Return a small text file of the bundle."""
    path = contained(folder, name)
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise BundleError(f"{name}: must be at most {MAX_TEXT_BYTES} bytes, got {path.stat().st_size}")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{name}: must be UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(folder: Path, name: str) -> Json:
    """Return the JSON object in a file of the bundle."""
    try:
        document = json.loads(read_text(folder, name))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: must be JSON ({error})") from error
    if not isinstance(document, dict):
        raise BundleError(f"{name}: must be a JSON object")
    return document


def get(document: Mapping[str, object], where: str, key: str, kind: type[Kind]) -> Kind:
    """Return a value of the wanted type."""
    value = document.get(key)
    if not isinstance(value, kind):
        raise BundleError(f"{where}: {key}: must be {kind.__name__}, got {value!r}")
    return value


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
