"""A bundle: one folder with everything a server needs to run the model, and digests that prove it is complete and unchanged.

bundle.json         what the model is, which file to serve (`served`), and each file's precision, digest and metrics
preprocess.json     how an image becomes the network's input
labels.txt          one class name per line, in the order of the outputs
validation.txt      the digest of each validation image, one per line: 64 bits of the SHA-256 of its file, or of the file that
                    `compress export-data` writes for an image without one (missing in older bundles)
NAME.onnx           the model files
decode.onnx         of a detector with a decoding graph: from the outputs of all model files to boxes and scores
golden/images.npy   uint8 or uint16 (n, height, width, channels): real validation images, resized and cropped
golden/inputs.npy   float32 (n, channels, height, width): the same images normalized, to the last bit
golden/NAME.npy     float32 (n, classes): the outputs of NAME.onnx where the bundle was made (several lie side by side, in the
                    order of bundle.json); `golden` in bundle.json has the images' labels and, for each file and each of several
                    outputs, the largest difference allowed on another machine
serving/            folders and requests for servers, made from the files above
README.md           the model card; recipe.yaml, environment.json, report.json, report/index.html, LICENSE, NOTICE: its origin
SHA256SUMS          the digest of every other file; `sha256sum -c SHA256SUMS` passes
model.sig           a signature over all files, if the bundle was signed; no digest covers it

A reader needs the files in the first seven lines and SHA256SUMS. The same inputs give the same bytes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from export.bundle.decoder import read_decoder
from export.bundle.ends import OF_SEVERAL, SCHEMA_VERSION, check_ends, outputs_of, served_of
from export.bundle.golden import Golden, check_inputs, read_golden
from export.bundle.inside import (
    Json,
    brief,
    check_digest,
    check_listed,
    contained,
    get,
    is_number,
    read_json,
    read_sums,
    read_text,
)
from export.command.files import sha256
from export.errors import BundleError, ContentError, DataError
from export.images.listing import LONGEST_NAME, is_label
from export.images.preprocess import (
    AS_STORED,
    BGR,
    BINARY,
    INTERPOLATIONS,
    KEPT,
    LETTERBOXES,
    UPRIGHT,
    Look,
    Preprocess,
)
from export.images.read import Examples
from export.images.size import Size, said
from export.names import LABELS, MANIFEST, PREPROCESS, VALIDATION
from export.onnx_file.model_file import CHANNELS, MAX_IMAGE_SIZE, ModelFile, inspect
from export.onnx_file.outputs import Output
from export.onnx_file.roles import TEACHER
from export.runtime.accuracy import predictions_of
from export.tasks import task_named
from export.tasks.task import OutputTask

MAX_MODELS = 100
NAME = re.compile(r"[a-z0-9][a-z0-9_\-]{0,63}")
MAX_INDEX = 65_535  # largest pixel value of a mask file
LARGEST = 1e6  # for the mean and standard deviation of pixels in [0, 1]; float32 can hold its square and inverse

Kind = TypeVar("Kind")
Given = ParamSpec("Given")
Report = Callable[[BundleError], None]
Inspect = Callable[[Sequence[Path]], Sequence[ModelFile | BundleError]]
"""Returns each model file's facts, or the error."""


@dataclass(frozen=True)
class Bundle:
    """A checked bundle; `files` are the models by name, `served` is the name of the one to serve.

    `validation` has the digests of the validation images; empty in older bundles.
    """

    path: Path
    name: str
    task: OutputTask
    target: str | None
    preprocess: Preprocess
    labels: tuple[str, ...]
    files: dict[str, Path]
    served: str
    golden: Golden
    manifest: Json
    validation: tuple[str, ...]
    outputs: tuple[Output, ...]  # empty for a single one

    def examples(self, data: Path) -> Examples:
        """Return the images of `data` with their truths, to score the files on; without labels the bundle's teacher predicts them.

        Raises DataError if they do not fit the bundle.
        """
        found = self.task.examples(data, self.preprocess, self.labels)
        found = found.judged(self.validation) if self.validation else found
        return found if self.task.labelled or (found.truths >= 0).all() else self._taught(found, data)

    def _taught(self, images: Examples, data: Path) -> Examples:
        """Return the images with the truths that the bundle's teacher predicts."""
        if TEACHER not in self.files:
            raise DataError(
                f"{data}: nobody labelled its images and the bundle has no {TEACHER}: give what `compress export-data` writes"
            )
        predict = predictions_of(self.files[TEACHER], self.task)
        note = f"the truths are what {TEACHER} of this bundle predicts"
        return replace(images, taught=lambda batch: self.task.taught(predict(batch)), notes=(*images.notes, note))

    def file(self, name: str | None) -> Path:
        """Return the path of the file `name`, or of the one to serve; raise BundleError for an unknown name."""
        if name is not None and name not in self.files:
            raise BundleError(f"--file: the bundle has {', '.join(self.files)}, got {name!r}: name one of them")
        return self.files[name or self.served]


