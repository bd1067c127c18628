"""Digests of networks by the content of their files, without torch."""

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from compress.data.teachers import GivenTeacher, foreign
from compress.errors import ModelError
from compress.models.external_data import data_files
from compress.models.known import LACKS
from export.command.files import sha256
from export.errors import nearest
from export.images.listing import check_lengths

WITH_WEIGHTS = ("torchvision", "timm")  # libraries that publish named weights


def teachers_digest(given: Sequence[GivenTeacher]) -> str:
    """Return a sha256 over teachers: their networks' content, preprocessing and classes."""
    facts = [
        (
            source_digest(one.network, one.weights),
            one.image_size,
            one.mean,
            one.std,
            one.classes and _content(one.classes).hex(),
        )
        for one in given
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def source_digest(arch: str, weights: str | None) -> str:
    """Return a sha256 over the architecture, the code of its file if it is the user's own, and the weights' content.

    Paths do not count. Raises ModelError where a file is missing.
    """
    source, _, name = arch.rpartition(":")
    if foreign(arch) is not None:
        contents = b"".join(map(_content, files_of(arch)))
        return hashlib.sha256(b"\0".join((b"foreign", contents, _weights(weights)))).hexdigest()
    code = source.encode() if source in LACKS else _code(existing_file(source, "the model's file"))
    return hashlib.sha256(b"\0".join((code, name.encode(), _weights(weights)))).hexdigest()


def code_digest(own: str, field: str = "score") -> str:
    """Return a sha256 over `FILE.py:function` of a recipe's field; raise ModelError where the file is missing."""
    path, _, name = own.rpartition(":")
    return hashlib.sha256(_code(existing_file(path, f"the file of {field}")) + name.encode()).hexdigest()


def files_of(arch: str) -> list[Path]:
    """Return the files that contain a network and its weights; raise ModelError where one is missing."""
    kind, path = foreign(arch) or ("", "")
    if kind == "hf":
        found = sorted(
            file for file in Path(path).glob("*") if file.name == "config.json" or file.suffix == ".safetensors"
        )
        if len(found) < 2:
            raise ModelError(
                f"{arch}: must be a folder with config.json and .safetensors, as save_pretrained writes; give that folder"
            )
        return found
    file = existing_file(path, "the network's file")
    return [file, *(data_files(file) if kind == "onnx" else [])]


def is_named(weights: str) -> bool:
    """Tell whether weights are a library's, `torchvision:NAME` or `timm:TAG`, and not a file."""
    return weights.partition(":")[0] in WITH_WEIGHTS


def check_library(arch: str, weights: str) -> None:
    """Raise ModelError where named weights are of another library than the network."""
    library = weights.partition(":")[0]
    if arch.rpartition(":")[0] != library:
        raise ModelError(
            f"{weights}: are {library}'s weights, but the network is {arch}; give model.arch as {library}:NAME"
        )


def existing_file(text: str, what: str) -> Path:
    """Return the path of a file; raise ModelError, with a similar file's name, where it does not exist."""
    file = Path(text)
    if file.is_dir():
        raise ModelError(f"{file}: {what} is a folder; give the file inside it")
    if not file.is_file():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        near = nearest(file.name, siblings)
        hint = f"did you mean {file.with_name(near)}?" if near else "check the path"
        raise ModelError(f"{file}: {what} does not exist; {hint}")
    return file


def class_names(file: Path) -> tuple[str, ...]:
    """Return the class names in a text file, one a line; raise ModelError where it is missing or repeats one."""
    lines = existing_file(str(file), "the list of classes").read_text(encoding="utf-8").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ModelError(f"{file}: names {twice!r} more than once; give each class one line")
    check_lengths(file, names)
    return names


def local_modules(file: Path) -> dict[str, Path]:
    """Return by name the modules beside the user's file that it imports, directly or indirectly, without running them.

    Raises ModelError for one that is not Python.
    """
    root = file.resolve().parent
    found: dict[str, Path] = {}
    to_read = [("", file)]
    while to_read:
        package, source = to_read.pop()
        for name in _imported(source, package):
            place = root.joinpath(*name.split("."))
            for path, inside in ((place / "__init__.py", name), (place.with_suffix(".py"), name.rpartition(".")[0])):
                if name not in found and path.is_file():
                    found[name] = path
                    to_read.append((inside, path))
    return found


def _imported(source: Path, package: str) -> Iterator[str]:
    """Yield the full names of all modules that a file of this package may import, and of their packages."""
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise ModelError(f"{source}: cannot be imported: {error}") from error
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: 1 - node.level or None] if node.level and package else []
            base = [*around, *filter(None, [node.module])]
            names = [".".join([*base, alias.name]) for alias in node.names]  # a module, or a name in one
        for parts in (name.split(".") for name in names):
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _code(file: Path) -> bytes:
    """Return a digest of the user's file and of the modules beside it that it imports."""
    modules = sorted(local_modules(file).items())
    parts = [_content(file), *(name.encode() + b"\0" + _content(path) for name, path in modules)]
    return hashlib.sha256(b"\0".join(parts)).digest()


def _weights(weights: str | None) -> bytes:
    if weights is None:
        return b"none"
    return weights.encode() if is_named(weights) else _content(existing_file(weights, "the weights file"))


def _content(file: Path) -> bytes:
    try:
        return bytes.fromhex(sha256(file))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
