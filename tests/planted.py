"""A small INT8 bundle whose files carry the facts of their export, as real ones do, and a way to seal what was tampered with."""

import hashlib
import json
from pathlib import Path

import numpy as np
from onnx import ModelProto, helper
from onnx_files import PREPROCESS, classifier, save
from quantized_files import SIZE, quantized_network

from export.bundle.write import Contents, write_bundle
from export.serving.triton import Serving

LABELS = ("cat", "dog", "gnu")
SMALL = PREPROCESS | {"image_size": SIZE, "resize_to": SIZE + 2, "interpolation": "bilinear (antialias)"}


def tagged(
    model: ModelProto, *, target: str = "cpu_avx2", score: float = 0.75, recipe_digest: str = "abc"
) -> ModelProto:
    """Return the model with the metadata that an export writes."""
    facts = {
        "classes": json.dumps(LABELS),
        "preprocess": json.dumps(SMALL),
        "target": target,
        "score_torch": f"{score}",
    }
    helper.set_model_props(model, facts | {"recipe_digest": recipe_digest})
    return model


def write_tagged_bundle(folder: Path) -> Path:
    """Write a bundle of a float teacher and an INT8 student into `folder` and return where."""
    files = {"teacher_fp32": tagged(classifier(size=SIZE)), "student_int8": tagged(quantized_network(63))}
    paths = {name: save(model, folder / f"{name}.onnx") for name, model in files.items()}
    contents = Contents(
        name="planted",
        files=paths,
        serving=Serving(
            {"cpu": "student_int8", "cuda": "teacher_fp32", "tensorrt": "teacher_fp32"},
            "cpu",
            threads=1,
            instances=1,
            max_batch_size=8,
        ),
        preprocess=SMALL,
        labels=LABELS,
        images=np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8),
        truths=np.array([0, 1, 2, 0]),
        task="classification",
        target="cpu_avx2",
        recipe_digest="abc",
        metrics={"teacher_fp32": {"score": 0.75}, "student_int8": {"score": 0.75, "float_layers": []}},
    )
    write_bundle(folder / "bundle", contents)
    return folder / "bundle"


def seal(folder: Path) -> None:
    """Write every digest and size anew, and the copies of a changed file, as one who tampers with care would."""
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    before = {name: old for old, name in (line.split("  ", 1) for line in lines)}
    for name, old in before.items():
        path = folder / name
        if not path.exists():
            continue
        copy_of = next(
            (one for one in before if "/" not in one and before[one] == old and (folder / one).is_file()), None
        )
        if "/" in name and copy_of is not None and digest(path) == old != digest(folder / copy_of):
            path.write_bytes((folder / copy_of).read_bytes())
    document = json.loads((folder / "bundle.json").read_text())
    for entry in document["files"].values():
        path = folder / entry["file"]
        if path.is_file():
            entry |= {"sha256": digest(path), "bytes": path.stat().st_size}
    (folder / "bundle.json").write_text(json.dumps(document))
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    found = [f"{digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    (folder / "SHA256SUMS").write_text("".join(found))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
