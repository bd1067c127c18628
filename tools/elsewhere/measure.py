"""Tabulate what every runtime makes of a folder's files, against ONNX Runtime here; docs/results.md holds the result.

PYTHONPATH=tools:tests .venv/bin/python -m elsewhere.measure                two networks trained on digits, every target
PYTHONPATH=tools:tests .venv/bin/python -m elsewhere.measure BUNDLE DATA    a bundle's (or an export directory's) files
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from networks import Mobile, Residual
from numpy.typing import NDArray

from elsewhere.files import PROGRAMS, agreement, is_there, run, run_here, score, write_digits, write_pixel_form
from export.bundle.read import read_preprocess
from export.images.read import find_examples
from export.onnx_file.targets import TARGETS


def write_bundle_inputs(bundle: Path, data: Path, folder: Path) -> NDArray[np.int64]:
    """Copy a bundle's files, write the forms that take bytes, and the inputs; return the labels."""
    for path in bundle.glob("*.onnx"):
        shutil.copy(path, folder)
    for path in sorted(folder.glob("*int8*.onnx")):
        write_pixel_form(path, json.loads((bundle / "preprocess.json").read_text()))
    preprocess = read_preprocess(bundle)
    names = (bundle / "labels.txt").read_text().splitlines()
    examples = find_examples(data, preprocess, names)
    pixels = np.stack([examples.pixels(index) for index in examples.chosen])
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "floats.npy", preprocess.normalize(pixels))
    return examples.truths[examples.chosen]


def tabulate(folder: Path, labels: NDArray[np.int64]) -> list[str]:
    """Return a table: for each runtime and file its agreement with ONNX Runtime here, accuracies, and the logits' distance."""
    here, lines = (
        run_here(folder),
        [f"{len(labels)} images", "", "| runtime | file | agreement | top-1 here | top-1 there | logits apart, in σ |"],
    )
    lines.append("|---|---|---|---|---|---|")
    for runtime in filter(is_there, PROGRAMS):
        found, facts = run(runtime, folder)
        for name, logits in here.items():
            apart = float(np.abs(found[name] - logits).max() / logits.std())
            accuracies = f"{score(logits, labels):.2%} | {score(found[name], labels):.2%}"
            lines.append(f"| {runtime} | {name} | {agreement(found[name], logits):.2%} | {accuracies} | {apart:.1e} |")
        lines.append(f"<!-- {runtime}: {json.dumps(facts)} -->")
    return lines


def main(arguments: list[str]) -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as root:
        if arguments:
            bundle, data = map(Path, arguments)
            sys.stdout.write("\n".join(tabulate(Path(root), write_bundle_inputs(bundle, data, Path(root)))) + "\n")
            return
        for kind in (Residual, Mobile):
            folder = Path(root, kind.__name__)
            folder.mkdir()
            labels, _ = write_digits(kind, folder, targets=tuple(name for name in TARGETS if name != "cuda"))
            sys.stdout.write("\n".join([f"\n{kind.__name__}", *tabulate(folder, labels)]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
