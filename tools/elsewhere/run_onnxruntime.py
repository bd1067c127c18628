"""Run every ONNX file of a folder in this environment's ONNX Runtime: FOLDER OUT → OUT/*.npy and OUT/facts.json.

The folder has the inputs in floats.npy and pixels.npy. Needs onnxruntime and numpy, nothing of this project.
"""

import json
import platform
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(folder: Path, out: Path) -> None:
    """Write every file's outputs and the runtime's version."""
    out.mkdir()
    inputs = {"tensor(float)": np.load(folder / "floats.npy"), "tensor(uint8)": np.load(folder / "pixels.npy")}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for path in sorted(folder.glob("*.onnx")):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        (outputs,) = session.run(None, {given.name: inputs[given.type]})
        np.save(out / f"{path.stem}.npy", outputs)
    (out / "facts.json").write_text(json.dumps({"version": onnxruntime.__version__, "machine": platform.machine()}))


main(Path(sys.argv[1]), Path(sys.argv[2]))
