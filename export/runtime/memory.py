"""Measure the memory that one file needs, in a separate process."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from export.images.size import Shape
from export.runtime.providers import PLAIN, Runtime, add_arguments, asked

PROC_STATUS = Path("/proc/self/status")


def peak_memory_mb(
    model: Path, *, batch: int, shape: Shape, threads: int = 1, runs_in: Runtime = PLAIN
) -> float | None:
    """Return the peak memory, in MB, that loading and running `model` on the CPU adds to ONNX Runtime's own.

    None if the system is not Linux or the run fails.
    """
    if not PROC_STATUS.exists():
        return None
    arguments = [str(model.resolve()), f"--batch={batch}", "--shape", *map(str, shape), f"--threads={threads}"]
    arguments += [f"--provider={runs_in.provider.key}", f"--arithmetic={runs_in.arithmetic}"]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "export.runtime.memory", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    return float(done.stdout) if done.returncode == 0 else None


def peak_bytes() -> int:
    """Return this process's peak resident memory.

    VmHWM, unlike getrusage's ru_maxrss, does not inherit the peak of the parent process.
    """
    for line in PROC_STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{PROC_STATUS}: has no VmHWM")


def main() -> None:
    """Print the peak memory, in MB, that a model adds to a process with ONNX Runtime loaded."""
    parser = argparse.ArgumentParser(prog="python -m export.runtime.memory", description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs=3, required=True, help="channels, height, width")
    parser.add_argument("--threads", type=int, default=1)
    add_arguments(parser)
    arguments = parser.parse_args()

    import numpy as np

    from export.runtime.session import bind, open_session

    images, runs_in = np.zeros((arguments.batch, *arguments.shape), np.float32), asked(arguments)  # loads a plugin
    before = peak_bytes()
    bind(open_session(arguments.model, runs_in=runs_in, threads=arguments.threads), images)()
    sys.stdout.write(str((peak_bytes() - before) / 1e6))


if __name__ == "__main__":
    main()
