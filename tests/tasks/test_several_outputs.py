"""Networks of several outputs: one tensor inside, named outputs in files, bundles, commands and servers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from networks import TwoHeaded, settled
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from compress.cli import app
from compress.data.dataset import Dataset
from compress.distillation.step import TeacherOutput, mean_loss
from compress.errors import CompressError, ModelError
from compress.models.outputs import serve_, signature_of
from compress.quant.graph.trace import trace
from compress.recipe.arguments import as_served
from compress.recipe.losses import MSETerm
from compress.recipe.schema import Recipe
from compress.report.page.pictures import examples
from compress.report.shape import Report
from compress.tasks.tensors import TENSORS as TASK
from compress.tasks.tensors import scaled, scales, squared_error_loss
from export import predict
from export.bundle.read import read_bundle
from export.check.__main__ import main as check_main
from export.command.files import sha256
from export.errors import BundleError
from export.gate.__main__ import main as gate_main
from export.onnx_file.outputs import Output, Softmax
from export.onnx_file.to_onnx import to_onnx
from export.runtime.session import infer
from export.tasks.tensors import TENSORS, statistics, total
from export.verify import main as verify_main

NETWORKS = Path(__file__).parent.parent / "networks.py"
RECIPE = """
name: two
task: tensors
target: cpu_avx2
data: {{image_size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
model: {{arch: "{networks}:two_headed", weights: {weights}}}
stages:
  - {{stage: source}}
  - {{stage: prune, keep_macs: 0.6, reconstruct_images: 64}}
  - {{stage: distill, loss: [{{name: mse}}], fit: {{epochs: 2, batch_size: 32, lr: 0.02, clip_norm: 1}}}}
  - {{stage: ptq, calibration_images: 64, methods: [minmax]}}
  - {{stage: qat, calibration_images: 64, loss: [{{name: mse}}], fit: {{epochs: 1, batch_size: 32, lr: 0.002, clip_norm: 1}}}}
  - {{stage: export, verify_images: 32}}
  - {{stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}}
"""


@pytest.fixture(scope="module")
def done(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole chain on a network with a small embedding and a map of ten times its deviation."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    network = settled(TwoHeaded())
    save_file(network.state_dict(), folder / "own.safetensors")
    (folder / "own.yaml").write_text(RECIPE.format(networks=NETWORKS, weights=folder / "own.safetensors"))
    command = ["run", str(folder / "own.yaml"), "--data", str(photos), "--out", str(folder / "runs"), "--trust-code"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return folder / "runs" / "two"


@pytest.mark.slow
def test_two_outputs_go_through_the_whole_chain(done: Path) -> None:
    report: dict[str, Any] = json.loads((done / "report.json").read_text())
    rows = {row["name"]: row for row in report["deployed"]}
    assert rows["teacher_fp32"]["score"] == pytest.approx(1, abs=1e-6)
    for name in ("student_ptq_int8", "student_int8"):
        further = rows[name]["further"]
        assert rows[name]["score"] == pytest.approx((further["embedding"] + further["heat"]) / 2)
        assert further["embedding"] > 0.5
        assert further["heat"] > 0.5
        assert further["nearest neighbour kept, embedding"] > 0.5
    for file in ("teacher_fp32", "student_fp32", "student_fp16", "student_ptq_int8", "student_int8"):
        session = onnxruntime.InferenceSession(done / f"bundle/{file}.onnx")
        shapes = {one.name: one.shape[1:] for one in session.get_outputs()}
        assert shapes == {"embedding": [12], "heat": [3, 8, 8]}
    titles = [[title for title, _ in images] for images in examples(done, cast(Report, report))]
    assert titles == [["Image", "Teacher FP32 heat", "Student INT8 heat"]] * 4


@pytest.mark.slow
def test_the_bundle_of_two_outputs_keeps_its_promises_and_passes_the_gate(
    done: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], called: Callable[..., int]
) -> None:
    bundle = done / "bundle"
    found = read_bundle(bundle)
    assert [(one.name, one.shape) for one in found.outputs] == [("embedding", (12,)), ("heat", (3, 8, 8))]
    assert len(found.labels) == 15
    assert set(found.golden.tolerance["student_int8"]) == {"embedding", "heat"}
    assert called(check_main, bundle) == 0
    assert called(verify_main, bundle, "--images", 16) == 0, capsys.readouterr().out
    pieces = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert pieces.count("embedding") == pieces.count("heat") == 2  # in each of two files
    image = next(photos.glob("3/*.png"))
    assert called(predict.main, bundle, image, "--npz", tmp_path / "npz", "--draw", tmp_path / "drawn") == 0
    with np.load(tmp_path / "npz" / f"{image.stem}.npz") as written:
        assert {name: written[name].shape for name in written} == {"embedding": (12,), "heat": (3, 8, 8)}
    assert [one.name for one in (tmp_path / "drawn").iterdir()] == [f"{image.stem}_heat.png"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]] == ["embedding", "heat", "heat"]
    judge = [bundle, "--baseline", tmp_path, "--data", photos, "--no-latency"]
    assert called(gate_main, *judge, "--update-baseline") == 0, capsys.readouterr().err
    assert called(gate_main, *judge) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_servers_see_the_outputs_by_name(done: Path) -> None:
    response = json.loads((done / "bundle/serving/response.json").read_text())
    assert [(one["name"], one["shape"]) for one in response["outputs"]] == [
        ("embedding", [1, 12]),
        ("heat", [1, 3, 8, 8]),
    ]
    golden = np.load(done / "bundle/golden/student_int8.npy")[0]
    assert np.concatenate([one["data"] for one in response["outputs"]]) == pytest.approx(golden, rel=1e-6)
    config = (done / "bundle/serving/triton/two/config.pbtxt").read_text()
    assert 'name: "heat" data_type: TYPE_FP32 dims: [ 3, 8, 8 ]' in config
    assert "label_filename" not in config


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: outputs.reverse(),
        lambda outputs: outputs[0].update(weight=0),
        lambda outputs: outputs[0].update(name="other"),
        lambda outputs: outputs[1].update(shape=[None, 3, 4, 16]),
        lambda outputs: outputs.pop(),
    ],
)
def test_a_bundle_whose_manifest_has_other_outputs_is_refused(
    done: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], object]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(done / "bundle", bundle)
    document = json.loads((bundle / "bundle.json").read_text())
    change(document["outputs"])
    (bundle / "bundle.json").write_text(json.dumps(document))
    sums = (bundle / "SHA256SUMS").read_text().splitlines()
    kept = [line for line in sums if not line.endswith("  bundle.json")]
    (bundle / "SHA256SUMS").write_text("\n".join([*kept, f"{sha256(bundle / 'bundle.json')}  bundle.json"]) + "\n")
    with pytest.raises(BundleError, match=r"bundle\.json: outputs: .*get the bundle again"):
        read_bundle(bundle)


def test_scores_and_losses_of_outputs_are_their_weighted_means_whatever_their_scales() -> None:
    random = np.random.default_rng(0)
    outputs = (Output("small", (4,), 1.0), Output("large", (2, 3, 3), 3.0))
    true = np.concatenate([random.normal(0, 0.1, (64, 4)), random.normal(5, 100, (64, 18))], 1).astype(np.float32)
    given = true + np.concatenate([random.normal(0, 0.05, (64, 4)), random.normal(0, 30, (64, 18))], 1)
    task = TENSORS.of(outputs)
    alone = [
        total(statistics(given[:, :4], true[:, :4], (4,))),
        total(statistics(given[:, 4:].reshape(-1, 2, 3, 3), true[:, 4:].reshape(-1, 2, 3, 3), (2, 3, 3))),
    ]
    rows = np.concatenate([task.statistics(given[part], true[part], (22,)) for part in (slice(9), slice(9, None))])
    assert task.total(rows) == pytest.approx((alone[0] + 3 * alone[1]) / 4)
    assert [task.further(rows)[name] for name in ("small", "large")] == pytest.approx(alone)
    units = scales(torch.from_numpy(true), outputs)
    loss = squared_error_loss(torch.from_numpy(given), torch.from_numpy(true), scale=units)
    assert 1 - float(loss) == pytest.approx((alone[0] + 3 * alone[1]) / 4, abs=1e-4)
    assert task.divergence(task.evidence(true), task.evidence(true)).tolist() == [0] * 64
    assert task.agreement(true, true) == pytest.approx(np.ones(64))


@dataclass
class Truths:
    """Training images of which only the truths matter."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_an_output_declared_a_softmax_is_compared_by_its_divergence(kind: Softmax) -> None:
    served = (Output("vector", (4,)), Output("classes", (5, 2, 2), 3.0, softmax=kind))
    shape, random = (6, 24), torch.Generator().manual_seed(0)
    true, given = (torch.randn(shape, generator=random) for _ in range(2))
    if kind == "probabilities":
        for one in (true, given):
            one[:, 4:] = one[:, 4:].reshape(6, 5, 2, 2).softmax(1).flatten(1)
    task = scaled(TASK, cast(Dataset, SimpleNamespace(train=Truths(true), outputs=served)))
    maps = [one[:, 4:].reshape(6, 5, 2, 2).double().movedim(1, -1).reshape(-1, 5).numpy() for one in (true, given)]
    if kind == "logits":
        maps = [np.exp(one) / np.exp(one).sum(1, keepdims=True) for one in maps]
    divergence = (maps[0] * np.log(maps[0] / maps[1])).sum(1).mean()
    variance = true[:, :4].var(0, correction=0).mean()
    expected = ((given[:, :4] - true[:, :4]).square().mean() / variance + 3 * divergence) / 4
    term = MSETerm(name="mse")
    found = mean_loss(term, task, given, iter(()), TeacherOutput(true, {}), true)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert float(task.loss(given, true, label_smoothing=0.0)) == pytest.approx(float(expected), rel=1e-4)


def test_a_softmax_alone_is_refused_and_leaves_other_keys() -> None:
    stages = [{"stage": "source"}]
    recipes = [
        Recipe.model_validate(
            {"name": "a", "task": "tensors", "model": {"arch": "hf:x", "outputs": {"a": one}}, "stages": stages}
        )
        for one in ({"weight": 2, "softmax": "logits"}, {"weight": 2})
    ]
    with pytest.raises(CompressError, match="softmax needs several outputs, got a alone"):
        as_served(recipes[0], ())
    assert [as_served(one, [Output("a", (3,)), Output("b", (3,))])[0].softmax for one in recipes] == ["logits", None]
    said = [str(one.model.outputs["a"]) for one in recipes if one.model is not None]
    assert said == ["weight=2.0 unordered=False"] * 2  # as keys of artifacts have them


class Odd(nn.Module):
    """Returns what a test asks for."""

    def __init__(self, outputs: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.outputs = nn.Conv2d(3, 4, 3, padding=1), outputs

    def forward(self, images: Tensor) -> object:
        """Return the outputs for the layer's maps."""
        return self.outputs(self.layer(images))


@dataclass
class Named:
    """A dataclass of outputs."""

    depth: Tensor
    mask: Tensor | None
    layers: tuple[Tensor, Tensor]


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (lambda maps: (maps, maps.mean((2, 3))), ["output_0", "output_1"]),
        (lambda maps: [maps, {"a": maps.mean(1), "b": maps.argmax(1)}], ["output_0", "output_1_a"]),
        (lambda maps: Named(maps[:, 0], None, (maps, maps)), ["depth", "layers_0", "layers_1"]),
        (lambda maps: {"input": maps, "a/b": maps.mean((1, 2, 3)), "loss": maps.mean()}, ["input_", "a_b"]),
        (lambda maps: {"only": maps, "count": 3}, []),
        (lambda maps: maps, []),
    ],
)
def test_outputs_are_named_after_keys_fields_and_places(
    outputs: Callable[[Tensor], object], names: list[str], tmp_path: Path
) -> None:
    model = serve_(Odd(outputs).eval(), ())
    found = signature_of(model, (3, 8, 8))
    assert [one.name for one in found] == names
    images = torch.randn(2, 3, 8, 8)
    given = model(images)
    assert given.shape[1:] == ((sum(one.size for one in found),) if found else (4, 8, 8))
    graph = trace(model, images)
    for network, file in ((model, "float"), (graph, "traced")):
        to_onnx(network, tmp_path / f"{file}.onnx", shape=(3, 8, 8), metadata={}, outputs=found)
        session = onnxruntime.InferenceSession(tmp_path / f"{file}.onnx")
        assert [one.name for one in session.get_outputs()] == (names or ["logits"])
        assert [tuple(one.shape[1:]) for one in session.get_outputs()] == ([one.shape for one in found] or [(4, 8, 8)])
        assert infer(session, images.numpy()) == pytest.approx(given.detach().numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("outputs", "served", "sentence"),
    [
        (lambda maps: (maps, maps[0]), (), "the size of output_1 varies|must have one row for each image"),
        (lambda maps: (maps, maps[maps[:, 0].mean((1, 2)) > 0]), (), "size of output_1 varies|must have one row"),
        (lambda maps: (maps, torch.ones(len(maps), 4)), (), "gives the same output_1 for any image"),
        (lambda maps: (maps, maps), ("boxes",), "has no output boxes, only output_0, output_1"),
        (lambda maps: {"ids": maps.argmax(1)}, (), "without a float tensor for each image"),
    ],
)
def test_outputs_that_cannot_be_served_are_refused(
    outputs: Callable[[Tensor], object], served: tuple[str, ...], sentence: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=sentence):
        signature_of(serve_(Odd(outputs).eval(), served), (3, 8, 8))
