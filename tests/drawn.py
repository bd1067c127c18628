"""Images with boxes drawn on them, written in each format."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress.data.named import DATA_SETS, Difficulty
from export.images.decode import ORIENTATION, turned

WIDTH, HEIGHT = 80, 60
CLASSES = ["cat", "dog"]
# Of each image: class, left, top, right, bottom in pixels. The last one has none.
DRAWN: dict[str, list[tuple[int, float, float, float, float]]] = {
    "train/a": [(0, 8, 6, 40, 30), (1, 20, 12, 80, 60)],
    "train/b": [(1, 0, 0, 16, 12)],
    "val/c": [(0, 40, 30, 48, 36)],
    "val/d": [],
}


def few_scenes(name: str, **numbers: int) -> Difficulty:
    """Return the scenes of a data set, of which there are `train` and `val`."""
    found = DATA_SETS[name].scenes
    assert found is not None
    return replace(found, **numbers)  # type: ignore[arg-type]


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(path)


def coco(root: Path, *, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    for split in ("train", "val"):
        names = [name for name in DRAWN if name.startswith(split)]
        document = {
            "images": [
                {"id": 7 * place, "file_name": f"{Path(name).name}.png", "width": WIDTH, "height": HEIGHT}
                for place, name in enumerate(names)
            ],
            "annotations": [
                {
                    "id": number,
                    "image_id": 7 * place,
                    "category_id": (17, 90)[label],
                    "bbox": [x, y, right - x, bottom - y],
                    "iscrowd": 0,
                }
                for place, name in enumerate(names)
                for number, (label, x, y, right, bottom) in enumerate(DRAWN[name])
            ],
            "categories": [{"id": 90, "name": "dog"}, {"id": 17, "name": "cat"}, {"id": 3, "name": "unused"}],
        }
        if split == "train":
            change(document)
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
        for name in names:
            image(root / split / f"{Path(name).name}.png")


def yolo(root: Path, *, line: str | None = None) -> None:
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n")
    for name, boxes in DRAWN.items():
        image(root / "images" / f"{name}.png")
        text = [
            f"{label} {(x + right) / 2 / WIDTH} {(y + bottom) / 2 / HEIGHT} {(right - x) / WIDTH} {(bottom - y) / HEIGHT}"
            for label, x, y, right, bottom in boxes
        ]
        label = root / "labels" / f"{name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        if boxes:  # an image without boxes needs no file
            label.write_text("\n".join(text if line is None else [line]) + "\n")


def voc(root: Path, *, box: str | None = None) -> None:
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, boxes in DRAWN.items():
        image(root / "JPEGImages" / f"{Path(name).name}.png")
        objects = "".join(
            f"<object><name>{CLASSES[label]}</name><bndbox>"
            + (box or f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>")
            + "</bndbox></object>"
            for label, x, y, right, bottom in boxes
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{Path(name).name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    for split in ("train", "val"):
        names = "".join(f"{Path(name).name}\n" for name in DRAWN if name.startswith(split))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(names)


def bright(root: Path, *, orientation: int, stored: bool, write: str) -> None:
    """Write two images with a bright object each, whose box is drawn on the stored or on the upright pixels, as COCO or VOC."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "Annotations" if write == "voc" else root / "annotations").mkdir()
    for split, (left, top, right, bottom) in {"train": (8, 10, 24, 40), "val": (40, 4, 76, 20)}.items():
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[top:bottom, left:right] = 255
        drawn = Image.fromarray(pixels)
        path = root / "JPEGImages" / f"{split}.png" if write == "voc" else root / "images" / split / "a.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.convert("RGB").save(path, exif=exif)
        width, height = drawn.size
        if not stored:
            upright = np.asarray(turned(drawn, orientation))
            (height, width), (rows, columns) = upright.shape, np.nonzero(upright)
            left, top, right, bottom = (
                int(one) for one in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            )
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        box = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        if write == "voc":
            (root / "Annotations" / f"{split}.xml").write_text(
                f"<annotation>{size}<object><name>cat</name><bndbox>{box}</bndbox></object></annotation>"
            )
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text(split)
            continue
        document = {
            "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
