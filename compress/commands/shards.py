"""Write a data set's images into shards with an index, or index the shards at a URL in place."""

import importlib
import io
import tarfile
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.data.digest import shards_in, training_folder
from compress.data.images import FileImages, images_of
from compress.data.shard_files import scan_shard
from compress.data.shards import CLASSES, INDEX, ShardListing, index_of, list_shards, save_index, shard_files
from export.command.files import put_folder, sha256
from export.errors import DataError
from export.images.decode import BrokenImage
from export.images.folders import FolderListing


def write_shards(data: str, out: Path, *, size_mb: int) -> str:
    """Write the images of a folder, or of shards, into tars of about `size_mb` megabytes, and return a summary line.

    The tars have webdataset's format; images are copied unchanged and in order, so that a run on them equals a run on the folder.
    For a URL, only an index of its tars is written. Raises DataError if `out` exists or images cannot be read.
    """
    if out.exists():
        raise DataError(f"{out}: exists already; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        aside, memory = Path(folder, "new"), Path(folder, "memory")
        aside.mkdir()
        memory.mkdir()
        fill = _index_urls if "://" in data else _copy
        fill(data, aside, memory, size_mb)
        listing = list_shards(aside, {INDEX: ""}, memory)
        put_folder(aside, out)
    parts = f"{len(listing.train):,} training and {len(listing.val or ()):,} validation images"
    return f"{out}: {parts} of {len(listing.classes):,} classes in {len(listing.places):,} shards"


def _copy(data: str, aside: Path, memory: Path, size_mb: int) -> None:
    """Write a folder's images into tars, and their index."""
    root = Path(data)
    shards = shards_in(root, memory)
    found = training_folder(root) if shards is None else shards.listing
    assert isinstance(found, FolderListing | ShardListing)
    for name, rows in (("train", found.train), ("val", found.val)):
        if rows is not None:
            _write_tars(aside / name, images_of(found, rows), size_mb)
    (aside / CLASSES).write_text("".join(f"{name}\n" for name in found.classes), encoding="utf-8")
    files = shard_files(aside)
    seen = [scan_shard(aside / name) for name in files if name != CLASSES]
    save_index(aside / INDEX, index_of(aside, {name: sha256(aside / name)[:16] for name in files}, files[:-1], seen))


def _write_tars(start: Path, images: FileImages, size_mb: int) -> None:
    """Write START-000000.tar and so on, with NUMBER.SUFFIX and NUMBER.cls for each image; reproducible to the byte."""
    with ExitStack() as files:
        tar, shards = None, 0
        for index, label in enumerate(images.labels.tolist()):
            name = images.name(index)
            try:
                content = images.content(index)
            except BrokenImage as error:
                raise DataError(f"{images.root}: {name}: cannot be read ({error}); fetch its shard again") from error
            if tar is None or tar.offset + len(content) > size_mb * 1_000_000:
                files.close()
                place = f"{start}-{shards:06d}.tar"
                tar, shards = files.enter_context(tarfile.open(place, "w", format=tarfile.USTAR_FORMAT)), shards + 1
            for end, text in ((Path(name).suffix.lower() or ".jpg", content), (".cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{index:09d}{end}")
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))


def _index_urls(data: str, aside: Path, memory: Path, _: int) -> None:
    """Read a URL's tars once, one after the other, and write only their index."""
    try:
        system, folder = importlib.import_module("fsspec").core.url_to_fs(data)
        names = sorted(system.glob(f"{folder.rstrip('/')}/*.tar"))
        if not names:
            raise DataError(f"{data}: has no .tar files; give the URL of the folder that has them")
        digests, seen = dict[str, str](), []
        for name in [*names, *system.glob(f"{folder.rstrip('/')}/{CLASSES}")]:
            file = memory / name.rpartition("/")[2]
            system.get_file(name, str(file))
            digests[file.name] = sha256(file)[:16]
            if file.name != CLASSES:
                seen.append(scan_shard(file))
                file.unlink()
    except (OSError, ImportError, ValueError) as error:  # ImportError and ValueError: an unknown protocol
        raise DataError(f"{data}: cannot be read ({error}); check the address and the network") from error
    index = index_of(memory, digests, [system.unstrip_protocol(name) for name in names], seen)
    save_index(aside / INDEX, index)
