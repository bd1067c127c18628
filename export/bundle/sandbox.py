"""Open untrusted ONNX files first in a separate process with limits.

The child parses each file, checks it, loads it in ONNX Runtime with all optimizations, runs it once on a black image, and
prints its findings as JSON. A crash, a hang or running out of memory ends only the child and becomes one sentence in the
parent, which opens only files that were found sound.

On Linux the child's address space and CPU time are limited, and it cannot write to files (`resource`); elsewhere only its
time is limited. This protects against files that break their reader, by accident or on purpose. It does not protect against
a file that takes over the child, which has the same user, files and network. If that is a threat, run the whole command in a
container or a virtual machine. Nor does it protect against changes of a file between the check and its use.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import onnx

from export.errors import BundleError, Defect
from export.onnx_file.model_file import ModelFile, Value, facts_of, parse
from export.runtime.native import RUNTIME_ERRORS, first_line
from export.runtime.session import DTYPES, open_session

if sys.platform != "win32":
    import resource

OUT_OF_MEMORY = ("alloc", "MemoryError", "length_error")  # words in the libraries' messages
OUT_OF_CPU, OUT_OF_TIME = (-signal.SIGXCPU, -signal.SIGALRM) if sys.platform != "win32" else (None, None)


@dataclass(frozen=True)
class ChildLimits:
    """The child's limits; docs/bundle.md has the numbers that sound files need."""

    memory_mb: int = 2048  # of address space, plus `memory_per_byte` for each byte of the largest file
    memory_per_byte: int = 8
    # On 2 cores of an AMD EPYC with AVX2 and ONNX Runtime 1.32 the child took 1.0 s for a ResNet-18 in INT8, 1.4 s for a
    # ResNet-50 (26 MB, 4.1 GMACs) and 2.5 s for it in FP32, 3.0 s for it at 640 px (33 GMACs), 31 s for 1.5 GB of weights.
    cpu_seconds: int = 10  # for each file, plus:
    cpu_seconds_per_gb: float = 100
    cpu_seconds_per_gmac: float = 0.5
    max_cpu_seconds_for_macs: int = 50  # an endless network can claim any number
    seconds: int = 240  # for each file; ends one that waits instead of computing


Found = ModelFile | BundleError | None
"""The result for one file: its facts (None if not wanted), or the error."""


def vet(paths: Sequence[Path], limits: ChildLimits = ChildLimits()) -> list[ModelFile | BundleError]:
    """Return the facts of each model file of a bundle, or its error."""
    return [found or _nonsense(path) for path, found in zip(paths, _look_guarded(paths, limits), strict=True)]


def require_sound(path: Path) -> Path:
    """Return the path of an ONNX file, which need not fit a bundle; raise BundleError if it is not sound."""
    (found,) = _look_guarded([path], ChildLimits(), "--any")
    if isinstance(found, BundleError):
        raise found
    return path


def _look_guarded(paths: Sequence[Path], limits: ChildLimits, *options: str) -> list[Found]:
    """Return the child's findings; if a file ends the child, another child continues with the rest.

    A file that takes too much processor time gets another child, which counts its MACs first: that takes a second, which few files need.
    """
    found: list[Found] = []
    while len(found) < len(paths):
        left = paths[len(found) :]
        lines, ended = _ask_child(left, limits, options)
        found.extend(_read_line(line, path) for line, path in zip(lines, left, strict=False))
        if len(lines) < len(left):
            path, again = left[len(lines)], list[str]()
            if ended is not None and ended.returncode == OUT_OF_CPU:
                again, ended = _ask_child([path], limits, [*options, "--count-macs"])
            found.append(_read_line(again[0], path) if again else _why(ended, path, limits))
    return found


