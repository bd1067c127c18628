"""A recipe for a detector of another kind than the built-in ones: which decode, and which preprocessing, give the highest mAP.

A folder of transformers' states its preprocessing, and is decoded as `queries`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from compress.data.teachers import foreign
from compress.errors import CompressError, ModelError
from compress.models.architectures import build
from compress.models.decodes import CHOSEN_FROM, DECODES
from compress.models.digest import existing_file
from compress.models.foreign import OnnxFile
from compress.models.outputs import tensors_of
from compress.models.published import NONE, published
from compress.models.teachers import names_within
from compress.models.weights import load_weights_
from compress.recipe import strict_yaml
from compress.recipe.read import read_recipe
from compress.run import open_run
from compress.tasks import evaluate
from export.command.files import write_text
from export.errors import BundleError, DataError, first
from export.images.size import Written, size_of, written
from export.onnx_file.model_file import read
from export.tasks import TASKS

IMAGES = 32  # on which each way is scored
GOOD = 0.3  # mAP that needs no further trial
Way = Mapping[str, object]  # fields of a recipe's data
YOLOX: Way = {"framing": "letterbox_corner", "pixels": "bytes", "colors": "bgr"}
# How such detectors are trained: YOLO, YOLOX, DETR's descendants.
WAYS: Sequence[Way] = (
    {"framing": "letterbox", "pixels": "unit"},
    YOLOX,
    {"framing": "stretch", "pixels": "normalized"},
    {"framing": "stretch", "pixels": "unit"},
)
STAGES = """\
stages:
  - stage: source
  - stage: prune  # and solve the weights to make up for it, without training
    keep_macs: 0.5
  - stage: distill  # on the network's own boxes and scores, without labels
    fit: {epochs: 24, batch_size: 16, optimizer: adamw, lr: RATE, warmup_epochs: 1, clip_norm: 1}
    loss: [{name: kd, weight: 10}, {name: boxes}]
  - stage: ptq
  - stage: export
  - stage: bench
targets:  # a miss ends the run with exit code 1
  max_drop: 0.03
"""
SOURCE = "  - stage: source\n"
# Where the weights are for other classes: layers with new numbers of outputs learn from the labels.
FINE_TUNED = """\
  - stage: source  # new last layers, for the images' classes, learn from the labels with all others
    fit: {epochs: 24, batch_size: 16, optimizer: adamw, lr: RATE, warmup_epochs: 1, clip_norm: 1}
    fine_tune: true
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
    model: dict[str, object] = {"arch": arch} if foreign(arch) else {"arch": arch, "weights": weights}
    functions: Sequence[str] = ["yolox"] if arch.startswith("yolox:") else [*DECODES]
    size, ways, rate = _size_of(arch), WAYS, 0.001
    if arch.startswith("yolox:") and _has_other_classes(arch, weights, data):
        text = _recipe(model | {"reset_head": True}, data, out.stem, size, YOLOX, "yolox", rate)
        write_text(out, text.replace(SOURCE, FINE_TUNED.replace("RATE", str(rate))))
        yield "         its classes are not the images': the teacher learns these from the labels first, as source"
        yield f"wrote    {out}; run it with: compress run {out}"
        return
    if arch.startswith("hf:"):
        network, rate, functions = build(arch, num_classes=0, outputs=()).eval(), 0.0003, ["queries"]
        size, ways = _stated(arch, size)
        model["outputs"] = _taught(network, size)
        yield from _named(arch, names_within(network), data)
    for way, function in product(ways, functions):
        text = _recipe(model, data, out.stem, size, way, function, rate)
        shown = ", ".join(map(str, way.values()))
        tell(f"tries {function}, {shown}")
        try:
            score, images = _score(text)
        except (CompressError, BundleError, KeyError, TypeError) as error:  # the outputs are another function's
            refused.append(str(error))
            continue
        found.append((score, text))
        yield f"tried    decode {function}, {shown}: mAP {score:.1%} on {images} images"
        if score > GOOD:
            break
    if not found:
        raise CompressError(
            f"{weights}: its outputs are not read as {' or '.join(functions)} ({refused[0]}): set `decode: FILE.py:function` in a recipe"
        )
    score, text = max(found)
    write_text(out, text)
    if score < GOOD:
        yield "         that is little: check the order of the classes, data.framing and data.pixels, and decode"
    yield f"wrote    {out}; run it with: compress run {out}"


def _gives_rows(arch: str) -> bool:
    kind, path = foreign(arch) or ("", "")
    if kind == "onnx":
        outputs = read(existing_file(path, "the ONNX file"))[0].graph.output
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


def _has_other_classes(arch: str, weights: str, data: Path) -> bool:
    """Tell whether a YOLOX's weights are for another number of classes than the images'; ModelError where they do not fit at all."""
    network = build(arch, num_classes=len(TASKS["detection"].listing(data).classes))
    try:
        load_weights_(network, arch, weights, reset_head=False)
    except ModelError:
        load_weights_(network, arch, weights, reset_head=True)
        return True
    return False


def _stated(arch: str, size: Written) -> tuple[Written, Sequence[Way]]:
    """Return the image size and the preprocessing in the settings of a folder's processor; `size` and the usual ways where it has none."""
    known = published(arch)
    if known is None:
        return size, [way for way in WAYS if way["framing"] == "stretch"]
    mean, std = map(list, known.normalize)
    pixels: Way = {"pixels": "unit"} if known.normalize == NONE else {"pixels": "normalized", "mean": mean, "std": std}
    look = {"interpolation": known.look.interpolation, "colors": "bgr" if known.look.bgr else "rgb"}
    return written(known.image_size), [{"framing": "stretch", **look, **pixels}]


@torch.no_grad()
def _taught(network: nn.Module, size: Written) -> list[str]:
    """Return the outputs to serve: queries, and the rows that they were chosen from where the network shows these."""
    shown = dict(tensors_of(network.forward(torch.zeros(1, 3, *size_of(size)))))  # without the hook that packs them
    queries = shown["logits"].shape[1] if "logits" in shown else 0
    return ["logits", "pred_boxes", *(name for name in CHOSEN_FROM if name in shown and shown[name].shape[1] > queries)]


def _named(arch: str, names: Sequence[str] | None, data: Path) -> Iterator[str]:
    """Yield a line on the network's classes; CompressError where the images have the same in another order."""
    classes = tuple(TASKS["detection"].listing(data).classes)
    if names is None or tuple(names) == classes:
        return
    if sorted(names) == sorted(classes):
        raise CompressError(
            f"{arch}: has the classes {', '.join(names)}, {data} has them as {', '.join(classes)}: list them there in the network's order"
        )
    yield f"         its classes {first(sorted(names))} are taken as {first(classes)}, in the order of the images'"


def _recipe(
    model: Mapping[str, object], data: Path, name: str, size: Written, way: Way, function: str, rate: float
) -> str:
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
    head = f"# {model['arch']}, for the images of {data}. Written by compress init.\n"
    return head + strict_yaml.dump(document) + STAGES.replace("RATE", str(rate))


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
