"""Time the INT8 file of a whole network against FP32, of the same network and of what it was cut from: one image, one thread, random weights.

By the thread's own processor time, which other work on the machine does not lengthen, in turns:

    PYTHONPATH=tools:tests python -m elsewhere.speed torchvision:resnet50 torchvision:mobilenet_v2
    PYTHONPATH=tools:tests python -m elsewhere.speed ssd:resnet18 --classes 10 --image-size 320 --keep 0.5
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from chain import TARGET, crops, enlivened
from planning import cuts_to

from compress.models.architectures import build
from compress.models.structure import classifier
from compress.pruning.plan import cut_
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, prepare
from export.onnx_file.to_onnx import to_onnx
from export.proof.audit import audit
from export.runtime.session import bind, open_session

SECONDS = 3.0


def processor_ms(runs: Mapping[str, Callable[[], object]]) -> dict[str, np.ndarray]:
    """Return the processor time of each run in milliseconds, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.thread_time() + SECONDS * len(runs)
    while time.thread_time() < end:
        for name, run in runs.items():
            start = time.thread_time()
            run()
            found[name].append(1e3 * (time.thread_time() - start))
    return {name: np.array(times) for name, times in found.items()}


def compare(arch: str, classes: int, size: int, keep: float) -> str:
    """Return a line: milliseconds of each file, and how many times as fast INT8 is."""
    torch.manual_seed(0)
    images, _ = crops(2, size, seed=0)
    shape = (3, size, size)
    model = enlivened(build(arch, num_classes=classes, shape=shape), images)
    with tempfile.TemporaryDirectory() as folder:
        names = ("uncut", "fp32", "int8") if keep < 1 else ("uncut", "int8")
        files = {name: Path(folder, f"{name}.onnx") for name in names}
        to_onnx(model, files["uncut"], shape=shape, metadata={})
        if keep < 1:
            cut_(model, images[:1], cuts_to(model, keep, size, exclude=(classifier(model),)))
            to_onnx(model, files["fp32"], shape=shape, metadata={})
        prepared = prepare(model, TARGET, images)
        calibrate_(prepared, [images], "minmax")
        to_onnx(deploy(prepared), files["int8"], shape=shape, metadata={})
        layers = audit(files["int8"])
        runs = {name: bind(open_session(file, threads=1), images[:1].numpy()) for name, file in files.items()}
        times = processor_ms(runs)
    rng = np.random.default_rng(0)
    rounds = len(times["int8"])
    chosen = rng.integers(0, rounds, (2000, rounds))
    medians = {name: np.median(values[chosen], axis=1) for name, values in times.items()}
    words = [f"{name} {float(np.median(values)):.2f} ms" for name, values in times.items()]
    for name in names[:-1]:
        low, high = np.percentile(medians[name] / medians["int8"], [2.5, 97.5])
        ratio = np.median(times[name]) / np.median(times["int8"])
        words.append(f"int8 over {name} {ratio:.2f} [{low:.2f}, {high:.2f}]")
    return f"{arch}: {', '.join(words)}, {len(layers['integer_layers'])} integer layers, {len(layers['float_layers'])} float"


def main() -> None:
    """Time the architectures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="+")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--keep", type=float, default=1.0, help="of the multiply-accumulates, cut by l2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for arch in arguments.archs:
        sys.stdout.write(compare(arch, arguments.classes, arguments.image_size, arguments.keep) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
