"""Run a command: adapt its output to the terminal, and turn every outcome into an exit code.

0: done; 1: a limit or target missed; 2: a mistake that the user can correct (one sentence); 3: a broken bundle (`check`, `gate`);
70: a crash (with a traceback); 130: interrupted.
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
    errno.EEXIST: "name another place",
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
    """Parse the command line, run the command and return its exit code; argparse itself exits with 2."""
    return end(lambda: command(parser.parse_args()))


def end(command: Callable[[], int], repairs: Mapping[int, str] = REPAIRS) -> int:
    """Run a command and return its exit code: a mistake prints one sentence, a crash its traceback.

    `repairs` are the system errors that count as mistakes, by number, with their repair.
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
        return _said("this is a fault of the program, not your mistake", CRASH)
    return code


def _said(sentence: str, code: int) -> int:
    sys.stderr.write(f"{sentence}\n")
    return code


class _Pipe(io.FileIO):
    """A stream whose reader may go away: further output is dropped, and the command ends as usual."""

    def write(self, data: "ReadableBuffer") -> int | None:  # type: ignore[override]  # typeshed's IO blocks
        """Write the bytes, or pretend to if the reader is gone."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def fitting(stream: TextIO) -> TextIO:
    """Return the process's own stream made safe against a closed pipe and a poor encoding; any other stream unchanged."""
    if not isinstance(stream, io.TextIOWrapper) or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="plain",
        line_buffering=stream.line_buffering or stream.write_through,  # under PYTHONUNBUFFERED, which has no buffer
    )


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks: known signs by ASCII, others by their code."""
    assert isinstance(error, UnicodeEncodeError), "registered only for writing"
    signs = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign, sign.encode("ascii", "backslashreplace").decode()) for sign in signs), error.end


codecs.register_error("plain", _plain)