def entry(path: Path, facts: ModelFile) -> Json:
    """Return bundle.json's entry for one model file, without metrics."""
    return {
        "file": path.name,
        "precision": facts.precision,
        "sha256": sha256(path),
        "bytes": facts.bytes,
        "opset": facts.opset,
        "ir_version": facts.ir_version,
    }


def inspect_here(paths: Sequence[Path]) -> list[ModelFile | BundleError]:
    """Inspect trusted files in this process; use `export.bundle.sandbox.vet` for untrusted ones."""
    found: list[ModelFile | BundleError] = []
    for path in paths:
        facts = tried(found.append, inspect, path)
        found.extend([] if facts is None else [facts])
    return found


def read_bundle(path: Path, *, inspect: Inspect = inspect_here) -> Bundle:
    """Return the bundle in the folder `path` after checking every digest, every name and every model file's facts.

    Reads nothing outside the folder and follows no links. Pass `export.bundle.sandbox.vet` as `inspect` if the bundle is
    untrusted. Raises BundleError, naming the file, for the first problem.
    """

    def refuse(error: BundleError) -> None:
        raise error

    bundle = examine(path, amiss=refuse, inspect=inspect)
    assert bundle is not None, "a problem that prevents reading was raised"
    return bundle


def examine(path: Path, *, amiss: Report, inspect: Inspect) -> Bundle | None:
    """Return the bundle as far as it is sound, or None if too little is; every problem goes to `amiss`, which may raise."""
    if not path.is_dir():
        amiss(BundleError(f"{path}: is not a folder: give a run's bundle, runs/NAME/bundle"))
        return None
    digests = tried(amiss, read_sums, path)
    if digests is not None:
        for name, digest in digests.items():
            tried(amiss, check_digest, path, name, digest)
        tried(amiss, check_listed, digests, MANIFEST, PREPROCESS, LABELS)
    manifest = tried(amiss, read_manifest, path)
    preprocess = tried(amiss, read_preprocess, path)
    labels = tried(amiss, read_labels, path)
    validation = tried(amiss, read_validation, path, digests)
    if manifest is None:
        return None
    outputs = tried(amiss, outputs_of, manifest)
    if outputs is None:
        return None
    decoder = (
        tried(amiss, read_decoder, path, manifest, digests, trusted=inspect is inspect_here)
        if "decode" in manifest
        else None
    )
    if decoder is None and "decode" in manifest:
        return None
    task = task_named(get(manifest, MANIFEST, "task", str), outputs, decoder)
    listed = get(manifest, MANIFEST, "files", dict)
    places = {name: tried(amiss, place_of, path, name, document, digests) for name, document in listed.items()}
    files = {name: place for name, place in places.items() if place is not None}
    shape: tuple[int, ...] | None = None  # of one image's output
    for (name, place), facts in zip(list(files.items()), inspect(list(files.values())), strict=True):
        if isinstance(facts, BundleError):
            amiss(facts)
            del files[name]
            continue
        tried(amiss, check_entry, name, listed[name], entry(place, facts))
        tried(amiss, check_ends, manifest, place.name, facts)
        shape = tuple(size or 0 for size in facts.output_shape[1:])
        if preprocess is not None:
            tried(amiss, check_shape, place.name, facts, preprocess)
        if labels is not None:
            tried(amiss, task.check_output, place.name, facts.output_shape, labels)
    served = tried(amiss, served_of, manifest)
    if preprocess is None or labels is None or shape is None:
        return None
    golden = tried(
        amiss, read_golden, path, manifest, digests, task, preprocess=preprocess, output=shape, outputs=outputs
    )
    if golden is not None:
        tried(amiss, check_inputs, golden, preprocess)
    if served is None or golden is None:
        return None
    target = manifest.get("target")
    return Bundle(
        path=path,
        name=get(manifest, MANIFEST, "name", str),
        task=task,
        target=target if isinstance(target, str) else None,
        preprocess=preprocess,
        labels=labels,
        files=files,
        served=served,
        golden=golden,
        manifest=manifest,
        validation=validation or (),
        outputs=outputs,
    )


