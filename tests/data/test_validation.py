"""A run's validation images as a folder give the very pixels that the run has judged by."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from compress.cli import app
from compress.data.augment import Augmentation
from compress.data.images import MemoryImages
from compress.data.labelled import open_dataset, write_validation
from compress.data.named import DATA_SETS, Arrays, InMemory, NamedSet
from compress.recipe.arguments import data_settings
from compress.recipe.read import read_recipe, write_recipe
from compress.recipe.schema import Augment
from export.errors import DataError
from export.images.read import find_examples

STILL = Augmentation(**Augment().model_dump())
RECIPE = """
name: small
model: {arch: "cifar:resnet8"}
stages: [{stage: source, fit: {epochs: 1}}]
"""


def recipe_of(folder: Path, *overrides: str) -> Path:
    """Write a run's recipe as a run does, and return the run's folder."""
    (folder / "small.yaml").write_text(RECIPE)
    (folder / "run").mkdir()
    write_recipe(read_recipe(folder / "small.yaml", overrides), folder / "run" / "recipe.yaml")
    return folder / "run"


def photographs(folder: Path) -> None:
    """Write 12 images of two classes and other shapes, one of which cannot be read."""
    generator = np.random.default_rng(0)
    for index in range(12):
        place = folder / ("cat", "dog")[index % 2] / f"{index // 4}" / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)).save(place)
    (folder / "cat" / "broken.jpg").write_bytes(b"no image")


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_the_folder_gives_the_pixels_that_the_run_has_judged_by(tmp_path: Path, source: str) -> None:
    overrides = ["data.resize=1.2", "data.val_fraction=0.5"]
    if source == "folder":
        photographs(tmp_path / "images")
        overrides += [
            "data.dataset=imagefolder",
            f"data.path={tmp_path}/images",
            "data.image_size=16",
            "data.skip_broken=true",
        ]
    run = recipe_of(tmp_path, *overrides)
    done = CliRunner().invoke(app, ["export-data", str(run), str(tmp_path / "out")], catch_exceptions=False)
    opened = open_dataset(data_settings(read_recipe(run / "recipe.yaml")), STILL)
    assert (
        done.stdout
        == f"{tmp_path}/out: {len(opened.val)} validation images of {overrides[2][13:] if source == 'folder' else 'digits'}\n"
    )
    found = find_examples(tmp_path / "out", opened.preprocess, opened.classes)
    written = sorted((int(label), found.pixels(index).tobytes()) for index, label in enumerate(found.truths))
    assert sorted(found.digests()) == sorted(opened.validation_digests())
    assert isinstance(opened.val, MemoryImages)
    judged = (
        opened.val.still.images(torch.arange(len(opened.val)), torch.device("cpu")).permute(0, 2, 3, 1).contiguous()
    )
    labels = opened.val.labels.tolist()
    assert written == sorted((label, image.numpy().tobytes()) for label, image in zip(labels, judged, strict=True))


def test_classes_that_no_folder_can_be_named_after_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = Arrays(
        np.arange(6 * 192, dtype=np.int64).astype(np.uint8).reshape(6, 8, 8, 3), np.array([0, 1, 0, 1, 0, 1])
    )
    named = InMemory(("T-shirt/top", "bag"), arrays, arrays)
    monkeypatch.setitem(DATA_SETS, "digits", NamedSet(32, lambda _: named))
    opened = open_dataset(data_settings(read_recipe(recipe_of(tmp_path) / "recipe.yaml")), STILL)
    assert write_validation(opened, tmp_path / "out") == 6
    assert find_examples(tmp_path / "out", opened.preprocess, named.classes).truths.tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]


def test_a_folder_that_is_there_is_never_written_into(tmp_path: Path) -> None:
    opened = open_dataset(data_settings(read_recipe(recipe_of(tmp_path) / "recipe.yaml")), STILL)
    with pytest.raises(DataError, match="exists already; name a new folder"):
        write_validation(opened, tmp_path)
