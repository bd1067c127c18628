"""How a command ends early: mistakes of the user and faults of the machine in one sentence, crashes with their traceback."""

import errno
import os
import sys
from typing import Any, NoReturn

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from export.command.main import INTERRUPTED, MISTAKE
from export.errors import UserError

ELSEWHERE = "choose another folder with --out (OUT= under make)"
GOES_ON = "; the same command then continues"
REPAIRS = {
    errno.EACCES: f"check its permissions, or {ELSEWHERE}",
    errno.EPERM: f"check its permissions, or {ELSEWHERE}",
    errno.EROFS: ELSEWHERE,
    errno.EEXIST: "name another place",
    errno.ENOTDIR: "name another place",
    errno.ENOSPC: f"free some space, or {ELSEWHERE}{GOES_ON}",
    errno.EDQUOT: f"free some of your quota, or {ELSEWHERE}{GOES_ON}",
    errno.EFBIG: f"raise the limit on file sizes (ulimit -f){GOES_ON}",
    errno.EMFILE: f"raise the limit on open files (ulimit -n){GOES_ON}",
}


class Commands(TyperGroup):
    """The commands; mistakes of the user and faults of the machine end in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; unexpected errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            fail(str(error))
        except (OSError, SafetensorError) as error:
            if (number := _os_error(error)) not in REPAIRS:
                raise
            place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            fail(f"{place}{os.strerror(number).lower()}; {REPAIRS[number]}")
        except KeyboardInterrupt:
            say("interrupted; the same command continues")
            raise typer.Exit(INTERRUPTED) from None


def say(text: str) -> None:
    """Print a line to stderr."""
    sys.stderr.write(f"{text}\n")


def fail(text: str) -> NoReturn:
    """Print a line to stderr and end with the exit code of a user's mistake."""
    say(text)
    raise typer.Exit(MISTAKE)


def _os_error(error: OSError | SafetensorError) -> int:
    """Return the system's error number; safetensors has it in its message only, as `(os error 28)`."""
    if isinstance(error, OSError):
        return error.errno or 0
    return int(str(error).partition("(os error ")[2].partition(")")[0] or 0)
