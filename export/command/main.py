"""How every command ends: what it says fits the terminal it is said to, and whatever happens becomes an exit code.

0 is done, 1 a limit or target missed, 2 a mistake that a person can correct (one sentence), 3 a broken bundle (`check`, `gate`),
70 a crash (with its traceback), 130 an interruption.
"""

import argparse
import codecs
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

from export.errors import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MISTAKE, CRASH, INTERRUPTED = 2, 70, 130  # 70 is EX_SOFTWARE of sysexits.h
REPAIRS = {
    errno.EACCES: "check its permissions",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EISDIR: "name a file",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOENT: "check the path",
    errno.ENOSPC: "free some space",
    errno.ENOTDIR: "check the path",
    errno.EPERM: "check its permissions",
    errno.EROFS: "name another place",
}
PLAIN = {
    "→": "->", "✓": "+", "✗": "x", "–": "-", "−": "-", "×": "x", "±": "+-", "≥": ">=", "≤": "<=", "█": "#", "…": "...", "·": "|", "\u00a0": " ",
}  # fmt: skip


def run(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]) -> int:
    """Read the command line, run the command and return its exit code; argparse ends the process with 2 by itself."""
    return end(lambda: command(parser.parse_args()))


def end(command: Callable[[], int], repairs: Mapping[int, str] = REPAIRS) -> int:
    """Run a command to its exit code: a mistake is told in one sentence, a crash keeps its traceback.

    `repairs` are the system's errors that count as mistakes, by their numbers, with what to do about them.
    """
    sys.stdout, sys.stderr = fitting(sys.stdout), fitting(sys.stderr)
    try:
        code = command()
        sys.stdout.flush()
    except UserError as error:
        return _said(str(error), MISTAKE)
    except KeyboardInterrupt:
        return _said("interrupted", INTERRUPTED)
    except Exception as error:  # noqa: BLE001 (the one place where a crash gets its exit code)
        if isinstance(error, OSError) and (number := error.errno or 0) in repairs:
            place = f"{error.filename}: " if error.filename else ""
            return _said(f"{place}{os.strerror(number).lower()}; {repairs[number]}", MISTAKE)
        traceback.print_exc()
        return _said("this is a fault of the program, not of yours", CRASH)
    return code


def _said(sentence: str, code: int) -> int:
    sys.stderr.write(f"{sentence}\n")
    return code


class _Pipe(io.FileIO):
    """A stream whose reader may leave: what nobody reads is dropped, and the command ends as it would have."""

    def write(self, data: "ReadableBuffer") -> int | None:  # type: ignore[override]  # typeshed's IO blocks
        """Write the bytes, or count them as written where the reader is gone."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def fitting(stream: TextIO) -> TextIO:
    """Return the process's own stream so that a closed pipe and an encoding without our signs lose nothing; any other as it is."""
    if not isinstance(stream, io.TextIOWrapper) or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="plain",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Spell out what an encoding lacks: our own signs by others, anything else by its number."""
    assert isinstance(error, UnicodeEncodeError), "registered for writing alone"
    signs = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign, sign.encode("ascii", "backslashreplace").decode()) for sign in signs), error.end


codecs.register_error("plain", _plain)
