"""A bundle's decode.onnx, which turns a detector's outputs into boxes and scores."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from export.bundle.inside import Json, brief, check_listed, contained
from export.bundle.sandbox import require_sound
from export.errors import BundleError, ContentError
from export.names import DECODER, MANIFEST
from export.onnx_file.model_file import parse
from export.runtime.native import RUNTIME_ERRORS, first_line
from export.tasks.decoder import GIVES, Decoder

AGAIN = "get the bundle again"


def read_decoder(folder: Path, manifest: Json, digests: Mapping[str, str] | None, *, trusted: bool) -> Decoder:
    """Return the decoder that bundle.json names, run in the sandbox first unless it is `trusted`; BundleError if it is none."""
    if (file := manifest["decode"]) != DECODER or manifest["task"] != "detection":
        raise ContentError(f"{MANIFEST}: decode: must be {DECODER} of task detection, got {brief(file)}")
    if digests is not None:
        check_listed(digests, DECODER)
    path = contained(folder, DECODER)
    if not trusted:
        require_sound(path)
    names, found = tuple(one.name for one in parse(path).graph.output), Decoder(path.read_bytes())
    try:
        boxes, scores = found.run(np.zeros((1, *found.shape), np.float32))
    except RUNTIME_ERRORS as error:
        raise BundleError(
            f"{DECODER}: cannot decode outputs ({first_line(error)}): {AGAIN}", defect="cannot_run"
        ) from error
    if names != GIVES or boxes.shape != (*scores.shape[:2], 4) or scores.shape[2] != found.classes:
        raise BundleError(
            f"{DECODER}: must give boxes (n, rows, 4) and scores (n, rows, classes): {AGAIN}", defect="wrong_shape"
        )
    try:
        sound = found.limits.detections > 0
    except (KeyError, ValueError):
        sound = False
    if not sound:
        raise ContentError(f"{DECODER}: its metadata lack what counts as a detection: {AGAIN}")
    return found
