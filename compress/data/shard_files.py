"""List one shard's images: a webdataset tar, or an Arrow stream or Parquet file of Hugging Face's `datasets`. No torch."""

import importlib
import json
import mmap
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.command.files import writing
from export.errors import DataError
from export.images.folders import SUFFIXES

ENDINGS = frozenset(suffix[1:].encode() for suffix in SUFFIXES)
BLOCK = 512  # bytes; a tar's headers and contents start at multiples of it
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow's
ROWS = 256  # of a Parquet file, in memory at a time
EXTRA = "pip install 'prune-distill-quantize[shards]'"


class Found(NamedTuple):
    """One shard's images; labels are numbers or names, `classes` the shard's names for the numbers."""

    names: list[bytes]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[Any]
    classes: tuple[str, ...] = ()


def scan_shard(file: Path) -> Found:
    """List a shard's images. Raises DataError where it is empty, damaged, or not labelled."""
    found = _scan_tar(file) if file.suffix == ".tar" else _scan_arrow(file)
    if not found.names:
        raise DataError(f"{file}: is empty, or holds no image; remove it or write it again")
    return found


def _scan_tar(file: Path) -> Found:
    """List a tar's images; the label is KEY.cls, else `label` in KEY.json, or without any of these the folder's name."""
    images, labels = dict[bytes, tuple[int, int]](), dict[bytes, bytes]()
    with file.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""
        for name, start, size in _members(file, data):
            suffix = name[name.rfind(b".") + 1 :].lower()
            if suffix in ENDINGS and not name.startswith(b".", name.rfind(b"/") + 1):
                if name in images:
                    raise DataError(f"{file}: holds {os.fsdecode(name)} twice; write it again with each key once")
                images[name] = start, size
            elif suffix == b"cls":
                labels[_key(name)] = data[start : start + size].strip()
            elif suffix == b"json":
                labels.setdefault(_key(name), _label_in(data[start : start + size]))
    if labels:
        texts = [labels.get(_key(name), b"") for name in images]
    else:
        texts = [name.rpartition(b"/")[0].rpartition(b"/")[2] for name in images]
    if not all(texts):
        bare = os.fsdecode(list(images)[texts.index(b"")])
        raise DataError(
            f"{file}: {bare} has no label; add its .cls, a .json with `label`, or put each class into a folder"
        )
    places = np.array(list(images.values()), np.int64).reshape(-1, 2)
    return Found(list(images), places[:, 0], places[:, 1], _numbers(texts))


def _key(name: bytes) -> bytes:
    """Return a sample's key as in webdataset: the path up to the first dot of the file's name."""
    return name[: name.find(b".", name.rfind(b"/") + 1)]


def _label_in(text: bytes) -> bytes:
    try:
        return str(json.loads(text)["label"]).encode()
    except (ValueError, LookupError, TypeError):  # a .json without a label
        return b""


def _numbers(texts: list[bytes]) -> NDArray[Any]:
    """Return labels as numbers if all are, else as names."""
    try:
        return np.array(list(map(int, texts)), np.int64)
    except ValueError:
        return np.array([os.fsdecode(text) for text in texts])


def _members(file: Path, data: bytes | mmap.mmap) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and length (bytes) of every file in a tar, GNU's and POSIX's long names included.

    Ten times faster than tarfile. Raises DataError for a file that is no tar, or is truncated.
    """
    place, long_name = 0, b""
    while place < len(data):
        header = data[place : place + BLOCK]
        if not header[0]:  # a block of zeros ends it
            return
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:
            size = -1
        if size < 0 or header[257:262] != b"ustar":
            raise DataError(f"{file}: is damaged or no tar (byte {place:,}); download or write it again")
        start, kind = place + BLOCK, header[156:157]
        place = start + -(-size // BLOCK) * BLOCK
        if place >= len(data):  # so the block of zeros is missing, too
            break
        if kind == b"L":
            long_name = data[start : start + size].rstrip(b"\0")
        elif kind == b"x":
            found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", data[start : start + size])
            long_name = found[1] if found else b""
        else:
            name = long_name or header[:100].rstrip(b"\0")
            if header[345] and header[262] == 0 and not long_name:  # POSIX's field for the start of a long path
                name = header[345:500].rstrip(b"\0") + b"/" + name
            long_name = b""
            if kind in b"0\0":
                yield name, start, size
    if data:
        raise DataError(f"{file}: is truncated: its end mark is missing; download or write it again")


def _scan_arrow(file: Path) -> Found:
    """List the images of an Arrow stream, with the places of their files' bytes in it."""
    arrow, size = _pyarrow(file), file.stat().st_size
    offsets, lengths, labels = list[NDArray[np.int64]](), list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    try:
        with arrow.memory_map(str(file)) as source:
            origin = source.read_buffer(1).address
            source.seek(0)
            reader = arrow.ipc.open_stream(source)
            image, label, classes = _columns(file, reader.schema)
            for batch in reader:
                content = batch.column(image).field("bytes")
                _, ends, data = content.buffers()
                width = np.int64 if arrow.types.is_large_binary(content.type) else np.int32
                bounds = np.frombuffer(ends, width)[: len(content) + 1].astype(np.int64) + (data.address - origin)
                if (
                    content.null_count or not 0 <= bounds[0] <= bounds[-1] <= size
                ):  # outside the file if it is compressed
                    raise DataError(f"{file}: does not hold its images as plain bytes; save it again with save_to_disk")
                offsets.append(bounds[:-1])
                lengths.append(np.diff(bounds))
                labels.append(np.asarray(batch.column(label), np.int64))
            ended = source.tell() == size and source.read_at(8, size - 8) == END_OF_STREAM
    except (arrow.ArrowInvalid, OSError, KeyError) as error:
        raise DataError(f"{file}: is damaged, or no Arrow stream of images ({error}); save it again") from error
    if not ended:
        raise DataError(f"{file}: is truncated: its end mark is missing; download or write it again")
    found = [np.concatenate(part) if part else np.empty(0, np.int64) for part in (offsets, lengths, labels)]
    return Found([b"%09d" % row for row in range(len(found[0]))], found[0], found[1], found[2], classes)


def _columns(file: Path, schema: Any) -> tuple[str, str, tuple[str, ...]]:
    """Return the names of the image and the label column, and the classes' names, from `datasets`' note in the schema."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    images = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{file}: needs one Image and one ClassLabel column, has {len(images)} and {len(labels)} among "
            f"{', '.join(schema.names)}; select or cast the columns with `datasets` and save it again"
        )
    return images[0], labels[0], tuple(features[labels[0]].get("names") or ())


def seekable(file: Path, memory: Path, digest: str) -> Path:
    """Return a shard with each image's bytes in one piece; a Parquet file is copied, once, to Arrow in `memory`."""
    if file.suffix != ".parquet":
        return file
    arrow, copy = _pyarrow(file), memory / f"{digest}.arrow"
    if not copy.exists():
        memory.mkdir(parents=True, exist_ok=True)
        try:
            table = importlib.import_module("pyarrow.parquet").ParquetFile(file)
            with writing(copy) as stream, arrow.ipc.new_stream(stream, table.schema_arrow) as rows:
                for batch in table.iter_batches(batch_size=ROWS):
                    rows.write_batch(batch)
        except arrow.ArrowInvalid as error:
            raise DataError(f"{file}: is damaged or no Parquet file ({error}); download or write it again") from error
    return copy


def _pyarrow(file: Path) -> Any:
    if find_spec("pyarrow") is None:
        raise DataError(f"{file}: reading it needs pyarrow: {EXTRA}")
    return importlib.import_module("pyarrow")