def tried(amiss: Report, read: Callable[Given, Kind], *args: Given.args, **kwargs: Given.kwargs) -> Kind | None:
    """Return the result of `read`; if it raises BundleError, pass that to `amiss` and return None."""
    try:
        return read(*args, **kwargs)
    except BundleError as error:
        amiss(error)
        return None


def place_of(folder: Path, name: str, listed: object, digests: Mapping[str, str] | None) -> Path:
    """Return the path of a model that bundle.json lists."""
    where = f"{MANIFEST}: files.{name}"
    if not NAME.fullmatch(name) or not isinstance(listed, dict):
        raise ContentError(f"{where}: must be a plain name with an object, got {brief(listed)}")
    file = get(listed, where, "file", str)
    path = contained(folder, file)
    if digests is not None:
        check_listed(digests, file)
    return path


def check_entry(name: str, listed: Json, expected: Json) -> None:
    """Raise BundleError if bundle.json's entry for a model differs from the file's facts."""
    if wrong := [key for key in expected if listed.get(key) != expected[key]]:
        key = wrong[0]
        raise BundleError(
            f"{MANIFEST}: files.{name}.{key}: {expected['file']} has {expected[key]!r}, got {brief(listed.get(key))}: "
            "get the bundle again",
            defect="wrong_facts",
        )


def check_shape(file: str, facts: ModelFile, preprocess: Preprocess) -> None:
    """Raise BundleError if images are cropped to another size than the model's input."""
    (channels, *size), (given, *cropped) = facts.shape, preprocess.shape
    if size != cropped:
        raise BundleError(
            f"{PREPROCESS}: image_size: {file} takes {said(size)}, got {said(cropped)}: get the bundle again",
            defect="preprocess_differs",
        )
    if channels != given:
        raise BundleError(
            f"{PREPROCESS}: mean: {file} takes {channels} channels, got numbers for {given}: get the bundle again",
            defect="preprocess_differs",
        )


def read_manifest(folder: Path) -> Json:
    """Return bundle.json after checking the fields that every reader needs."""
    manifest = read_json(folder, MANIFEST)
    if (version := get(manifest, MANIFEST, "schema_version", int)) not in (SCHEMA_VERSION, OF_SEVERAL):
        raise ContentError(
            f"{MANIFEST}: schema_version: must be {SCHEMA_VERSION} or {OF_SEVERAL}, got {brief(version)}"
        )
    task_named(get(manifest, MANIFEST, "task", str))
    if not NAME.fullmatch(name := get(manifest, MANIFEST, "name", str)):
        raise ContentError(f"{MANIFEST}: name: must be lower-case letters, digits, - and _, got {brief(name)}")
    if not 0 < (count := len(get(manifest, MANIFEST, "files", dict))) <= MAX_MODELS:
        raise ContentError(f"{MANIFEST}: files: must name 1 to {MAX_MODELS} models, got {count}")
    return manifest


def read_labels(folder: Path) -> tuple[str, ...]:
    """Return labels.txt's lines."""
    labels = read_text(folder, LABELS).removesuffix("\n").split("\n")
    if bad := [label for label in labels if not is_label(label) or len(label) > LONGEST_NAME]:
        raise ContentError(
            f"{LABELS}: must be one printable name of at most {LONGEST_NAME} characters per line, got {brief(bad[0])}: get the bundle again"
        )
    return tuple(labels)


