"""A recipe for a detector of another kind than the built-in ones: which decode, and which preprocessing, give the highest mAP."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from compress.data.teachers import foreign
from compress.errors import CompressError
from compress.models.decodes import DECODES
from compress.models.foreign import OnnxFile
from compress.recipe import strict_yaml
from compress.recipe.read import read_recipe
from compress.run import open_run
from compress.tasks import evaluate
from export.command.files import write_text
from export.errors import BundleError, DataError
from export.images.size import Written, written
from export.tasks import TASKS

IMAGES = 32  # on which each way is scored
GOOD = 0.3  # mAP that needs no further trial
# How such detectors are trained: YOLO, YOLOX, DETR's descendants.
WAYS: Sequence[Mapping[str, str]] = (
    {"framing": "letterbox", "pixels": "unit"},
    {"framing": "letterbox_corner", "pixels": "bytes", "colors": "bgr"},
    {"framing": "stretch", "pixels": "normalized"},
    {"framing": "stretch", "pixels": "unit"},
)
STAGES = """\
stages:
  - stage: source
  - stage: prune  # and solve the weights to make up for it, without training
    keep_macs: 0.5
  - stage: distill  # on the network's own boxes and scores, without labels
    fit: {epochs: 20, batch_size: 16, optimizer: adamw, lr: 0.001, warmup_epochs: 1}
    loss: [{name: kd}, {name: boxes}]
  - stage: ptq
  - stage: export
  - stage: bench
targets:  # a miss ends the run with exit code 1
  max_drop: 0.03
"""


def is_detector(arch: str, data: Path) -> bool:
    """Tell whether a whole network that does not give one row of classes, or a YOLOX, is to be judged on images with boxes."""
    if not (arch.startswith("yolox:") or _gives_rows(arch)):
        return False
    with suppress(DataError):
        return bool(TASKS["detection"].listing(data).classes)
    return False


def write_detector(arch: str, weights: str, data: Path, out: Path, *, tell: Callable[[str], None]) -> Iterator[str]:
    """Write the recipe of the best way and yield lines on what was tried; CompressError where no decode reads the network's outputs."""
    found: list[tuple[float, str]] = []
    refused: list[str] = []
    size = _size_of(arch)
    named = "yolox" if arch.startswith("yolox:") else None
    for way, function in product(WAYS, [named] if named else DECODES):
        text = _recipe(arch, weights, data, out.stem, size, way, function)
        tell(f"tries {function}, {', '.join(way.values())}")
        try:
            score, images = _score(text)
        except (CompressError, BundleError, KeyError, TypeError) as error:  # the outputs are another function's
            refused.append(str(error))
            continue
        found.append((score, text))
        yield f"tried    decode {function}, {', '.join(way.values())}: mAP {score:.1%} on {images} images"
        if score > GOOD:
            break
    if not found:
        raise CompressError(
            f"{weights}: none of {', '.join(DECODES)} reads its outputs ({refused[0]}): set `decode: FILE.py:function` in a recipe"
        )
    score, text = max(found)
    write_text(out, text)
    if score < GOOD:
        yield "         that is little: check the order of the classes, data.framing and data.pixels, and decode"
    yield f"wrote    {out}; run it with: compress run {out}"


def _gives_rows(arch: str) -> bool:
    kind, path = foreign(arch) or ("", "")
    if kind == "onnx":
        outputs = onnx.load(path, load_external_data=False).graph.output
        return len(outputs) > 1 or len(outputs[0].type.tensor_type.shape.dim) == 3
    if kind == "hf" and (config := Path(path) / "config.json").is_file():
        return "Detection" in str(json.loads(config.read_text()).get("architectures"))
    return False


def _size_of(arch: str) -> Written:
    """Return the network's input size: a file's own, else YOLOX's."""
    kind, path = foreign(arch) or ("", "")
    if kind == "onnx":
        high, wide = OnnxFile(Path(path)).shape[2:]
        if isinstance(high, int) and isinstance(wide, int):
            return written((high, wide))
    return 416 if arch in ("yolox:nano", "yolox:tiny") else 640


def _recipe(
    arch: str, weights: str, data: Path, name: str, size: Written, way: Mapping[str, str], function: str
) -> str:
    model = {"arch": arch} if foreign(arch) else {"arch": arch, "weights": weights}
    augment = {"crop": "random_resized", "min_area": 0.5, "flip": True, "distort": True}
    seen = {"dataset": "imagefolder", "path": str(data), "image_size": size, **way, "eval_batch_size": 8}
    plain = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name.lower()).strip("_")
    document = {
        "name": plain or "mine",
        "task": "detection",
        "data": {**seen, "augment": augment},
        "model": model,
        "decode": function,
    }
    return f"# {arch}, for the images of {data}. Written by compress init.\n{strict_yaml.dump(document)}{STAGES}"


def _score(text: str) -> tuple[float, int]:
    """Return the mAP of a recipe's network on some validation images, and their number."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "tried.yaml")
        path.write_text(text, encoding="utf-8")
        run = open_run(read_recipe(path, ["device=cpu"]), trust_code=False, verbose=False)
        assert run.recipe.model is not None
        _, network = run.start(run.recipe.model)
        score = evaluate(network, run.feed.validation(limit=IMAGES), run.task)["score"]
        return score, min(IMAGES, len(run.dataset.val))
