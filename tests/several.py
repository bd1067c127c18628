"""Python on several ranks of this machine, without torchrun, which would itself end them all."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

MINUTE_S = 60.0
TESTS = Path(__file__).parent


def start(code: str, *arguments: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """Start the code on every rank; `rank` is its number there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"rank = {number}\n{code}", *arguments],
            env={**common, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(ranks)
    ]


def ended(processes: list[subprocess.Popen[str]], *, within_s: float = MINUTE_S) -> list[tuple[int, str]]:
    """Return each rank's exit code and what it wrote to stderr; fail where one still runs after so many seconds."""
    until = time.monotonic() + within_s
    try:
        said = [process.communicate(timeout=max(until - time.monotonic(), 0.1))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
