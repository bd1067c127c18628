"""Time the INT8 file of a whole network against its FP32 file: 224 pixels, one image, one thread, random weights, in turns.

By the thread's own processor time, which other work on the machine does not lengthen:

    PYTHONPATH=tests python -m elsewhere.speed torchvision:resnet50 torchvision:mobilenet_v2
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from chain import TARGET, crops, enlivened

from compress.models.architectures import build
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, prepare
from export.audit import audit
from export.onnx_file.to_onnx import to_onnx
from export.runtime.session import bind, open_session

SIZE, SECONDS = 224, 3.0


def processor_ms(runs: Mapping[str, Callable[[], object]]) -> dict[str, np.ndarray]:
    """Return the processor time of each run in milliseconds, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.thread_time() + SECONDS
    while time.thread_time() < end:
        for name, run in runs.items():
            start = time.thread_time()
            run()
            found[name].append(1e3 * (time.thread_time() - start))
    return {name: np.array(times) for name, times in found.items()}


def main() -> None:
    """Time the architectures that the command line names."""
    torch.set_num_threads(1)
    images, _ = crops(2, SIZE, seed=0)
    for arch in sys.argv[1:]:
        torch.manual_seed(0)
        model = enlivened(build(arch, num_classes=1000), images)
        prepared = prepare(model, TARGET, images)
        calibrate_(prepared, [images], "minmax")
        with tempfile.TemporaryDirectory() as folder:
            files = {"fp32": Path(folder, "fp32.onnx"), "int8": Path(folder, "int8.onnx")}
            to_onnx(model, files["fp32"], shape=(3, SIZE, SIZE), metadata={})
            to_onnx(deploy(prepared), files["int8"], shape=(3, SIZE, SIZE), metadata={})
            layers = audit(files["int8"])
            runs = {name: bind(open_session(file, threads=1), images[:1].numpy()) for name, file in files.items()}
            times = processor_ms(runs)
        rng = np.random.default_rng(0)
        chosen = rng.integers(0, len(times["fp32"]), (2000, len(times["fp32"])))
        medians = {name: np.median(values[chosen], axis=1) for name, values in times.items()}
        low, high = np.percentile(medians["fp32"] / medians["int8"], [2.5, 97.5])
        fp32, int8 = (float(np.median(times[name])) for name in ("fp32", "int8"))
        sys.stdout.write(
            f"{arch}: FP32 {fp32:.2f} ms, INT8 {int8:.2f} ms, {fp32 / int8:.2f} times [{low:.2f}, {high:.2f}], "
            f"{len(layers['integer_layers'])} integer layers, {len(layers['float_layers'])} float\n"
        )


if __name__ == "__main__":
    main()
