"""Write Triton's model repositories: config.pbtxt for each kind of machine, labels, a warm-up, and the model files.

serving/triton/NAME/config.pbtxt         for Triton's ONNX Runtime backend; the same folder serves OpenVINO Model Server
                    configs/KIND.pbtxt   the same for `--model-config-name=KIND`: cpu, cuda, tensorrt
                    labels.txt           the labels for Triton's classification extension
                    warmup/golden        the first golden input, raw
                    1/model.onnx         the file that config.pbtxt serves; 1/model.cuda, 1/model.tensorrt: files for other kinds
serving/triton-answers/NAME/             if the bundle has it: uint8 image in, prediction out (a mask; boxes, scores, labels)
serving/triton-python/NAME/              for Triton's Python backend: config.pbtxt, labels.txt, warmup/golden, 1/model.py, 1/model.onnx
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import onnx
from onnx import TensorProto

from export.command.files import write_text
from export.names import LABELS
from export.onnx_file.model_file import ModelFile, Value

Kind = Literal["cpu", "cuda", "tensorrt"]
DATATYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8"}  # Triton's and the Open Inference Protocol's
TYPES = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.UINT8: "TYPE_UINT8", TensorProto.INT64: "TYPE_INT64"}
TRITON, TRITON_PYTHON, TRITON_ANSWERS = "triton", "triton-python", "triton-answers"
SAMPLE = "golden"


@dataclass(frozen=True)
class Serving:
    """A server's settings, as benchmarked: the file for each kind of machine, the kind to serve, threads, batches.

    `threads` is for one session on the CPU, 0 is all cores; None, if nothing was benchmarked, is the server's default.
    """

    files: dict[Kind, str]
    kind: Kind
    threads: int | None
    instances: int
    max_batch_size: int

    @property
    def served(self) -> str:
        """The file to serve."""
        return self.files[self.kind]


def write_repositories(
    folder: Path, name: str, facts: Mapping[str, ModelFile], serving: Serving, *, sample: bytes
) -> None:
    """Write both repositories into `folder`/serving from the bundle's files in `folder`; `sample` is one raw input."""
    python, onnx = (folder / "serving" / repository / name for repository in (TRITON_PYTHON, TRITON))
    for model in (python, onnx):
        (model / "1").mkdir(parents=True)
        (model / "warmup").mkdir()
        (model / "warmup" / SAMPLE).write_bytes(sample)
        shutil.copyfile(folder / LABELS, model / LABELS)
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), python / "1" / "model.py")
    share(folder / f"{serving.files['cpu']}.onnx", python / "1" / "model.onnx")
    write_text(python / "config.pbtxt", python_config(name, facts[serving.files["cpu"]], serving))
    for kind, file in serving.files.items():
        config = onnx_config(name, facts[file], serving, kind)
        write_text(onnx / "configs" / f"{kind}.pbtxt", config)
        if kind == serving.kind:
            write_text(onnx / "config.pbtxt", config)
        if not (onnx / "1" / filename(serving, kind)).exists():
            share(folder / f"{file}.onnx", onnx / "1" / filename(serving, kind))


def filename(serving: Serving, kind: Kind) -> str:
    """Return the name of a kind's model file; only one ends in .onnx, because OpenVINO Model Server takes any such file."""
    return "model.onnx" if serving.files[kind] == serving.served else f"model.{kind}"


def onnx_config(name: str, facts: ModelFile, serving: Serving, kind: Kind) -> str:
    """Return the configuration for the ONNX Runtime backend on a kind of machine."""
    lines = [f'backend: "onnxruntime"\ndefault_model_filename: "{filename(serving, kind)}"']
    lines.append(common(name, facts, serving))
    lines.append(instances(serving, "KIND_CPU" if kind == "cpu" else "KIND_GPU"))
    if kind == "cpu" and serving.threads is not None:
        lines.append(parameter("intra_op_thread_count", str(serving.threads)))
        lines.append(parameter("inter_op_thread_count", "1"))
    if kind == "tensorrt":
        lines.append(tensorrt(facts.precision.upper()))
    return "\n".join(lines)


