"""A folder of trained networks' files and inputs, and what each runtime makes of them."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx_files import PREPROCESS
from sklearn.datasets import load_digits
from torch import nn

from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, prepare
from export.images.preprocess import Preprocess
from export.onnx_file.graph import save_model, to_float16
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.onnx_file.uint8_input import PIXELS, with_uint8_input

Logits = dict[str, NDArray[np.float32]]

SCRIPTS = Path(__file__).resolve().parent
ENVIRONMENTS = SCRIPTS.parents[1] / ".elsewhere"
PROGRAMS: dict[str, tuple[str | Path, Path]] = {
    "arm64": (ENVIRONMENTS / "arm64/python", SCRIPTS / "run_onnxruntime.py"),
    "onnxruntime": (ENVIRONMENTS / "onnxruntime/bin/python", SCRIPTS / "run_onnxruntime.py"),
    "openvino": (ENVIRONMENTS / "openvino/bin/python", SCRIPTS / "run_openvino.py"),
    "web": ("node", SCRIPTS / "run_web.mjs"),
}
ARGUMENTS: dict[str, tuple[str, ...]] = {"openvino": ("f32",), "web": (str(ENVIRONMENTS / "web/node_modules"),)}
HELD_OUT = 897  # half of them
NORMALIZE = Preprocess((16, 16), (18, 18), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)).normalize  # PREPROCESS as an object


@cache
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the digits as grey RGB images, uint8 (n, 16, 16, 3), and their labels, in an order of no meaning."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    grey = (bunch.images[order] * (255 / 16)).round().astype(np.uint8)
    return grey.repeat(2, 1).repeat(2, 2)[..., None].repeat(3, 3), bunch.target[order]


def trained(kind: type[nn.Module]) -> nn.Module:
    """Return a network that has learnt the digits that are not held out."""
    torch.manual_seed(0)
    pixels, labels = digits()
    images, targets = torch.from_numpy(NORMALIZE(pixels[HELD_OUT:])), torch.from_numpy(labels[HELD_OUT:])
    model = kind(10).train().to(memory_format=torch.channels_last)
    epochs, batch_size = 8, 32
    optimizer = torch.optim.AdamW(model.parameters())
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), targets[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval().to(memory_format=torch.contiguous_format)


def write_digits(kind: type[nn.Module], folder: Path, *, targets: tuple[str, ...]) -> tuple[NDArray[np.int64], Logits]:
    """Train, quantize after training, write FP32, FP16 and each target's INT8 file, the first one's form for bytes, and the inputs.

    Returns the labels, and for each target the logits of the fake-quantized network in torch.
    """
    model = trained(kind)
    pixels, labels = digits()
    to_onnx(model, folder / "fp32.onnx", shape=(3, 16, 16), metadata={})
    save_model(to_float16(onnx.load(folder / "fp32.onnx")), folder / "fp16.onnx")
    held_out, calibration = (torch.from_numpy(NORMALIZE(part)) for part in (pixels[:HELD_OUT], pixels[-256:]))
    in_torch = {}
    for target in targets:
        prepared = prepare(model, TARGETS[target], calibration)
        calibrate_(prepared, [calibration], "minmax")
        to_onnx(deploy(prepared), folder / f"int8_{target}.onnx", shape=(3, 16, 16), metadata={})
        with torch.no_grad():
            in_torch[target] = prepared(held_out).numpy()
    write_pixel_form(folder / f"int8_{targets[0]}.onnx", PREPROCESS)
    np.save(folder / "pixels.npy", pixels[:HELD_OUT])
    np.save(folder / "floats.npy", held_out.numpy())
    return labels[:HELD_OUT], in_torch


def write_pixel_form(path: Path, preprocess: dict[str, Any]) -> None:
    """Write beside an INT8 file the form that takes bytes."""
    save_model(with_uint8_input(onnx.load(path), preprocess), path.with_stem(f"{path.stem}_{PIXELS}"))


def run_here(folder: Path) -> Logits:
    """Return what this environment's ONNX Runtime makes of every file in the folder."""
    inputs = {"tensor(float)": np.load(folder / "floats.npy"), "tensor(uint8)": np.load(folder / "pixels.npy")}
    logits = {}
    for path in sorted(folder.glob("*.onnx")):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        (logits[path.stem],) = session.run(None, {given.name: inputs[given.type]})
    return logits


def is_there(runtime: str) -> bool:
    """Whether `make elsewhere` has made the runtime's environment."""
    return (ENVIRONMENTS / runtime / ".ready").exists()


@cache
def run(runtime: str, folder: Path) -> tuple[Logits, dict[str, Any]]:
    """Return what the runtime makes of every file in the folder, and what its script says of itself."""
    return run_script(*PROGRAMS[runtime], folder, folder / runtime, *ARGUMENTS.get(runtime, ()))


def run_script(program: str | Path, script: Path, folder: Path, out: Path, *more: str) -> tuple[Logits, dict[str, Any]]:
    """Run a script of another environment on `folder`; return the arrays and the facts that it writes into `out`."""
    command = [*map(str, (program, script, folder, out)), *more]
    # Nothing of this project: no PYTHONPATH, and another working directory.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.stem: np.load(path) for path in out.glob("*.npy")}, json.loads((out / "facts.json").read_text())


def agreement(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return the part of the images on which the arg-max is the same."""
    return float(np.mean(first.argmax(1) == second.argmax(1)))


def score(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the part of the images whose arg-max is the label."""
    return float(np.mean(logits.argmax(1) == labels))