def _ask_child(
    paths: Sequence[Path], limits: ChildLimits, options: Sequence[str]
) -> tuple[list[str], "subprocess.CompletedProcess[str] | None"]:
    """Return the child's lines, one per finished file, and its completed process, or None if it had to be stopped."""
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # -P: otherwise Python would import modules from the current folder, which may be the bundle.
    command = [
        sys.executable,
        "-P",
        "-m",
        "export.bundle.sandbox",
        f"--limits={json.dumps(asdict(limits))}",
        *options,
        "--",
    ]
    try:
        ended = subprocess.run(
            [*command, *(str(path.absolute()) for path in paths)],
            env={**os.environ, "PYTHONPATH": search},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60 + 2 * limits.seconds * len(paths),
            check=False,
        )
    except subprocess.TimeoutExpired as stopped:
        said = stopped.output or ""
        return (said.decode(errors="replace") if isinstance(said, bytes) else said).splitlines(), None
    return ended.stdout.splitlines()[: len(paths)], ended


def _read_line(line: str, path: Path) -> Found:
    """Return the result in one line of the child's output."""
    try:
        found = json.loads(line)
        if found is None:
            return None
        if "defect" in found:
            defect: Defect = found["defect"] if found["defect"] in get_args(Defect) else "unusable"
            return BundleError(str(found["sentence"]), defect=defect)
        given, *outputs = (
            Value(**{**one, "shape": tuple(one["shape"])}) for one in (found["input"], *found["outputs"])
        )
        return ModelFile(**{**found, "input": given, "outputs": tuple(outputs)})
    except (ValueError, KeyError, TypeError):
        return _nonsense(path)


def _nonsense(path: Path) -> BundleError:
    return BundleError(f"{path.name}: the process that checked it printed nonsense: do not trust it", defect="crashed")


def _why(ended: "subprocess.CompletedProcess[str] | None", path: Path, limits: ChildLimits) -> BundleError:
    """Return the error for the file that ended the child."""
    again = "export it again, or do not trust it"
    if ended is None or ended.returncode in (OUT_OF_CPU, OUT_OF_TIME):
        busy = ended is not None and ended.returncode == OUT_OF_CPU
        return _too_slow(path, f"{limits.cpu_seconds} s of processor time" if busy else f"{limits.seconds} s")
    if ended.returncode == -9 or any(word in ended.stderr for word in OUT_OF_MEMORY):
        return _too_hungry(path, limits)
    how = signal.Signals(-ended.returncode).name if ended.returncode < 0 else f"exit code {ended.returncode}"
    said = (ended.stderr.strip().splitlines() or ["no message"])[-1]
    return BundleError(f"{path.name}: its reader crashed ({how}: {said:.200}): {again}", defect="crashed")


def _too_slow(path: Path, time: str) -> BundleError:
    sentence = f"{path.name}: takes more than {time} to load and run once: export it again, or do not trust it"
    return BundleError(sentence, defect="timed_out")


def _too_hungry(path: Path, limits: ChildLimits) -> BundleError:
    sentence = f"{path.name}: needs more than {_memory([path], limits) >> 20} MB of memory: export it again, or do not trust it"
    return BundleError(sentence, defect="out_of_memory")


def _memory(paths: Sequence[Path], limits: ChildLimits) -> int:
    return (limits.memory_mb << 20) + limits.memory_per_byte * max(map(_bytes, paths), default=0)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def look(path: Path, limits: ChildLimits, *, of_bundle: bool, counted: bool) -> Found:
    """Parse, check, load and run a file in this process; a bundle's model must also have one image input and outputs of fixed sizes.

    `counted` adds the processor time of its MACs to the limit; a file that has none exceeded the limit before, and is refused.
    """
    try:
        model = parse(path)
        facts = facts_of(model, path) if of_bundle else None
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, data_prop=True)
        if counted and not extend_clock(model, limits):
            return _too_slow(path, f"{limits.cpu_seconds} s of processor time")
        del model
        run_once(path)
    except MemoryError:
        return _too_hungry(path, limits)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        sentence = f"{path.name}: is not an ONNX model ({first_line(error)}): export it again"
        return BundleError(sentence, defect="not_onnx")
    except RUNTIME_ERRORS as error:
        if any(word in str(error) for word in OUT_OF_MEMORY):
            return _too_hungry(path, limits)
        sentence = f"{path.name}: cannot run on one image ({first_line(error)}): export it again"
        return BundleError(sentence, defect="cannot_run")
    except BundleError as error:
        return _too_hungry(path, limits) if any(word in str(error) for word in OUT_OF_MEMORY) else error
    return facts


