"""What a server finds in an exported file."""

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import Mobile, lively
from torch import nn

from export import ptq
from export.audit import audit
from export.graph import save_model, to_float16, weight_levels
from export.targets import TARGETS
from export.to_onnx import to_onnx

Method = Literal["minmax", "entropy", "percentile"]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return lively(Mobile(5))


@pytest.fixture(scope="module")
def exported(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(network, path, image_size=16, metadata={"task": "classification"})
    return path


def test_the_file_has_opset_18_ir_9_and_nothing_beside_it(exported: Path) -> None:
    model = onnx.load(exported)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version == 9
    assert [path.name for path in exported.parent.iterdir()] == ["model.onnx"]
    assert {entry.key: entry.value for entry in model.metadata_props} == {"task": "classification"}


def test_the_file_holds_no_path_or_stack_trace_of_this_machine(exported: Path) -> None:
    content = exported.read_bytes()
    assert b".py" not in content
    assert str(Path.cwd()).encode() not in content
    assert str(Path.home()).encode() + b"/" not in content


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_file_equals_torch_at_any_batch(network: nn.Module, exported: Path, batch: int) -> None:
    images = torch.randn(batch, 3, 16, 16)
    (logits,) = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"]).run(
        None, {"input": images.numpy()}
    )
    with torch.no_grad():
        assert np.allclose(logits, network(images).numpy(), atol=1e-4)


def test_float16_takes_and_gives_float32(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    save_model(to_float16(onnx.load(exported)), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float)"
    assert path.stat().st_size < 0.75 * exported.stat().st_size


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize("target", ["cpu_avx2", "cpu_vnni"])
def test_ptq_runs_in_integers_on_the_targets_grid(exported: Path, tmp_path: Path, target: str, method: Method) -> None:
    path = tmp_path / "ptq.onnx"
    batches = (np.random.default_rng(i).standard_normal((8, 3, 16, 16), dtype=np.float32) for i in range(2))
    ptq.quantize(exported, path, batches, target=TARGETS[target], method=method)
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version == 9
    assert not [name for name in audit(path).float_layers if "conv" in name.lower()]
    levels = weight_levels(model)
    assert levels
    # ONNX Runtime's reduced range ends at 64, one above ours; two products of 255 * 64 still fit into 16 bits.
    limit = 64 if target == "cpu_avx2" else 127
    assert all(np.abs(level.astype(int)).max() <= limit for level in levels.values())
