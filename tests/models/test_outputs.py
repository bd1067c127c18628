"""Networks and files with several outputs give them by name, or are refused where a task reads one: none is dropped in silence."""

import copy
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from compress.errors import ModelError
from compress.models.architectures import build
from compress.models.foreign import OnnxFile
from compress.models.outputs import serve_

TWO = """
import torch
class Two(torch.nn.Module):
    def __init__(self, names):
        super().__init__()
        self.names, self.layer = names, torch.nn.Conv2d(3, 4, 3)
    def forward(self, images):
        return {name: self.layer(images).mean((2, 3)) for name in self.names}
def boxes(num_classes): return Two(["logits", "pred_boxes"])
def training(num_classes): return Two(["out", "aux"])
"""


def test_a_network_that_also_gives_boxes_is_refused_and_an_auxiliary_output_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match="Two: returns pred_boxes besides logits, and one output is served"):
        build(f"{tmp_path}/two.py:boxes", num_classes=4, trust_code=True)(images)
    assert build(f"{tmp_path}/two.py:training", num_classes=4, trust_code=True)(images).shape == (2, 4)


def test_an_onnx_file_of_two_outputs_gives_both_by_name(tmp_path: Path) -> None:
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 8, 8]) for name in ("logits", "depth")]
    nodes = [helper.make_node("Relu", ["images"], ["logits"]), helper.make_node("Neg", ["images"], ["depth"])]
    graph = helper.make_graph(nodes, "two", [images], outputs)
    file = tmp_path / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    given = torch.randn(2, 3, 8, 8)
    for network in (OnnxFile(file), build(f"onnx:{file}", num_classes=0, outputs=())):
        found = serve_(network, ("depth", "logits"))(given) if isinstance(network, OnnxFile) else network(given)
        both = torch.cat([(-given).flatten(1), given.relu().flatten(1)], 1)
        assert torch.equal(found, both if isinstance(network, OnnxFile) else both.roll(192, 1))
    assert torch.equal(copy.deepcopy(network)(given), found), "a graph's copies would lose the hook"
    with pytest.raises(ModelError, match="returns depth besides logits, and one output is served"):
        build(f"onnx:{file}", num_classes=3)(given)
