"""What a server finds in an exported file."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import Mobile, lively
from torch import fx, nn

from compress.models.outputs import serve_
from compress.pruning.inside_heads import open_heads_
from compress.quant.fake_quant import ActivationQuantizer
from compress.quant.graph.trace import trace
from compress.quant.prepare import deploy, prepare, quantizers
from export.onnx_file import ptq
from export.onnx_file.graph import save_model, to_float16, weight_levels
from export.onnx_file.model_file import parse
from export.onnx_file.names import module_of, unique
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.onnx_file.wiring import wire
from export.proof.audit import audit
from export.proof.submodels import quantized_tensors

Method = Literal["minmax", "entropy", "percentile"]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return lively(Mobile(5))


@pytest.fixture(scope="module")
def exported(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(network, path, shape=(3, 16, 16), metadata={"task": "classification"})
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


def test_nodes_are_named_after_their_modules(network: nn.Module, exported: Path) -> None:
    nodes = onnx.load(exported).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    assert all(node.output[0] in (node.name, "logits") for node in nodes)
    layers = {name for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    named = {module_of(node.name): node.op_type for node in nodes if node.op_type in ("Conv", "Gemm")}
    assert named.keys() == layers, "also where batch-norm was folded in"
    modules = dict(network.named_modules())
    assert all(module_of(name) in modules for name in names if "/" in name)


class OtherAttention(nn.Module):
    """Attention within four blocks of an image, as in NesT and Twins, or with one head and a bias, as in SAM."""

    def __init__(self, blocks: bool) -> None:
        super().__init__()
        self.stem, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)
        self.blocks = blocks

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.qkv(self.stem(images).flatten(2).transpose(1, 2))  # (n, 16, 48)
        if self.blocks:
            parts = (
                tokens.reshape(-1, 4, 4, 3, 2, 8).permute(3, 0, 1, 4, 2, 5).unbind(0)
            )  # (n, blocks, heads, tokens, 8)
            attended: torch.Tensor = nn.functional.scaled_dot_product_attention(*parts)
            return attended.mean((1, 2, 3))
        query, key, value = tokens.reshape(-1, 16, 3, 16).permute(2, 0, 1, 3).unbind(0)  # (n, tokens, 16)
        bias = query @ key.transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return attended.mean(1)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_attention_of_three_or_five_dimensions_equals_torch(traced: bool, blocks: bool, tmp_path: Path) -> None:
    model, images = OtherAttention(blocks).eval(), torch.randn(3, 3, 16, 16)
    graph = trace(model, images) if traced else model
    to_onnx(graph, tmp_path / "model.onnx", shape=(3, 16, 16), metadata={})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"input": images.numpy()})[0], model(images), atol=1e-6)


class Clipped(nn.Module):
    """A tensor that is clipped twice in a row, in two places: torch's optimizer makes one clip of each two, with constants of one name."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        chances = images.sigmoid()
        return chances.clamp(0, 1).clamp(min=0.2) + 2 * chances.clamp(0.1, 0.9).clamp(max=0.7)


def test_clips_of_one_tensor_keep_their_bounds(tmp_path: Path) -> None:
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    to_onnx(Clipped().eval(), tmp_path / "model.onnx", shape=(3, 4, 4), metadata={})
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input": images.numpy()})[0]
    np.testing.assert_allclose(found, Clipped()(images), atol=1e-6)


CLIPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clamp": lambda values: values.clamp(0.1, 1),
    "in place": lambda values: (values + 0).clamp_(max=0.9, min=0),
    "clip": lambda values: torch.clip(values, -1, max=0.5),
    "of integers": lambda values: (4 * values).long().clamp(0.5, 2),
}


class Calls(nn.Module):
    """A network that is one function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.function(images)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("traced", [False, True])
def test_a_clip_takes_an_integer_beside_a_float(traced: bool, clip: str, tmp_path: Path) -> None:
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    model = Calls(CLIPS[clip]).eval()
    to_onnx(trace(model, images) if traced else model, tmp_path / "model.onnx", shape=(3, 4, 4), metadata={})
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input": images.numpy()})[0]
    np.testing.assert_allclose(found, model(images), atol=1e-6)


@pytest.mark.slow
def test_a_vision_transformer_is_written_without_a_mask_also_once_its_heads_are_open(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    network = serve_(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval(), ["pooler_output"])
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images).numpy()
    opened = copy.deepcopy(network)
    assert open_heads_(opened, images[:1])
    for one in (network, opened):
        to_onnx(one, tmp_path / "net.onnx", shape=(3, 16, 16), metadata={})
        found = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"input": images.numpy()})[0]
        assert np.allclose(found, expected, atol=1e-5)
        assert not {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node} & {"Where", "And"}


def test_functions_of_a_traced_network_are_named_after_their_nodes(network: nn.Module, tmp_path: Path) -> None:
    traced = fx.symbolic_trace(network)
    before = [(node.op, node.target) for node in traced.graph.nodes]
    to_onnx(traced, tmp_path / "model.onnx", shape=(3, 16, 16), metadata={})
    assert [(node.op, node.target) for node in traced.graph.nodes] == before, "the network is left alone"
    names = {node.name for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert names >= {"add/Add", "cat/Concat", "mean/GlobalAveragePool", "mean/Flatten"}


@pytest.mark.slow
def test_two_exports_are_the_same_bytes(network: nn.Module, exported: Path, tmp_path: Path) -> None:
    to_onnx(network, tmp_path / "again.onnx", shape=(3, 16, 16), metadata={"task": "classification"})
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


def test_a_quantizers_tensor_carries_its_module_path(network: nn.Module, tmp_path: Path) -> None:
    prepared = prepare(network, TARGETS["cpu_vnni"], torch.zeros(1, 3, 16, 16)).eval()
    for quantizer in quantizers(prepared):
        quantizer.set_range_(torch.tensor(0.0), torch.tensor(1.0))
    path = tmp_path / "int8.onnx"
    to_onnx(deploy(prepared), path, shape=(3, 16, 16), metadata={})
    paths = {name for name, module in prepared.named_modules() if isinstance(module, ActivationQuantizer)}
    assert paths <= set(quantized_tensors(wire(parse(path))))
    assert audit(path)["float_layers"] == []


def test_the_second_of_a_name_is_numbered() -> None:
    assert unique(["a", "a", "a_1", "b", "a"]) == ["a", "a_1", "a_1_1", "b", "a_2"]


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("layer1.0.conv1/Conv", "layer1.0.conv1"),
        ("stem.0/Conv_token_12", "stem.0"),
        ("stem.2/Clip_nchwc", "stem.2"),
        ("quantizer_x/DequantizeLinear/duplicated_token_3", "quantizer_x"),
        ("matmul/MatMul/MatMulScaleFusion/", "matmul"),
        ("Concat", "Concat"),
    ],
)
def test_a_module_is_found_in_a_name_that_onnx_runtime_changed(node: str, module: str) -> None:
    assert module_of(node) == module


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
    assert set(audit(path)["float_layers"]) <= {"head"}
    levels = weight_levels(model)
    assert levels
    # ONNX Runtime's reduced range ends at 64, one above ours; two products of 255 * 64 still fit into 16 bits.
    limit = 64 if target == "cpu_avx2" else 127
    assert all(np.abs(level.astype(int)).max() <= limit for level in levels.values())
