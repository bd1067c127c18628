"""Run every ONNX file of a folder on OpenVINO's CPU plugin: FOLDER OUT PRECISION → OUT/*.npy and OUT/facts.json.

PRECISION is f32 (the hint that keeps the float parts in float32), or `default` (the plugin chooses: bfloat16 where the
processor has it). The folder has the inputs in floats.npy and pixels.npy. Needs openvino and numpy, nothing of this project.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import openvino  # type: ignore[import-not-found]


def main(folder: Path, out: Path, precision: str) -> None:
    """Write every file's outputs, the plugin's version, and for each file its precision and the layers' kernels."""
    out.mkdir()
    inputs = {"f32": np.load(folder / "floats.npy"), "u8": np.load(folder / "pixels.npy")}
    core = openvino.Core()
    chosen = {} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision}
    files = {}
    for path in sorted(folder.glob("*.onnx")):
        compiled = core.compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, **chosen})
        outputs = compiled(inputs[compiled.input(0).element_type.get_type_name()])[0]
        np.save(out / f"{path.stem}.npy", outputs)
        hint = compiled.get_property("INFERENCE_PRECISION_HINT")
        files[path.stem] = {"precision": hint.get_type_name(), "layers": layers(compiled.get_runtime_model())}
    facts = {"version": core.get_versions("CPU")["CPU"].build_number, "files": files}
    (out / "facts.json").write_text(json.dumps(facts))


def layers(graph: openvino.Model) -> dict[str, int]:
    """Return how many convolutions and fully connected layers run in which kernel and runtime precision."""
    infos = [node.get_rt_info() for node in graph.get_ops()]
    words = [[info[key].astype(str) for key in ("layerType", "runtimePrecision", "primitiveType")] for info in infos]
    return dict(Counter(" ".join(found) for found in words if found[0] in ("Convolution", "FullyConnected", "MatMul")))


main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