def python_config(name: str, facts: ModelFile, serving: Serving) -> str:
    """Return the configuration for the Python backend, on a CPU."""
    threads = parameter("intra_op_thread_count", str(serving.threads or 0))
    return "\n".join(['backend: "python"', common(name, facts, serving), instances(serving, "KIND_CPU"), threads])


def answering_repository(name: str, model: onnx.ModelProto, *, unlike: ModelFile) -> dict[str, bytes]:
    """Return the files, by path in a bundle, of a repository that serves a model with any number of outputs.

    Empty if its outputs are those of the bundle's own files.
    """
    if [one.name for one in model.graph.output] == [one.name for one in unlike.outputs]:
        return {}
    values = [
        f"{kind} [\n"
        + ",\n".join(
            f"  {{ name: {json.dumps(one.name)} data_type: {TYPES[one.type.tensor_type.elem_type]} dims: [ {_dims(one)} ] }}"
            for one in tensors
        )
        + "\n]"
        for kind, tensors in (("input", model.graph.input), ("output", model.graph.output))
    ]
    config = "\n".join(['backend: "onnxruntime"', f'name: "{name}"', "max_batch_size: 0", *values, ""])
    file = answering_model(name)
    return {f"{PurePosixPath(file).parents[1]}/config.pbtxt": config.encode(), file: model.SerializeToString()}


def answering_model(name: str) -> str:
    """Return where a bundle's model with other outputs is."""
    return f"serving/{TRITON_ANSWERS}/{name}/1/model.onnx"


def _dims(value: onnx.ValueInfoProto) -> str:
    """Return a tensor's sizes, -1 for a dynamic one."""
    return ", ".join(str(dim.dim_value or -1) for dim in value.type.tensor_type.shape.dim)


def _sizes(value: Value) -> str:
    return ", ".join(map(str, value.shape[1:] or (1,)))


def common(name: str, facts: ModelFile, serving: Serving) -> str:
    """Return the part that all configurations share: tensors, batching, warm-up."""
    given = facts.input
    labels = "" if facts.signature else f' label_filename: "{LABELS}"'
    dims, kind = _sizes(given), f"TYPE_{DATATYPES[given.dtype]}"
    wanted = ",\n".join(
        f"  {{ name: {json.dumps(one.name)} data_type: TYPE_{DATATYPES[one.dtype]} dims: [ {_sizes(one)} ]{labels} }}"
        for one in facts.outputs
    )
    batching = "dynamic_batching { }\n" if serving.max_batch_size > 1 else ""
    return f"""\
name: "{name}"
max_batch_size: {serving.max_batch_size}
input [
  {{ name: {json.dumps(given.name)} data_type: {kind} dims: [ {dims} ] }}
]
output [
{wanted}
]
{batching}model_warmup [
  {{
    name: "{SAMPLE}"
    batch_size: 1
    inputs {{
      key: {json.dumps(given.name)}
      value {{ data_type: {kind} dims: [ {dims} ] input_data_file: "{SAMPLE}" }}
    }}
  }}
]
"""


def instances(serving: Serving, kind: str) -> str:
    """Return the number of sessions, and where they run."""
    return f"instance_group [\n  {{ count: {serving.instances} kind: {kind} }}\n]\n"


def parameter(key: str, value: str) -> str:
    """Return one setting of the backend."""
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


def tensorrt(precision: str) -> str:
    """Return the setting for the TensorRT execution provider; INT8 uses the ranges in the file."""
    return f"""\
optimization {{
  execution_accelerators {{
    gpu_execution_accelerator [
      {{ name: "tensorrt" parameters {{ key: "precision_mode" value: "{precision}" }} }}
    ]
  }}
}}
"""


def share(source: Path, path: Path) -> None:
    """Make `path` a hard link to `source` if the file system can, else a copy."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
