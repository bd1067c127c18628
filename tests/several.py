"""Python on several ranks of this machine, without torchrun, which would itself end them all.

They are forked from a server that has imported torch once, as that takes seconds in each process.
"""

import os
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

MINUTE_S = 60.0
TESTS = Path(__file__).parent
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `quiet_libraries` does before torch is imported
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["compress.cli", "compress.run", "torch.distributed"])


@dataclass(frozen=True)
class Rank:
    """A rank's process, and the folder of what it writes."""

    process: ForkServerProcess
    folder: TemporaryDirectory[str]

    def said(self, stream: str) -> str:
        """Return what it wrote to "stdout" or "stderr" so far."""
        return Path(self.folder.name, stream).read_text()


def start(code: str, *arguments: str, ranks: int = 2) -> list[Rank]:
    """Start the code on every rank; `rank` is its number there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for number in range(ranks):
        variables, folder = {**common, "RANK": str(number), "LOCAL_RANK": str(number)}, TemporaryDirectory()
        for stream in ("stdout", "stderr"):
            Path(folder.name, stream).touch()
        process = CONTEXT.Process(target=_run, args=(code, arguments, number, variables, folder.name), daemon=True)
        process.start()
        started.append(Rank(process, folder))
    return started


def _run(code: str, arguments: tuple[str, ...], rank: int, variables: dict[str, str], folder: str) -> None:
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, stream), os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(variables)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<rank>", "exec"), {"__name__": "__main__", "rank": rank})


def ended(started: list[Rank], *, within_s: float = MINUTE_S) -> list[tuple[int, str]]:
    """Return each rank's exit code and what it wrote to stderr; fail where one still runs after so many seconds."""
    until = time.monotonic() + within_s
    for rank in started:
        rank.process.join(max(until - time.monotonic(), 0.1))
    codes = [rank.process.exitcode for rank in started]
    for rank in started:
        rank.process.kill()
        rank.process.join()
    said = [rank.said("stderr") for rank in started]
    for rank in started:
        rank.folder.cleanup()
    assert None not in codes, said
    return [(code, text) for code, text in zip(codes, said, strict=True) if code is not None]
