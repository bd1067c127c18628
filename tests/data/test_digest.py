"""A data set is named by its content: what changed is found, named, and only that is read again."""

import gzip
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batched import eval_batches
from photographs import SETTINGS, opened, write_classes, write_imagenet_layout, write_photo
from PIL import Image

from compress.artifact import Meta, finish
from compress.data import dataset as dataset_module
from compress.data import digest as digest_module
from compress.data.digest import FILES, changes, dataset_digest, given
from compress.data.named import to_download
from compress.data.settings import DataSettings
from compress.pipeline import plan_recipe
from compress.recipe.read import read_recipe
from export.command import digest_memory
from export.command.files import write_json
from export.errors import DataError
from export.images.read import find_examples

EVALUATION: dict[str, Any] = {"batch_size": 100, "workers": 0}


def settings(root: Path, name: str = "imagefolder") -> DataSettings:
    return DataSettings(name, root, **SETTINGS, memory=root.parent / "memory")


def named(root: Path, name: str = "imagefolder") -> str:
    return dataset_digest(settings(root, name), given(settings(root, name)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of bitmaps, all of one size in bytes."""
    for label, grey in (("cat", 0), ("dog", 200)):
        (tmp_path / "set" / label).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(np.full((8, 8, 3), grey + index, np.uint8)).save(tmp_path / "set" / label / f"{index}.bmp")
    return tmp_path / "set"


def test_class_folders_of_equal_files_that_change_places_are_other_data(root: Path) -> None:
    before = named(root)
    (root / "cat").rename(root / "aside")
    (root / "dog").rename(root / "cat")
    (root / "aside").rename(root / "dog")
    assert named(root) != before


def test_a_file_written_over_with_its_old_size_and_time_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_memory, "TICK_NS", 0)
    file, status = root / "cat" / "0.bmp", (root / "cat" / "0.bmp").stat()
    before = named(root)
    time.sleep(0.02)
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert named(root) != before


def test_a_file_is_read_once_and_again_only_where_it_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_memory, "TICK_NS", 0)
    read, file_digest = [], hashlib.file_digest

    def counted(stream: object, name: str) -> object:
        read.append(Path(stream.name).relative_to(root))  # type: ignore[attr-defined]
        return file_digest(stream, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", counted)
    first = named(root)
    assert (len(read), named(root), len(read)) == (8, first, 8)
    write_photo(root / "dog" / "1.bmp", seed=3)
    assert named(root) != first
    assert read[8:] == [Path("dog/1.bmp")]


@pytest.mark.parametrize("memory", ["/proc/none", "/dev/null/none"])
def test_without_a_place_to_remember_every_file_is_read_each_time(root: Path, memory: str) -> None:
    nowhere = replace(settings(root), memory=Path(memory))
    assert dataset_digest(nowhere, given(nowhere)) == named(root)


def test_a_file_that_cannot_be_read_is_left_to_the_decoder(root: Path) -> None:
    before = named(root)
    (root / "cat" / "none.bmp").symlink_to(root / "absent")
    assert named(root) != before


def test_long_reading_says_how_long_it_took(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named(root)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(digest_module, "PATIENCE_S", 0)
    named(root)
    assert capsys.readouterr().err == f"{root}: 8 of 8 files read in 0:00\n"


def test_reading_that_is_interrupted_goes_on_from_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_memory, "TICK_NS", 0)
    monkeypatch.setattr(digest_memory, "FILES", 2)

    def interrupt(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    names = [f"{label}/{index}.bmp" for label in ("cat", "dog") for index in range(4)]
    with pytest.raises(KeyboardInterrupt):
        digest_memory.digests_of(root, names, memory=root.parent / "memory.json", progress=interrupt)
    assert len(digest_memory._remembered(root.parent / "memory.json")) >= 4


def test_other_files_in_the_format_of_fashion_mnist_are_other_data(tmp_path: Path) -> None:
    found = []
    for value in (1, 2):
        for part in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes([value] * 64), mtime=0))
        found.append(named(tmp_path, "fashion_mnist"))
    assert found[0] != found[1]


def test_changes_are_counted_and_named() -> None:
    before = {"a": "1", "b": "2", "c": "3"}
    assert changes(before, before) == ""
    assert (
        changes(before, {"a": "9", "b": "2", "d": "4", "e": "5"})
        == "1 file changed (a); 2 files new (d, e); 1 file gone (c)"
    )


def test_the_plan_names_the_images_that_changed(tmp_path: Path) -> None:
    root = write_imagenet_layout(tmp_path / "set")
    file = tmp_path / "photographs.yaml"
    networks = Path(__file__).parents[1] / "networks.py"
    file.write_text(
        f"name: photographs\ndata: {{path: {root}}}\nmodel: {{arch: '{networks}:small'}}\n"
        "stages: [{stage: source, fit: {epochs: 1}}]\n"
    )
    recipe = read_recipe(file, out=str(tmp_path / "runs"))
    (line,) = plan_recipe(recipe)
    work = line.directory.with_name("work")
    work.mkdir(parents=True)
    write_json(work / FILES, given(settings(root)).digests)
    section = recipe.stages[0].model_dump(mode="json")
    finish(work, line.directory, Meta("source", line.key, None, None, "float", section, 1, 0.0, {}, {}))
    assert plan_recipe(recipe)[0].reason == "unchanged"
    write_photo(root / "train" / "dog" / "1.png", seed=77)
    write_classes(root / "val", classes=("cat",), per_class=3)
    (root / "val" / "owl" / "1.png").unlink()
    assert plan_recipe(recipe)[0].reason == (
        "changed: 1 file changed (train/dog/1.png); 1 file new (val/cat/2.png); 1 file gone (val/owl/1.png)"
    )


@pytest.mark.parametrize("kept", ["memory", "files"])
@pytest.mark.parametrize("split", [True, False])
def test_the_digests_of_validation_find_exactly_its_images_among_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, split: bool
) -> None:
    if kept == "files":
        monkeypatch.setattr(dataset_module, "MEMORY_BYTES", 0)
    root = write_imagenet_layout(tmp_path) if split else write_classes(tmp_path, per_class=8)
    (root / ("val" if split else "") / "owl" / "broken.png").write_text("no image")
    data = opened("imagefolder", root, skip_broken=True)
    images, labels = zip(
        *((b.images, b.targets) for b in eval_batches(data.val, data.preprocess, **EVALUATION)), strict=True
    )
    judged = find_examples(root, data.preprocess, data.classes).judged(data.validation_digests())
    scored = list(judged.batches(batch_size=100))
    np.testing.assert_array_equal(scored[0][0], torch.cat(images).numpy())
    np.testing.assert_array_equal(scored[0][1], torch.cat(labels).numpy())
    assert ("left out" in judged.notes[0]) if not split else judged.notes[0].startswith("6 of 7 images")


def test_without_a_home_only_a_download_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does for a user without an entry
    found = ["digits", "cifar10"]
    assert to_download(found[0], None) is None
    with pytest.raises(DataError, match="there is no home folder to download to; give one: DATA="):
        to_download(found[1], None)
