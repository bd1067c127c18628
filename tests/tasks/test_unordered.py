"""Outputs whose rows are a set: a network whose queries are chosen by top-k, through the trace, losses, scores and golden outputs."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from compress.cli import app
from compress.data.batches import Batch
from compress.distillation.step import TeacherOutput, distillation
from compress.errors import CompressError
from compress.models.architectures import build
from compress.models.outputs import serve_
from compress.quant.graph.trace import trace
from compress.quant.prepare import groups, of_chosen_rows, prepare
from compress.recipe.arguments import as_served
from compress.recipe.losses import MSETerm
from compress.recipe.schema import Recipe
from compress.tasks.aligned import aligned, aligning
from compress.tasks.tensors import TENSORS as TASK
from export.bundle.golden import Golden
from export.errors import BundleError
from export.onnx_file.outputs import Output, matched, packed
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.runtime.session import infer, open_session
from export.tasks.tensors import TENSORS

ROWS = 5
SET = (Output("logits", (ROWS, 3), 1.0, True), Output("boxes", (ROWS, 4), 1.0, True), Output("dense", (6,)))


class Queries(nn.Module):
    """The rows of a map with the highest scores, their boxes refined by a layer, as RT-DETR writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.score, self.box = nn.Linear(16, 3), nn.Linear(16, 4)
        self.decoder = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        self.steps = nn.Buffer(torch.tensor([0.1, 0.2, 0.3, 0.4]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        rows = self.body(images).flatten(2).transpose(1, 2)  # (n, places, 16)
        torch._check_tensor_all(torch.full((1, 2), rows.shape[1]).sum() == 2 * rows.shape[1])
        scores, places = self.score(rows), self.box(rows).sigmoid()
        chosen = scores.max(2).values.topk(ROWS, dim=1).indices.unsqueeze(2)
        kept = rows.gather(1, chosen.expand(-1, -1, 16))
        start = torch.zeros([len(rows), 1, 4]) + places.gather(1, chosen.expand(-1, -1, 4))
        moves = self.decoder(kept)
        moves[..., :2] += start[..., :2]
        moves[..., 2:] -= F.linear(start, self.steps).unsqueeze(-1)
        return {"logits": scores.gather(1, chosen.expand(-1, -1, 3)), "boxes": moves, "dense": scores}


def shuffled(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return packed outputs with the rows of logits and boxes in another order in every image."""
    logits, boxes = array[:, : 3 * ROWS].reshape(-1, ROWS, 3), array[:, 3 * ROWS : 7 * ROWS].reshape(-1, ROWS, 4)
    order = np.stack([random.permutation(ROWS) for _ in array])[:, :, None]
    return packed([np.take_along_axis(logits, order, 1), np.take_along_axis(boxes, order, 1), array[:, 7 * ROWS :]])


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 7 * ROWS + 6)).astype(np.float32)


def test_rows_are_assigned_with_the_least_sum_of_distances() -> None:
    random = np.random.default_rng(1)
    one = (Output("rows", (ROWS, 2), 1.0, True),)
    for _ in range(20):
        mine, its = random.normal(size=(2, 1, 2 * ROWS))
        found = matched(mine, its, one).reshape(ROWS, 2)
        rows, wanted = mine.reshape(ROWS, 2), its.reshape(ROWS, 2)
        least = min(np.square(rows[list(order)] - wanted).sum() for order in permutations(range(ROWS)))
        assert np.isclose(np.square(found - wanted).sum(), least)


def test_rows_of_several_outputs_move_together_and_the_others_stay(truth: np.ndarray) -> None:
    moved = shuffled(truth, np.random.default_rng(2))
    assert not np.array_equal(moved, truth)
    assert np.array_equal(matched(moved, truth, SET), truth)
    ordered = [replace(one, unordered=False) for one in SET]
    assert matched(moved, truth, ordered) is moved
    broken = np.where(np.arange(truth.shape[1]) == 4, np.nan, moved)
    assert np.isnan(matched(broken, truth, SET)).sum() == len(truth)  # NaN is matched like any value, and stays


def test_a_set_in_another_order_scores_and_agrees_fully(truth: np.ndarray) -> None:
    moved = shuffled(truth, np.random.default_rng(3))
    for outputs, same in ((SET, True), (tuple(replace(one, unordered=False) for one in SET), False)):
        task = TENSORS.of(outputs)
        score = task.total(task.statistics(moved, truth, ()))
        kept = [task.kept(part) for part in (moved, truth)]
        assert (score > 0.999) == same
        assert (task.agreement(*kept).min() > 0.999) == same
        assert (task.divergence(*map(task.evidence, (moved, truth))).max() < 1e-9) == same


def test_golden_outputs_in_another_order_are_the_same(truth: np.ndarray) -> None:
    none = np.zeros((8, 1), np.float32)
    golden = Golden(none, none, none, {"a": truth}, {"a": dict.fromkeys(("logits", "boxes", "dense"), 1e-3)}, {}, SET)
    moved = shuffled(truth, np.random.default_rng(4))
    assert golden.differing("a", moved) == []
    moved[2, 0] += 1
    assert golden.differing("a", moved) == [2]


def test_losses_compare_rows_after_matching(truth: np.ndarray) -> None:
    taught = torch.from_numpy(truth)
    found = torch.from_numpy(shuffled(truth, np.random.default_rng(5))).requires_grad_()
    assert torch.equal(aligned(found, taught, served=SET), found)
    task = aligning(TASK, SET)
    loss = task.loss(found + 0.1, taught, label_smoothing=0.0)
    assert loss.item() == pytest.approx(0.01, rel=1e-4)
    loss.backward()
    assert found.grad is not None
    assert aligning(TASK, [replace(one, unordered=False) for one in SET]) is TASK


class Refining(nn.Module):
    """Boxes that two layers refine one after another, the second from the first's without their gradient, as DETRs write it."""

    def __init__(self, *, detaches: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.detaches = nn.Linear(12, 4 * ROWS), nn.Linear(4 * ROWS, 4 * ROWS), detaches

    def forward(self, images: Tensor) -> Tensor:
        boxes = self.first(images.flatten(1))
        boxes = (boxes.detach() if self.detaches else boxes).tanh()
        return torch.cat([torch.ones_like(boxes[:, : 3 * ROWS]), boxes + self.second(boxes), boxes[:, :6]], 1)


def test_layers_that_refine_boxes_learn_from_the_last_ones_loss(truth: np.ndarray) -> None:
    images, taught = torch.randn(8, 3, 2, 2), torch.from_numpy(truth)
    found: dict[tuple[bool, tuple[Output, ...]], Tensor] = {}
    for detaches, outputs in ((True, SET), (False, SET), (True, ())):
        network = Refining(detaches=detaches)
        task, terms = aligning(TASK, outputs), [MSETerm(name="mse")]
        teacher = lambda _batch: TeacherOutput(taught, {})  # noqa: E731
        learner, step = distillation(terms, task, student=network, teacher=teacher, images=images[:1], seed=0)
        step(learner.train(), Batch(images, taught), 0.0)["loss"].backward()
        grad = network.first.weight.grad
        found[detaches, outputs] = torch.empty(0) if grad is None else grad
    assert torch.equal(found[True, SET], found[False, SET])
    assert found[True, SET].abs().max() > 0
    assert not len(found[True, ()])  # of other networks it is their own business


def test_a_choice_by_top_k_is_one_graph_for_any_number_of_images_and_what_follows_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = serve_(Queries().eval(), ("logits", "boxes", "dense"))
    images = torch.randn(3, 3, 16, 16)
    graph = trace(network, images)
    assert torch.allclose(graph(images), network(images), atol=1e-5)
    assert of_chosen_rows(graph) == ("decoder.0", "decoder.2")
    assert set(groups(prepare(network, TARGETS["cpu_avx2"], images))) - set(groups(graph)) == set()
    quantized = prepare(network, TARGETS["cpu_avx2"], images)
    kinds = {name: type(quantized.get_submodule(name)).__name__ for name in ("body.0", "decoder.0", "decoder.2")}
    assert kinds == {"body.0": "QuantConv2d", "decoder.0": "Linear", "decoder.2": "Linear"}
    to_onnx(network, tmp_path / "net.onnx", shape=(3, 16, 16), metadata={})
    for count in (1, 3):
        got = infer(open_session(tmp_path / "net.onnx"), images[:count].numpy())
        assert np.allclose(got, network(images[:count]).detach().numpy(), atol=1e-5)


def test_unordered_is_refused_where_an_output_has_no_rows_or_is_alone() -> None:
    recipe = Recipe.model_validate(
        {"name": "a", "task": "tensors", "model": {"arch": "hf:folder", "outputs": {"a": {"unordered": True}}}, "stages": [{"stage": "source"}]}
    )  # fmt: skip
    assert as_served(recipe, [Output("a", (5, 2)), Output("b", (3,))])[0].unordered
    for outputs in ([], [Output("a", (5,)), Output("b", (3,))]):
        with pytest.raises(CompressError, match="unordered needs several outputs"):
            as_served(recipe, outputs)


def test_len_is_pythons_own_again_after_an_export() -> None:
    trace(serve_(Queries().eval(), ()), torch.randn(1, 3, 16, 16))
    assert "len" not in globals()


def test_bundles_refuse_an_order_that_is_no_truth_value() -> None:
    from export.bundle.ends import outputs_of

    end = {"name": "a", "shape": [1, 2], "dtype": "float32", "weight": 1.0}
    known = outputs_of({"schema_version": 4, "outputs": [end | {"unordered": True}, end | {"name": "b"}]})
    assert [one.unordered for one in known] == [True, False]
    with pytest.raises(BundleError, match="outputs"):
        outputs_of({"schema_version": 4, "outputs": [end | {"unordered": 1}, end | {"name": "b"}]})


RECIPE = """
name: chosen
task: tensors
target: cpu_avx2
data: {{image_size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
model: {{arch: "{file}:network", weights: {weights}, outputs: {{logits: {{unordered: true}}, boxes: {{weight: 2, unordered: true}}, dense: 1}}}}
stages:
  - {{stage: source}}
  - {{stage: prune, keep_macs: 0.7, reconstruct_images: 64}}
  - {{stage: distill, loss: [{{name: mse}}], fit: {{epochs: 1, batch_size: 32, lr: 0.01, clip_norm: 1}}}}
  - {{stage: ptq, calibration_images: 64, methods: [minmax]}}
  - {{stage: export, verify_images: 16}}
  - {{stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}}
"""


@pytest.mark.slow
def test_a_network_of_chosen_queries_goes_through_the_whole_chain(photos: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(Queries().state_dict(), tmp_path / "own.safetensors")
    (tmp_path / "own.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_unordered import Queries\ndef network():\n    return Queries()\n")  # fmt: skip
    (tmp_path / "own.yaml").write_text(RECIPE.format(file=tmp_path / "own.py", weights=tmp_path / "own.safetensors"))
    command = ["run", str(tmp_path / "own.yaml"), "--data", str(photos), "--out", str(tmp_path), "--trust-code"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "chosen/bundle/bundle.json").read_text())
    assert [(one["name"], one["weight"], one.get("unordered", False)) for one in manifest["outputs"]] == [
        ("logits", 1.0, True),
        ("boxes", 2.0, True),
        ("dense", 1.0, False),
    ]


def test_rt_detr_of_transformers_is_one_graph(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    body = transformers.RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4])  # fmt: skip
    sizes = {f"{part}_{name}": 16 for part in ("encoder", "decoder") for name in ("ffn_dim",)}
    config = transformers.RTDetrConfig(backbone_config=body, encoder_in_channels=[16] * 3, encoder_hidden_dim=16, d_model=16, decoder_in_channels=[16] * 3, num_queries=4, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, hidden_expansion=0.5, num_labels=3, **sizes)  # fmt: skip
    transformers.RTDetrForObjectDetection(config).save_pretrained(tmp_path)
    names = ("logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits")
    network = build(f"hf:{tmp_path}", num_classes=3, outputs=names)
    images = torch.randn(3, 3, 64, 64)
    graph = trace(network, images)
    assert torch.allclose(graph(images), network(images), atol=1e-3)
    assert any("decoder.layers.0.self_attn" in name for name in of_chosen_rows(graph))
