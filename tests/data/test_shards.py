"""Shards are seen as their folder is: tars of this package and of others, Arrow and Parquet, on the disk and behind a URL."""

import http.server
import io
import itertools
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batched import eval_batches, train_batches
from photographs import SETTINGS, augmentation, opened, write_imagenet_layout, write_photo

from compress.commands.shards import write_shards
from compress.data import dataset as dataset_module
from compress.data import shards as shards_module
from compress.data.dataset import Dataset
from compress.data.digest import dataset_digest, given
from compress.data.images import ShardImages
from compress.data.labelled import write_validation
from compress.data.settings import DataSettings
from export.errors import DataError
from export.images.folders import list_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_imagenet_layout(tmp_path_factory.mktemp("data") / "folder")


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    write_shards(str(folder), folder.parent / "shards", size_mb=1)
    return folder.parent / "shards"


@pytest.fixture(autouse=True)
def never_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "MEMORY_BYTES", 0)


def seen(dataset: Dataset) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All that training and evaluation see: two views of the training images, and the validation images."""
    for view in range(2):
        for batch in train_batches(
            dataset, batch_size=5, augmentation=augmentation(crop="random_resized", flip=True, mixup=0.2), seed=3, epoch=view,
            view=view, workers=0
        ):  # fmt: skip
            yield batch.images, batch.targets
    for batch in eval_batches(dataset.val, dataset.preprocess, batch_size=4):
        yield batch.images, batch.targets


def same(first: Dataset, second: Dataset) -> bool:
    pairs = itertools.zip_longest(seen(first), seen(second))
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def tar(file: Path, *entries: tuple[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=format) as out:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))
    return file


def photo(seed: int = 0) -> bytes:
    file = io.BytesIO()
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def listed(root: Path, **changes: object) -> object:
    settings = DataSettings("imagefolder", root, **SETTINGS | {"memory": root.parent / ".memory"} | changes)
    return given(settings).listing


def test_every_view_of_shards_is_that_of_their_folder(folder: Path, shards: Path) -> None:
    first, second = opened("imagefolder", folder), opened("imagefolder", shards)
    assert isinstance(second.train, ShardImages)
    assert first.classes == second.classes
    assert first.validation_digests() == second.validation_digests()
    assert same(first, second)


def test_loader_processes_read_shards(shards: Path) -> None:
    dataset = opened("imagefolder", shards)
    alone, two = (
        [batch.images for batch in eval_batches(dataset.val, dataset.preprocess, batch_size=2, workers=n)]
        for n in (0, 2)
    )
    assert all(map(torch.equal, alone, two))


def test_the_same_images_make_the_same_bytes(folder: Path, shards: Path, tmp_path: Path) -> None:
    write_shards(str(folder), tmp_path / "again", size_mb=1)
    write_shards(str(shards), tmp_path / "from_shards", size_mb=1)
    for copy in ("again", "from_shards"):
        for file in shards.iterdir():
            assert (tmp_path / copy / file.name).read_bytes() == file.read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_webdataset_reads_what_is_written(folder: Path, shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    found = list(webdataset.WebDataset(str(shards / "train-000000.tar"), shardshuffle=False))
    files = sorted((folder / "train").glob("*/*"))
    assert [one["png"] for one in found] == [file.read_bytes() for file in files]
    assert [int(one["cls"]) for one in found] == [["cat", "dog", "owl"].index(file.parent.name) for file in files]


def test_webdatasets_own_shards_are_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "s").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "s" / "train-%06d.tar"), maxcount=3, verbose=0) as out:
        for number in range(6):
            out.write({"__key__": f"a/{number}.x", "png": photo(number), "json": {"label": number % 2, "more": 1}})
    dataset = opened("imagefolder", tmp_path / "s", val_fraction=0.4)
    assert (len(dataset.train), len(dataset.val), dataset.classes) == (4, 2, ("0", "1"))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_folders_in_a_tar_are_classes_whatever_its_names(kind: int, tmp_path: Path) -> None:
    names = [
        f"{'long' * 40 if kind != tarfile.USTAR_FORMAT else 'a' * 90}/{label}/{n}.png"
        for label in ("cat", "dög")
        for n in (0, 1)
    ]
    tar(tmp_path / "s" / "all.tar", *((name, photo(n)) for n, name in enumerate(names)), ("._x.png", b""), format=kind)
    dataset = opened("imagefolder", tmp_path / "s", val_fraction=0.5)
    assert dataset.classes == ("cat", "dög")
    assert sorted(dataset.train.name(i) for i in range(2)) + sorted(dataset.held_out.name(i) for i in range(2)) != []
    assert sorted(listed(tmp_path / "s").train.names.tolist()) == [f"all.tar/{name}".encode() for name in sorted(names)]  # type: ignore[attr-defined]


def saved(folder: Path, root: Path, kind: str) -> Path:
    """The folder's images as Hugging Face's `datasets` keep them."""
    datasets = pytest.importorskip("datasets")
    files = {part: sorted((folder / part).glob("*/*")) for part in ("train", "val")}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    parts = {
        part: datasets.Dataset.from_dict(
            {
                "image": [{"bytes": file.read_bytes(), "path": None} for file in of],
                "label": [features["label"].str2int(file.parent.name) for file in of],
            },
            features=features,
        )
        for part, of in files.items()
    }
    if kind == "arrow":
        datasets.DatasetDict(parts).save_to_disk(root)
    for part, rows in parts.items() if kind == "parquet" else ():
        rows.to_parquet(root / "data" / f"{part}-00000-of-00001.parquet", batch_size=3)
    return root


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_what_datasets_saved_is_seen_as_its_folder_is(kind: str, folder: Path, tmp_path: Path) -> None:
    root = saved(folder, tmp_path / kind, kind)
    assert same(opened("imagefolder", folder), opened("imagefolder", root))
    for copy in (root / ".memory").glob("*.arrow"):  # of a Parquet file; it comes back
        copy.unlink()
    assert same(opened("imagefolder", folder), opened("imagefolder", root))


def test_shards_behind_a_url_are_read_by_their_index(folder: Path, shards: Path, tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(f"{shards}/", "/bucket/", recursive=True)
    write_shards("memory://bucket", tmp_path / "index", size_mb=1)
    assert [file.name for file in (tmp_path / "index").iterdir()] == ["index.npz"]
    assert same(opened("imagefolder", folder), opened("imagefolder", tmp_path / "index"))


def test_the_gates_folder_is_written_from_shards_and_they_are_not_taken_for_it(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    assert write_validation(opened("imagefolder", shards), tmp_path / "val") == 6
    written = [file.read_bytes() for file in sorted((tmp_path / "val").glob("*/*"))]
    assert written == [file.read_bytes() for file in sorted((folder / "val").glob("*/*"))]
    with pytest.raises(DataError, match="has shards, which only training can read"):
        list_folder(shards)


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves the parts of files that are asked for, as object stores do."""

    def send_head(self) -> Any:
        start, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not start or not type(self).honest:
            return super().send_head()
        part = Path(self.translate_path(self.path)).read_bytes()[int(start) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)

    honest = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(shards: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(shards))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_loader_processes_read_from_a_server_and_believe_no_whole_file(
    url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    write_shards(url, tmp_path / "index", size_mb=1)
    local, remote = opened("imagefolder", folder), opened("imagefolder", tmp_path / "index")
    for workers in (0, 2):
        pairs = [eval_batches(one.val, one.preprocess, batch_size=2, workers=workers) for one in (local, remote)]
        assert all(torch.equal(a.images, b.images) for a, b in zip(*pairs, strict=True))
    monkeypatch.setattr(Ranges, "honest", False)
    with pytest.raises(DataError, match=r"its shard returned [\d,]+ bytes instead of [\d,]+"):
        list(eval_batches(remote.val, remote.preprocess, batch_size=2))


@pytest.mark.parametrize("url", ["nothing://bucket", "memory://empty", "http://127.0.0.1:9/"])
def test_a_url_that_cannot_be_read_is_a_sentence(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{url}: (cannot be read|has no \.tar)"):
        write_shards(url, tmp_path / "index", size_mb=1)
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_read_though_the_cache_forgets_its_file_at_once(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_opened", shards_module._Open)  # as when two threads open it first
    (file, *_) = sorted(shards.glob("*.tar"))
    assert shards_module.read_bytes(str(file), 0, 8) == file.read_bytes()[:8]


def test_an_index_is_kept_and_a_changed_shard_is_another_data_set(tmp_path: Path) -> None:
    root = tmp_path / "s"
    tar(root / "train-0.tar", *((f"{label}/{n}.png", photo(n)) for label in "ab" for n in range(2)))
    settings = DataSettings("imagefolder", root, **SETTINGS, memory=tmp_path / "memory")
    before = dataset_digest(settings, given(settings))
    (index,) = (tmp_path / "memory").glob("*.npz")
    written = index.stat().st_mtime_ns
    assert dataset_digest(settings, given(settings)) == before
    assert index.stat().st_mtime_ns == written
    tar(root / "train-0.tar", *((f"{label}/{n}.png", photo(n + 1)) for label in "ab" for n in range(2)))
    assert dataset_digest(settings, given(settings)) != before
    assert index.stat().st_mtime_ns != written


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def two(name: str) -> tuple[tuple[str, bytes], ...]:
    return (("a/0.png", photo()), ("b/1.png", photo()), (name, photo()))


@pytest.mark.parametrize(
    ("entries", "length", "said"),
    [
        ((), None, "train-0.tar: is empty"),
        ((), 0, "train-0.tar: is empty"),
        (two("b/2.png"), 700, "train-0.tar: is truncated"),
        (two("b/2.png"), 1024, "train-0.tar: is truncated"),
        (two("b/2.png"), 3 * 1024, "train-0.tar: is truncated"),
        (two("b/1.png"), None, "train-0.tar: holds b/1.png twice"),
        ((*two("b/2.png"), ("a/0.cls", b"1")), None, "b/1.png has no label; add its .cls"),
        ((("0.png", photo()), ("0.cls", b"-1")), None, "labels must be from 0 to"),
        (
            (("0.png", photo()),),
            None,
            "0.png has no label; add its .cls, a .json with `label`, or put each class into a folder",
        ),
    ],
)
def test_a_faulty_tar_is_refused_in_a_sentence(
    entries: tuple[tuple[str, bytes], ...], length: int | None, said: str, tmp_path: Path
) -> None:
    file = tar(tmp_path / "s" / "train-0.tar", *entries)
    if length is not None:
        cut(file, length)
    with pytest.raises(DataError, match=said):
        listed(tmp_path / "s")


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    write_photo(tmp_path / "s" / "train-0.png").rename(tmp_path / "s" / "train-0.tar")
    with pytest.raises(DataError, match="is damaged or no tar"):
        listed(tmp_path / "s")


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_truncated_table_is_refused_in_a_sentence(kind: str, folder: Path, tmp_path: Path) -> None:
    file = next(path for path in saved(folder, tmp_path / kind, kind).rglob(f"*.{kind}") if "train" in str(path))
    for length in (file.stat().st_size - 8, file.stat().st_size // 2, 100, 0):
        cut(file, length)
        with pytest.raises(DataError, match=r"is (truncated|damaged|empty)"):
            listed(tmp_path / kind)


def test_a_tables_columns_are_named_where_they_do_not_fit(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "s")
    with pytest.raises(DataError, match="has 0 and 0 among text, label"):
        listed(tmp_path / "s")


def test_folders_of_images_beside_a_tar_stay_a_folder(tmp_path: Path) -> None:
    root = write_imagenet_layout(tmp_path / "folder")
    tar(root / "train.tar", *two("b/2.png"))
    assert len(opened("imagefolder", root).train) == 12