def run_once(path: Path) -> None:
    """Run a file on one black image, with dynamic sizes set to 1."""
    session = open_session(path, threads=1)
    if strange := [given for given in session.get_inputs() if given.type not in DTYPES]:
        sentence = f"{path.name}: {strange[0].name}: must be one of {', '.join(DTYPES)}, got {strange[0].type}"
        raise BundleError(f"{sentence}: export it again", defect="wrong_shape")
    shapes = {
        given.name: [size if isinstance(size, int) else 1 for size in given.shape] for given in session.get_inputs()
    }
    session.run(None, {given.name: np.zeros(shapes[given.name], DTYPES[given.type]) for given in session.get_inputs()})


def confine(paths: Sequence[Path], limits: ChildLimits) -> None:
    """Limit this process's memory and forbid writing to files; does nothing if the system is not Linux."""
    if sys.platform == "linux":
        limit(resource.RLIMIT_AS, _memory(paths, limits), for_good=True)
        limit(resource.RLIMIT_FSIZE, 0, for_good=True)
        limit(resource.RLIMIT_CORE, 0, for_good=True)


def start_clock(path: Path, limits: ChildLimits) -> None:
    """Start the time limits for one file; the unhandled signal ends the process even inside a library."""
    if sys.platform != "win32":
        signal.alarm(limits.seconds)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        most = int(used + limits.cpu_seconds + limits.cpu_seconds_per_gb * _bytes(path) / 1e9)
        limit(resource.RLIMIT_CPU, most, for_good=False)


def extend_clock(model: onnx.ModelProto, limits: ChildLimits) -> int:
    """Add the processor time of a network's MACs to its limit; return the seconds."""
    seconds = seconds_for_macs(model, limits)
    if sys.platform != "win32":
        limit(resource.RLIMIT_CPU, resource.getrlimit(resource.RLIMIT_CPU)[0] + seconds, for_good=False)
    return seconds


def seconds_for_macs(model: onnx.ModelProto, limits: ChildLimits) -> int:
    """Return the processor time of a network's MACs, 0 if they cannot be counted, as without onnx_ir."""
    try:
        from export.onnx_file.macs import macs
        from export.onnx_file.wiring import wire

        count = sum((macs(wire(model)) or {}).values())
    # onnx_ir's, for a graph it cannot read.
    except (ImportError, RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return 0
    return int(min(limits.cpu_seconds_per_gmac * max(count, 0) / 1e9, limits.max_cpu_seconds_for_macs))


def limit(kind: int, most: int, *, for_good: bool) -> None:
    """Set a limit of this process, at most the one that it has; `for_good`: not to be raised again."""
    _, hard = resource.getrlimit(kind)
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (allowed, allowed if for_good else hard))


def main() -> None:
    """Print each file's facts or error as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m export.bundle.sandbox", description=main.__doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--limits", type=json.loads, default="{}", help="ChildLimits as JSON")
    parser.add_argument("--any", action="store_true", help="accept any model, not only a bundle's")
    parser.add_argument(
        "--count-macs", action="store_true", help="add the processor time of a network's MACs to its limit"
    )
    arguments = parser.parse_args()
    limits = ChildLimits(**arguments.limits)
    confine(arguments.paths, limits)
    for path in arguments.paths:
        start_clock(path, limits)
        found = look(path, limits, of_bundle=not arguments.any, counted=arguments.count_macs)
        if isinstance(found, BundleError):
            result: object = {"defect": found.defect, "sentence": str(found)}
        else:
            result = None if found is None else asdict(found)
        sys.stdout.write(f"{json.dumps(result)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
