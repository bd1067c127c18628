"""Read files of an untrusted folder, and nothing outside it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

from export.command.files import sha256
from export.errors import BundleError, ContentError
from export.names import SUMS

SUMS_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
MAX_TEXT_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2**31 - 1
MAX_FILES = 4096

Json = dict[str, object]
Kind = TypeVar("Kind")


def contained(folder: Path, name: str) -> Path:
    """Return the regular file `name` in `folder`; raise BundleError for links and for a path outside the folder."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise BundleError(f"{brief(name)}: must be a file inside the bundle", defect="outside_path")
    path = folder
    try:
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise BundleError(f"{name}: must be a regular file, not a link: get the bundle again", defect="link")
        if not path.is_file():
            raise BundleError(f"{name}: is missing: get the bundle again", defect="missing_file")
    except OSError as error:
        sentence = f"{brief(name)}: cannot be read ({error.strerror}): get the bundle again"
        raise BundleError(sentence, defect="missing_file") from error
    return path


def check_size(folder: Path, name: str, *, at_most: int) -> Path:
    """Return the file's path; raise BundleError if it has more than `at_most` bytes."""
    path = contained(folder, name)
    if path.stat().st_size > at_most:
        raise BundleError(f"{name}: must be at most {at_most} bytes, got {path.stat().st_size}", defect="too_large")
    return path


def read_text(folder: Path, name: str) -> str:
    """Return a small text file."""
    path = check_size(folder, name, at_most=MAX_TEXT_BYTES)
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        sentence = f"{name}: must be UTF-8 text ({error.reason} at byte {error.start})"
        raise ContentError(sentence) from error


def read_json(folder: Path, name: str) -> Json:
    """Return the JSON object in a small file; refuse duplicate keys and NaN, which programs read differently."""
    try:
        document = json.loads(read_text(folder, name), object_pairs_hook=_unique_keys, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{name}: must be JSON ({error})") from error
    if not isinstance(document, dict):
        raise ContentError(f"{name}: must be a JSON object")
    return document


def get(document: Mapping[str, object], where: str, key: str, kind: type[Kind]) -> Kind:
    """Return the value of a key; raise BundleError if it has another type (true and false are not numbers)."""
    value = document.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ContentError(f"{where}: {key}: must be {kind.__name__}, got {brief(value)}")
    return value


def read_sums(folder: Path) -> dict[str, str]:
    """Return SHA256SUMS as name to digest."""
    digests: dict[str, str] = {}
    for line in read_text(folder, SUMS).splitlines():
        found = SUMS_LINE.fullmatch(line)
        if not found or found[2] in digests or len(digests) == MAX_FILES:
            raise ContentError(
                f"{SUMS}: must have one digest and one name per line, each name once, at most {MAX_FILES} lines, got {brief(line)}"
            )
        digests[found[2]] = found[1]
    return digests


def check_digest(folder: Path, name: str, digest: str) -> None:
    """Raise BundleError if a file does not have its digest from SHA256SUMS."""
    if sha256(check_size(folder, name, at_most=MAX_FILE_BYTES)) != digest:
        sentence = f"{name}: is not the file the bundle was made with (SHA-256 differs): get the bundle again"
        raise BundleError(sentence, defect="changed_file")


def brief(value: object) -> str:
    """Return an untrusted value's repr, shortened for a message."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"  # Python refuses to format more than 4,300 digits
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _unique_keys(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key occurs twice")
    return document


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def is_number(value: object) -> bool:
    """Tell whether a JSON value is a number; in Python, True is an int too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_listed(digests: Mapping[str, str], *names: str) -> None:
    """Raise BundleError for a file that is not in SHA256SUMS."""
    if missing := [name for name in names if name not in digests]:
        raise BundleError(f"{SUMS}: lists no {', '.join(missing)}: get the bundle again", defect="unlisted_file")
