"""Name a teacher by its content, without torch."""

import difflib
import hashlib
from pathlib import Path

from compress.errors import ModelError

LIBRARIES = ("torchvision", "timm", "cifar")  # of networks
WITH_WEIGHTS = ("torchvision", "timm")  # those that publish weights under names


def source_digest(arch: str, weights: str | None) -> str:
    """Return a sha256 over the architecture, the content of its file if it is a person's own, and the content of the weights file.

    Where a file lies does not matter. Raises `ModelError` where it is missing.
    """
    source, _, name = arch.rpartition(":")
    code = source.encode() if source in LIBRARIES else _content(existing_file(source, "the model's file"))
    return hashlib.sha256(b"\0".join((code, name.encode(), _weights(weights)))).hexdigest()


def is_named(weights: str) -> bool:
    """Return whether weights are a library's, `torchvision:NAME` or `timm:TAG`, rather than a file."""
    return weights.partition(":")[0] in WITH_WEIGHTS


def existing_file(text: str, what: str) -> Path:
    """Return the path of a file that exists; raise `ModelError`, naming a sibling that looks like it, where it does not."""
    file = Path(text)
    if file.is_dir():
        raise ModelError(f"{file}: {what} is a folder; give the file inside it")
    if not file.is_file():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, siblings, n=1)
        hint = f"did you mean {file.with_name(near[0])}?" if near else "check the path"
        raise ModelError(f"{file}: {what} does not exist; {hint}")
    return file


def _weights(weights: str | None) -> bytes:
    if weights is None:
        return b"none"
    return weights.encode() if is_named(weights) else _content(existing_file(weights, "the weights file"))


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