def read_validation(folder: Path, digests: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return validation.txt's lines; empty for an older bundle."""
    if not (folder / VALIDATION).exists() and VALIDATION not in (digests or ()):
        return ()
    if digests is not None:
        check_listed(digests, VALIDATION)
    lines = read_text(folder, VALIDATION).splitlines()
    if bad := [line for line in lines if not re.fullmatch("[0-9a-f]{16}", line)]:
        raise ContentError(
            f"{VALIDATION}: must be 16 hexadecimal digits per line, got {brief(bad[0])}: get the bundle again"
        )
    return tuple(lines)


def read_preprocess(folder: Path) -> Preprocess:
    """Return preprocess.json's content, checked."""
    return preprocess_of(read_json(folder, PREPROCESS))


def preprocess_of(document: Mapping[str, object]) -> Preprocess:
    """Return the content of a preprocess.json, checked."""
    size, resize_to = (_size(document, key) for key in ("image_size", "resize_to"))
    if not all(0 < side <= resized <= MAX_IMAGE_SIZE for side, resized in zip(size, resize_to, strict=True)):
        raise ContentError(
            f"{PREPROCESS}: resize_to: must be >= image_size ({said(size)}) and at most {MAX_IMAGE_SIZE}, "
            f"got {said(resize_to)}"
        )
    numbers = {key: get(document, PREPROCESS, key, list) for key in ("mean", "std")}
    for key, lowest in (("mean", -LARGEST), ("std", 1 / LARGEST)):
        fits = len(numbers[key]) in CHANNELS and len(numbers[key]) == len(numbers["mean"])
        if not fits or not all(is_number(one) and lowest <= one <= LARGEST for one in numbers[key]):
            raise ContentError(
                f"{PREPROCESS}: {key}: must be a number for each of 1, 3 or 4 channels from {lowest:g} to {LARGEST:g}, got {numbers[key]!r:.100}"
            )
    if (orientation := document.get("orientation", AS_STORED)) not in (UPRIGHT, AS_STORED):
        raise ContentError(f"{PREPROCESS}: orientation: must be {UPRIGHT!r} or {AS_STORED!r}, got {brief(orientation)}")
    ignore = document.get("ignore_index")
    if ignore is not None and not (type(ignore) is int and 0 <= ignore <= MAX_INDEX):
        raise ContentError(f"{PREPROCESS}: ignore_index: must be an integer from 0 to {MAX_INDEX}, got {brief(ignore)}")
    if (values := document.get("mask_values")) not in (None, BINARY):
        raise ContentError(f"{PREPROCESS}: mask_values: must be {BINARY} or missing, got {brief(values)}")
    mean, std = (tuple(map(float, numbers[key])) for key in ("mean", "std"))
    look: dict[str, Any] = {
        "letterbox": LETTERBOXES[0],
        "interpolation": next(iter(INTERPOLATIONS)),
        "pad_value": Look.pad_value,
    }
    look |= {key: document[key] for key in look if key in document}
    for key, known in (("letterbox", LETTERBOXES), ("interpolation", [*INTERPOLATIONS]), ("pad_value", range(256))):
        if look[key] not in known:
            raise ContentError(f"{PREPROCESS}: {key}: must be one of {brief(list(known))}, got {brief(look[key])}")
    return Preprocess(
        size,
        resize_to,
        mean,
        std,
        upright=orientation == UPRIGHT,
        ignore_index=ignore,
        stretch=document.get("crop") == "none" and look["letterbox"] == "none",
        bits=16 if document.get("sixteen_bits") == KEPT else 8,
        binary_masks=values is not None,
        look=Look(
            look["letterbox"],
            look["pad_value"],
            *INTERPOLATIONS[look["interpolation"]],
            bgr=document.get("color") == BGR,
        ),
    )


def _size(document: Mapping[str, object], key: str) -> Size:
    """Return a size of preprocess.json: one number, or height and width."""
    sides = document.get(key)
    if isinstance(sides, list) and len(sides) == 2 and all(type(side) is int for side in sides):
        return sides[0], sides[1]
    side = get(document, PREPROCESS, key, int)
    return side, side
