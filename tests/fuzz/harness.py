"""Give the readers a small bundle with some files changed, and hold them to two rules.

Only a BundleError may come out, and Python may open nothing outside the bundle: an audit hook watches every file that is
opened or listed, every link, every process and every connection. (What libraries open past Python the hook cannot see; so
no session is opened here: ONNX Runtime meets foreign files in its sandbox only.)
"""

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from planted import seal, write_tagged_bundle

from export.bundle.read import examine, inspect_here
from export.check.findings import astray
from export.errors import MAX_LENGTH, BundleError
from export.onnx_file.model_file import parse, precision

MODEL = "student_int8.onnx"
TARGETS = ("SHA256SUMS", "bundle.json", "preprocess.json", "labels.txt", "golden/student_int8.npy", MODEL)
# Lazily imported modules and time zones of the interpreter are no part of what is read.
LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
READS = ("glob.glob", "open", "os.fwalk", "os.listdir", "os.scandir", "os.walk")
WATCHED = (*READS, "ctypes.dlopen", "os.", "pty.", "shutil.", "socket.", "subprocess.", "tempfile.")


class OutsideError(AssertionError):
    """Report that a reader reached for something outside the bundle."""


class _Watch:
    """Where opening is allowed; None while nobody is watched. A hook can never be taken away again."""

    root: str | None = None

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.root is None or not event.startswith(WATCHED):
            return
        path = arguments[0] if arguments else None
        if event in READS and isinstance(path, int):
            return  # a descriptor: what it stands for was opened before
        if event in READS and isinstance(path, str | bytes | os.PathLike):
            real = os.path.realpath(os.fsdecode(path))
            if f"{real}{os.sep}".startswith(f"{self.root}{os.sep}") and (
                event != "open" or arguments[1] in ("r", "rb")
            ):
                return
            if real.startswith(LIBRARIES) and real.endswith((".py", ".pyc", ".so")):
                return
        root, self.root = self.root, None  # the report itself may open files
        raise OutsideError(f"{event}{arguments!r}: reaches outside {root}")


WATCH = _Watch()
sys.addaudithook(WATCH)


@contextmanager
def watched(root: Path) -> Iterator[None]:
    """Let nothing outside `root` be opened."""
    WATCH.root = os.path.realpath(root)
    try:
        yield
    finally:
        WATCH.root = None


class Template:
    """A legal bundle on the disk, and its files' bytes to return to."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_tagged_bundle(folder)
        shutil.rmtree(self.folder / "serving")  # copies: nothing more to read, and half the time of an input
        seal(self.folder)
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        self.files = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}
        self.sums = {name: sha256(data).hexdigest() for name, data in self.files.items() if name != "SHA256SUMS"}
        assert self.read({}) == [], "a legal bundle, which also imports what a reader imports late"

    def read(self, changes: Mapping[str, bytes], *, seal: bool = True) -> list[BundleError]:
        """Return what the readers find amiss where some files hold other bytes; `seal` makes the digests anew."""
        changed = dict(changes)
        if seal and "bundle.json" not in changed and MODEL in changed:
            changed["bundle.json"] = self._manifest(changed[MODEL])
        if seal and "SHA256SUMS" not in changed:
            sums = self.sums | {name: sha256(data).hexdigest() for name, data in changed.items()}
            changed["SHA256SUMS"] = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
        for name, data in changed.items():
            (self.folder / name).write_bytes(data)
        try:
            return self.read_as_it_is(models=[name for name in changed if name.endswith(".onnx")])
        finally:
            for name in changed:
                (self.folder / name).write_bytes(self.files[name])

    def read_as_it_is(self, *, models: list[str]) -> list[BundleError]:
        """Return what the readers find amiss with the folder as it lies there."""
        amiss: list[BundleError] = []
        with watched(self.folder):
            examine(self.folder, amiss=amiss.append, inspect=inspect_here)
            try:
                amiss.extend(astray(self.folder, None))
            except BundleError as error:
                amiss.append(error)
            for name in models:
                try:
                    model = parse(self.folder / name)
                    precision(model)
                except BundleError as error:
                    amiss.append(error)
        for sentence in map(str, amiss):
            assert "\n" not in sentence, "one sentence"
            assert len(sentence) < 10 * MAX_LENGTH, "short enough to read"
        return amiss

    def _manifest(self, model: bytes) -> bytes:
        document = json.loads(self.files["bundle.json"])
        document["files"]["student_int8"] |= {"sha256": sha256(model).hexdigest(), "bytes": len(model)}
        return json.dumps(document).encode()
