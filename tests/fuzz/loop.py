"""Fuzz the readers of a bundle with atheris, led by coverage: `make fuzz ARGS="--runs 100000"`.

Each input is one file of a bundle, whose number its first byte gives; the corpus begins with the legal files. A crash, a
read outside the bundle, ten seconds or two gigabytes for one input end the loop, and the input is kept in the folder.
First `--models` damaged models go through the sandbox, ONNX Runtime included, and what comes out sound is held
against the bundle's promises; none may end this one.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

with atheris.instrument_imports(include=["export", "json"]):
    from export.bundle.read import Bundle, read_bundle
    from export.bundle.sandbox import vet
    from export.check.promises import broken_promises
    from export.errors import BundleError
    from fuzz.harness import MODEL, TARGETS, Template


def fuzz(template: Template, corpus: Path, *, runs: int, seconds: int) -> None:
    """Give the readers `runs` inputs, or as many as fit into `seconds`; libFuzzer prints its counts and ends the process."""
    for number, file in enumerate(TARGETS):
        (corpus / f"{number}").write_bytes(bytes([number]) + template.files[file])

    def once(data: bytes) -> None:
        if data:
            template.read({TARGETS[data[0] % len(TARGETS)]: data[1:]})

    limits = [
        f"-atheris_runs={runs}",
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=65536",
    ]
    artifacts = f"-artifact_prefix={corpus.parent}{os.sep}"
    atheris.Setup([sys.argv[0], *limits, artifacts, "-print_final_stats=1", str(corpus)], once)
    atheris.Fuzz()


def fuzz_models(template: Template, folder: Path, count: int) -> Counter[str]:
    """Return what the sandbox makes of `count` damaged models, and what is amiss with the sound ones."""
    found: Counter[str] = Counter()
    bundle = read_bundle(template.folder)
    generator = random.Random(0)
    for start in range(0, count, 50):
        paths = [folder / f"{number}.onnx" for number in range(min(50, count - start))]
        for path in paths:
            path.write_bytes(damaged(template.files[MODEL], generator))
        for path, one in zip(paths, vet(paths), strict=True):
            found[one.defect if isinstance(one, BundleError) else "sound"] += 1
            if not isinstance(one, BundleError):
                damaged_bundle = replace(bundle, files={"student_int8": path})
                found.update(f"sound, {defect}" for defect in broken(damaged_bundle))
    return found


def broken(bundle: Bundle) -> set[str]:
    """Return the names of the promises that a damaged model breaks."""
    try:
        return {error.defect for error in broken_promises(bundle, "student_int8")}
    except BundleError as error:
        return {error.defect}


def damaged(data: bytes, generator: random.Random) -> bytes:
    """Return the bytes with one to four of them, or a slice, changed."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        start = generator.randrange(len(changed))
        kind = generator.randrange(4)
        if kind == 0:
            changed[start] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[start] = generator.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del changed[start : start + generator.randrange(16)]
        else:
            other = generator.randrange(len(changed))
            changed[start : start + 8] = changed[other : other + 8]
    return bytes(changed)


def main() -> None:
    """Fuzz; exit with something other than 0 where an input breaks a rule."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=main.__doc__)
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for the readers")
    parser.add_argument("--seconds", type=int, default=600, help="the most time for them")
    parser.add_argument("--models", type=int, default=500, help="damaged models for the sandbox")
    parser.add_argument(
        "--keep", type=Path, default=Path(".elsewhere/fuzz/findings"), help="where inputs that break are kept"
    )
    arguments = parser.parse_args()
    corpus = arguments.keep.absolute() / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        template = Template(Path(folder))
        started = time.monotonic()
        found = fuzz_models(template, Path(folder), arguments.models)
        took = time.monotonic() - started
        sys.stdout.write(f"{arguments.models} damaged models in the sandbox, {took:.0f} s: {dict(found)}\n")
        sys.stdout.flush()
        fuzz(template, corpus, runs=arguments.runs, seconds=arguments.seconds)


if __name__ == "__main__":
    main()
