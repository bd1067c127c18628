"""Open ONNX files that may come from anybody in a process of their own first, with limits.

The child parses each file, checks it, loads it in ONNX Runtime with all optimizations, runs it once on a black image, and
prints what it found as JSON. A crash, a hang or an endless demand for memory ends the child and becomes one sentence in the
parent, which opens only what was found sound.

On Linux the child's address space and CPU time are limited, and it can write into no file (`resource`); elsewhere only its
time is. This guards against files that break their reader, by accident or on purpose. It is no wall against a file that
takes the child over: the child is the same user on the same machine, with its files and its network. Where that is to be
feared, run the whole command in a container or a virtual machine. It also does not guard against one who changes the file
between the look and the use.
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
from export.runtime.session import DTYPES, RUNTIME_ERRORS, first_line, open_session

OUT_OF_MEMORY = ("alloc", "MemoryError", "length_error")  # in what the libraries say
TOO_SLOW = (-signal.SIGALRM, -signal.SIGXCPU) if sys.platform != "win32" else ()


@dataclass(frozen=True)
class Limits:
    """What the child may take; the numbers that honest files need are in docs/security.md."""

    memory_mb: int = 2048  # of address space, besides `memory_per_byte` for each byte of the largest file
    memory_per_byte: int = 8
    cpu_seconds: int = 60  # for each file
    seconds: int = 240  # for each file


Found = ModelFile | BundleError | None
"""What one look at a file gives: its facts (None where nobody asked for them), or what is wrong with it."""


def vet(paths: Sequence[Path], limits: Limits = Limits()) -> list[ModelFile | BundleError]:
    """Return for each model file of a bundle its facts, or what is wrong with it."""
    return [found or _nonsense(path) for path, found in zip(paths, _look_guarded(paths, limits), strict=True)]


def require_sound(path: Path, limits: Limits = Limits()) -> Path:
    """Return the path of any ONNX file, of a bundle or not; raise BundleError where it is not sound."""
    (found,) = _look_guarded([path], limits, "--any")
    if isinstance(found, BundleError):
        raise found
    return path


def _look_guarded(paths: Sequence[Path], limits: Limits, *options: str) -> list[Found]:
    """Return what the child found; where a file ends it, another one looks at the rest."""
    found: list[Found] = []
    while len(found) < len(paths):
        left = paths[len(found) :]
        answers, ended = _ask_child(left, limits, options)
        found.extend(_read_answer(answer, path) for answer, path in zip(answers, left, strict=False))
        if len(answers) < len(left):
            found.append(_why(ended, left[len(answers)], limits))
    return found


def _ask_child(
    paths: Sequence[Path], limits: Limits, options: Sequence[str]
) -> tuple[list[str], "subprocess.CompletedProcess[str] | None"]:
    """Return the child's lines, one for each file that it finished, and how it ended: None where it had to be stopped."""
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # -P: Python would else look for modules in the folder it is called from, which may be the bundle.
    command = [
        sys.executable,
        "-P",
        "-m",
        "export.bundle.sandbox",
        "--limits",
        json.dumps(asdict(limits)),
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


def _read_answer(line: str, path: Path) -> Found:
    """Return what one line of the child says."""
    try:
        answer = json.loads(line)
        if answer is None:
            return None
        if "defect" in answer:
            defect: Defect = answer["defect"] if answer["defect"] in get_args(Defect) else "unusable"
            return BundleError(str(answer["sentence"]), defect=defect)
        ends = {key: Value(**{**answer[key], "shape": tuple(answer[key]["shape"])}) for key in ("input", "output")}
        return ModelFile(**{**answer, **ends})
    except (ValueError, KeyError, TypeError):
        return _nonsense(path)


def _nonsense(path: Path) -> BundleError:
    return BundleError(
        f"{path.name}: the process that looked at it answered nonsense: do not trust it", defect="crashed"
    )


def _why(ended: "subprocess.CompletedProcess[str] | None", path: Path, limits: Limits) -> BundleError:
    """Return the sentence about the file that the child did not survive."""
    again = "export it again, or do not trust it"
    if ended is None or ended.returncode in TOO_SLOW:
        sentence = f"{path.name}: takes more than {limits.cpu_seconds} s to load and run once: {again}"
        return BundleError(sentence, defect="timed_out")
    if ended.returncode == -9 or any(word in ended.stderr for word in OUT_OF_MEMORY):
        return _too_hungry(path, limits)
    how = signal.Signals(-ended.returncode).name if ended.returncode < 0 else f"exit code {ended.returncode}"
    said = (ended.stderr.strip().splitlines() or ["no message"])[-1]
    return BundleError(f"{path.name}: its reader crashed ({how}: {said:.200}): {again}", defect="crashed")


def _too_hungry(path: Path, limits: Limits) -> BundleError:
    sentence = f"{path.name}: needs more than {_memory([path], limits) >> 20} MB of memory: export it again, or do not trust it"
    return BundleError(sentence, defect="out_of_memory")


def _memory(paths: Sequence[Path], limits: Limits) -> int:
    largest = max((path.stat().st_size for path in paths if path.is_file()), default=0)
    return (limits.memory_mb << 20) + limits.memory_per_byte * largest


def look(path: Path, limits: Limits, *, of_bundle: bool) -> Found:
    """Parse, check, load and run a file in this process; a bundle's model must also have one image in and one answer out."""
    try:
        model = parse(path)
        facts = facts_of(model, path) if of_bundle else None
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, data_prop=True)
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
    """Run a file on one black image; sizes that vary are 1."""
    session = open_session(path, threads=1)
    if strange := [given for given in session.get_inputs() if given.type not in DTYPES]:
        sentence = f"{path.name}: {strange[0].name}: must be one of {', '.join(DTYPES)}, got {strange[0].type}"
        raise BundleError(f"{sentence}: export it again", defect="wrong_shape")
    shapes = {
        given.name: [size if isinstance(size, int) else 1 for size in given.shape] for given in session.get_inputs()
    }
    session.run(None, {given.name: np.zeros(shapes[given.name], DTYPES[given.type]) for given in session.get_inputs()})


def confine(paths: Sequence[Path], limits: Limits) -> None:
    """Limit this process's memory and forbid it to write into files; does nothing where the system is not Linux."""
    if sys.platform != "linux":
        return
    import resource

    memory = _memory(paths, limits)
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (allowed, allowed))


def start_clock(limits: Limits) -> None:
    """End this process when one file takes too long; a signal that nobody handles ends it inside a library too."""
    if sys.platform != "win32":
        import resource

        signal.alarm(limits.seconds)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        soft = int(used) + limits.cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    """Print the facts of each file, or what is wrong with it, as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m export.bundle.sandbox", description=main.__doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--limits", type=json.loads, default="{}", help="Limits as JSON")
    parser.add_argument("--any", action="store_true", help="take any model, not only a bundle's")
    arguments = parser.parse_args()
    limits = Limits(**arguments.limits)
    confine(arguments.paths, limits)
    for path in arguments.paths:
        start_clock(limits)
        found = look(path, limits, of_bundle=not arguments.any)
        if isinstance(found, BundleError):
            answer: object = {"defect": found.defect, "sentence": str(found)}
        else:
            answer = None if found is None else asdict(found)
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
