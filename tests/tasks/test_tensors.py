"""The task `tensors`: explained variance by hand, neighbours by brute force, and an encoder and a network of images through the chain."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from networks import Encoder, Restorer, settled, small
from onnx_files import restorer, save
from safetensors.torch import save_file
from several import ended, start
from typer.testing import CliRunner

from compress.cli import app
from compress.data.augment import Augmentation
from compress.data.images import ArrayImages
from compress.data.mixing import draw_mixes, mix
from compress.errors import CompressError, RecipeError
from compress.models.architectures import build
from compress.models.weights import load_weights_
from compress.recipe.read import read_recipe
from compress.recipe.schema import Augment
from compress.report.page.pictures import examples
from compress.report.shape import Report
from compress.run import open_run
from compress.tasks.references import _holds
from compress.tasks.tensors import squared_error_loss
from export import predict
from export.bundle.read import read_bundle
from export.errors import BundleError, UserError
from export.gate.__main__ import main as gate_main
from export.runtime.accuracy import Score, score_files
from export.runtime.own import open_metric
from export.runtime.session import open_session
from export.tasks.tensors import TENSORS, agreement, divergence, nearest_images, show, statistics, together, total

NETWORKS = Path(__file__).parent.parent / "networks.py"
RECIPE = """
name: own
task: tensors
target: cpu_avx2
data: {{image_size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
model: {{arch: "{networks}:{factory}", weights: {weights}}}
stages:
  - {{stage: source}}
  - {{stage: prune, keep_macs: 0.6, reconstruct_images: 64}}
  - {{stage: distill, loss: [{{name: mse}}], fit: {{epochs: 12, batch_size: 32, lr: 0.02, clip_norm: 1}}}}
  - {{stage: ptq, calibration_images: 64, methods: [minmax]}}
  - {{stage: export, verify_images: 32, limits: {{max_float_fraction: 0.5}}}}
  - {{stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}}
"""
METRIC = """
import numpy as np
from PIL import Image

def likeness(output, path):
    image = np.asarray(Image.open(path).resize((16, 16))).transpose(2, 0, 1) / 127.5 - 1
    return {"PSNR dB": 10 * np.log10(4 / np.square(output - image).mean())}
"""


def explained(predictions: np.ndarray, truths: np.ndarray, axis: int) -> float:
    """Return 1 - Σ(y - t)² / Σ(t - t̄)² by the definition, with `axis` the channels'."""
    others = tuple(one for one in range(truths.ndim) if one != axis)
    apart = np.square(truths - truths.mean(axis=others, keepdims=True)).sum()
    return float(max(0, 1 - np.square(predictions - truths).sum() / apart))


@pytest.mark.parametrize(("shape", "axis"), [((40, 7), 1), ((12, 5, 7), 2), ((9, 3, 4, 6), 1)])
def test_score_is_the_explained_variance_however_the_images_are_batched(shape: tuple[int, ...], axis: int) -> None:
    random = np.random.default_rng(0)
    truths = random.normal(3, 2, shape)
    predictions = truths + random.normal(0, 0.7, shape)

    rows = np.concatenate(
        [statistics(predictions[part], truths[part], shape[1:]) for part in (slice(4), slice(4, None))]
    )

    assert total(rows) == pytest.approx(explained(predictions, truths, axis), abs=1e-12)
    assert total(statistics(truths, truths, shape[1:])) == 1
    assert total(statistics(-truths, truths, shape[1:])) == 0


def test_an_output_that_is_not_finite_scores_nothing() -> None:
    truths = np.random.default_rng(0).normal(size=(8, 5))
    broken = truths.copy()
    broken[3, 2] = np.nan

    assert total(statistics(broken, truths, (5,))) == 0
    assert agreement(broken, truths)[3] == 0


def test_constant_outputs_are_right_or_wrong() -> None:
    truths = np.full((6, 4), 2.5)
    assert total(statistics(truths, truths, (4,))) == 1
    assert total(statistics(truths + 0.1, truths, (4,))) == 0


def test_agreement_and_divergence_of_equal_turned_and_scaled_outputs() -> None:
    one = np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)
    assert agreement(one, one).tolist() == [1, 1]
    assert agreement(one, 2 * one).tolist() == [1, 1]
    assert agreement(one, -one).tolist() == [0, 1]
    assert divergence(one, one).tolist() == [0, 0]
    assert divergence(2 * one, one)[0] == pytest.approx(1)


def test_neighbours_are_those_of_brute_force() -> None:
    random = np.random.default_rng(1)
    taught = random.normal(size=(60, 8))
    given = taught + random.normal(0, 0.5, taught.shape)
    folders = [str(index % 3) for index in range(60)]

    def by_hand(rows: np.ndarray, index: int) -> list[int]:
        alike = [
            -2.0 if j == index else float(rows[index] @ rows[j] / np.linalg.norm(rows[index]) / np.linalg.norm(rows[j]))
            for j in range(60)
        ]
        return sorted(range(60), key=lambda j: -alike[j])

    near = [by_hand(given, index)[:5] for index in range(60)]
    kept = sum(by_hand(taught, index)[0] in near[index] for index in range(60)) / 60
    voted = []
    for one in near:
        votes = [sum(folders[j] == name for j in one) for name in "012"]
        voted.append(str(votes.index(max(votes))))
    assert nearest_images(given, 5).tolist() == near
    found = together(given, taught, folders)
    assert found["nearest neighbour kept"] == pytest.approx(kept)
    assert 0.3 < kept < 1
    assert found["k-NN accuracy"] == pytest.approx(sum(map(str.__eq__, voted, folders)) / 60)
    assert together(taught, taught, ["one"] * 60) == {"nearest neighbour kept": 1.0}
    assert together(given[:, :, None, None], taught[:, :, None, None], folders) == {}


def test_scoring_large_outputs_takes_memory_for_a_sample_of_them_alone(tmp_path: Path) -> None:
    files = {name: save(restorer(128, gain), tmp_path / f"{name}.onnx") for name, gain in (("one", 0.5), ("two", 0.4))}
    images = np.random.default_rng(0).standard_normal((3, 3, 128, 128), np.float32)
    scored: list[dict[str, Score]] = []

    def peak_mb(batches: int) -> float:
        tracemalloc.start()
        scored.append(score_files(files, ((images, images / 2) for _ in range(batches)), TENSORS))
        found = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        return found

    few, many = peak_mb(4), peak_mb(24)
    assert many - few < 8  # 60 more images of 0.2 MB, from two files: 24 MB
    assert scored[-1]["two"].score == pytest.approx(0.96, abs=1e-3)  # 1 - 0.2²
    assert scored[-1]["two"].agreement(scored[-1]["one"]) == pytest.approx(1)


def test_predictions_are_shown_by_channel_or_as_one_embedding() -> None:
    columns, lines = show(np.arange(8, dtype=np.float32), [f"c{index}" for index in range(8)], 5)
    assert columns[0] == "channel"
    assert lines == [("all 8", 3.5, pytest.approx(np.arange(8).std()), 0.0, 7.0)]
    _, lines = show(np.stack([np.zeros((2, 2)), np.ones((2, 2))]), ["a", "b"], 5)
    assert [line[:2] for line in lines] == [("a", 0.0), ("b", 1.0)]


def test_a_bundle_stores_no_truths() -> None:
    assert TENSORS.truths([None, None], (3,)).shape == (2, 3)
    with pytest.raises(BundleError, match="must be null for each image"):
        TENSORS.truths([None, 1], (3,))


def ran(kind: str, photos: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    network = settled({"encoder": Encoder, "restorer": Restorer}[kind]())
    save_file(network.state_dict(), folder / "own.safetensors")
    text = RECIPE.format(networks=NETWORKS, factory=kind, weights=folder / "own.safetensors")
    if kind == "restorer":
        (folder / "metric.py").write_text(METRIC)
        text += f"score: {folder}/metric.py:likeness\ntargets: {{max_metric_drop: {{PSNR dB: 9}}}}\n"
    (folder / "own.yaml").write_text(text)
    command = ["run", str(folder / "own.yaml"), "--data", str(photos), "--out", str(folder / "runs"), "--trust-code"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return folder / "runs" / "own"


@pytest.fixture(scope="module")
def restored(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole chain on a network of images, with a metric of its own."""
    return ran("restorer", photos, tmp_path_factory.mktemp("restorer"))


@pytest.fixture(scope="module")
def encoded(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on an encoder."""
    return ran("encoder", photos, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(params=["encoded", "restored"])
def done(request: pytest.FixtureRequest) -> Path:
    """Each of them."""
    found: Path = request.getfixturevalue(request.param)
    return found


def test_a_network_is_cut_quantized_and_proved_without_a_label(done: Path) -> None:
    report: dict[str, Any] = json.loads((done / "report.json").read_text())
    rows = {row["name"]: row for row in report["deployed"]}

    assert rows["teacher_fp32"]["score"] == pytest.approx(1, abs=1e-6)
    assert 0.6 < rows["student_ptq_int8"]["score"] < 1
    assert rows["student_ptq_int8"]["agreement"] > 0.95
    if "encoder" in str(done):
        assert 0.5 < rows["student_ptq_int8"]["further"]["nearest neighbour kept"] <= 1
        assert rows["teacher_fp32"]["further"]["k-NN accuracy"] > 0.5


def test_the_bundle_predicts_and_passes_the_gate_on_its_teachers_outputs(
    done: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], called: Callable[..., int]
) -> None:
    bundle = done / "bundle"
    assert read_bundle(bundle).labels[0] == "channel_0000"
    assert called(predict.main, bundle, next(photos.glob("3/*.png"))) == 0
    assert "deviation" in capsys.readouterr().out
    judge = [bundle, "--baseline", tmp_path, "--data", photos, "--no-latency"]
    assert called(gate_main, *judge, "--update-baseline") == 0, capsys.readouterr().err
    assert called(gate_main, *judge) == 0, capsys.readouterr().err
    assert "explained variance" in capsys.readouterr().out


def test_a_metric_of_ones_own_is_reported_limited_and_gated(
    restored: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], called: Callable[..., int]
) -> None:
    report: dict[str, Any] = json.loads((restored / "report.json").read_text())
    bundle, metric = read_bundle(restored / "bundle"), f"{restored.parent.parent}/metric.py:likeness"
    (found,) = {row["measures"]["PSNR dB"] for row in report["deployed"] if row["name"] == bundle.served}
    seen = bundle.examples(photos)
    session = open_session(bundle.files[bundle.served])
    by_hand = [
        open_metric(metric).function(session.run(None, {"input": images})[0][0], path)["PSNR dB"]  # type: ignore[index]
        for (images, _), path in zip(seen.batches(batch_size=1), seen.paths(), strict=True)
    ]
    assert found == pytest.approx(np.mean(by_hand), abs=1e-3)
    assert report["targets"]["max_metric_drop.PSNR dB"] == 9
    assert "PSNR dB" in (restored / "report" / "index.html").read_text()

    judge = [restored / "bundle", "--baseline", tmp_path / "b.json", "--data", photos, "--no-latency"]
    assert called(gate_main, *judge, "--update-baseline", "--score", metric) == 0, capsys.readouterr().err
    assert called(gate_main, *judge, "--score", metric) == 0
    assert called(gate_main, *judge) == 2
    assert "PSNR dB" in capsys.readouterr().out
    baseline = json.loads((tmp_path / "b.json").read_text())
    baseline["own"] = {digest: {"PSNR dB": row["PSNR dB"] + 1} for digest, row in baseline["own"].items()}
    (tmp_path / "b.json").write_text(json.dumps(baseline))
    assert called(gate_main, *judge, "--score", metric) == 1
    (restored / "bundle" / "metric.py").write_text(METRIC)
    assert called(gate_main, *judge, "--score", f"{restored}/bundle/metric.py:likeness") == 2
    assert "whose code is never run" in capsys.readouterr().err


def test_the_report_draws_the_worst_images_side_by_side(restored: Path, encoded: Path, photos: Path) -> None:
    report = cast(Report, json.loads((restored / "report.json").read_text()))
    assert [[title for title, _ in images] for images in examples(restored, report)] == [
        ["Image", "Teacher FP32", "Student INT8 (PTQ)"]
    ] * 4
    assert not list(encoded.glob("*/examples.npz"))
    bundle = read_bundle(restored / "bundle")
    found = bundle.examples(photos)
    infer = open_session(bundle.files[bundle.served]).run
    wrong = [np.square(infer(None, {"input": one})[0] - true).sum() for one, true in found.batches(batch_size=1)]
    with np.load(next(restored.glob("*-bench-*/examples.npz"))) as kept:
        for place, index in enumerate(np.argsort(wrong)[::-1][:4]):
            assert np.array_equal(kept["images"][place], found.pixels(found.chosen[index]))
        assert kept["answers"].shape == (2, 4, 16, 16, 3)
        assert (kept["answers"][0].max(axis=(1, 2, 3)) == 255).all()


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("'high'", "must return a number"),
        ("[1, 2]", "must return a number"),
        ("1 / 0", "fails on a.png: ZeroDivisionError"),
    ],
)
def test_a_metric_that_gives_no_number_is_named(returned: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(f"def mine(output, path):\n    return {returned}\n")
    with pytest.raises(UserError, match=f"score: mine {said}"):
        open_metric(f"{tmp_path}/m.py:mine").row(np.zeros(3), Path("a.png"))
    with pytest.raises(UserError, match="defines no function 'other'"):
        open_metric(f"{tmp_path}/m.py:other")
    run = open_run(read_recipe(own_recipe(tmp_path, "score: m.py:mine")), trust_code=False, verbose=False)
    with pytest.raises(CompressError, match=r"m\.py:mine: measuring it runs that file"):
        _ = run.own_metric


def own_recipe(folder: Path, line: str) -> Path:
    text = RECIPE.format(networks=NETWORKS, factory="encoder", weights="own.safetensors")
    (folder / "own.yaml").write_text(text.replace("data: {", "data: {path: x, dataset: imagefolder, ") + line)
    return folder / "own.yaml"


def test_losses_between_classes_are_refused(photos: Path, tmp_path: Path) -> None:
    save_file(Encoder().state_dict(), tmp_path / "own.safetensors")
    text = RECIPE.format(networks=NETWORKS, factory="encoder", weights=tmp_path / "own.safetensors")
    (tmp_path / "own.yaml").write_text(text.replace("loss: [{name: mse}], ", ""))
    command = [
        "run",
        str(tmp_path / "own.yaml"),
        "--data",
        str(photos),
        "--out",
        str(tmp_path / "runs"),
        "--trust-code",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "loss kd: compares classes, and tensors have none: use mse" in result.output


def test_reference_outputs_of_a_shorter_run_are_made_again(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.zeros((3, 2), np.float32))
    few, more = (ArrayImages(np.zeros((n, 4, 4, 3), np.uint8), torch.arange(n)) for n in (3, 4))
    assert _holds(tmp_path / "train.npy", few)
    assert not _holds(tmp_path / "train.npy", more)


def test_losses_are_in_units_of_the_outputs_and_mixing_takes_any_shape() -> None:
    outputs, truths = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4)
    expected = (outputs - truths).square().mean() / 4
    assert torch.isclose(squared_error_loss(outputs, truths, scale=2.0), expected)
    assert torch.isclose(squared_error_loss(outputs[:1], truths[:1]), (outputs[0] - truths[0]).square().mean())
    mixes = draw_mixes(Augmentation(**Augment(mixup=1.0).model_dump()), 6, size=(8, 8), seed=0)
    assert mixes is not None
    images = torch.rand(6, 3, 8, 8)
    _, targets = mix(images, truths, images.flip(0), truths.flip(0), mixes, classes=3)
    assert targets.shape == truths.shape


def test_what_needs_labels_is_refused_for_tensors(tmp_path: Path) -> None:
    text = RECIPE.format(networks=NETWORKS, factory="encoder", weights="own.safetensors").replace(
        "data: {", "data: {path: x, dataset: imagefolder, "
    )
    for change, sentence in (
        (
            ("keep_macs: 0.6,", "keep_macs: 0.6, sparsity: {fit: {epochs: 1}},"),
            "sparsity: learns from labels, and tensors have none",
        ),
        (("stages:", "targets: {max_class_drop: 0.1}\nstages:"), "targets.max_class_drop: tensors have no classes"),
    ):
        (tmp_path / "own.yaml").write_text(text.replace(*change))
        with pytest.raises(RecipeError, match=sentence):
            read_recipe(tmp_path / "own.yaml")


def test_outputs_are_refused_where_a_task_reads_one(tmp_path: Path) -> None:
    text = RECIPE.format(networks=NETWORKS, factory="encoder", weights="own.safetensors, outputs: [a]")
    (tmp_path / "own.yaml").write_text(text.replace("task: tensors", "task: classification"))
    with pytest.raises(RecipeError, match=r"model\.outputs: classification reads one output"):
        read_recipe(tmp_path / "own.yaml")


def test_an_encoder_of_timm_takes_weights_with_a_classifier(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    whole = timm.create_model("test_resnet", num_classes=7)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    network = build("timm:test_resnet", num_classes=0)
    load_weights_(network, "timm:test_resnet", str(tmp_path / "w.safetensors"), reset_head=False)
    images = torch.randn(2, 3, 64, 64)
    expected = whole.eval().forward_head(whole.forward_features(images), pre_logits=True)
    assert torch.allclose(network(images), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tensors", "unlabelled"])
def test_ranks_label_the_images_together_before_one_of_them_rehearses(task: str, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    factory, network = ("encoder", Encoder()) if task == "tensors" else ("small", small(10))
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    (tmp_path / "classes.txt").write_text("".join(f"c{index}\n" for index in range(10)))
    text = RECIPE.format(networks=NETWORKS, factory=factory, weights=tmp_path / "own.safetensors")
    if task == "unlabelled":
        text = text.replace("task: tensors", "task: unlabelled").replace("loss: [{name: mse}], ", "")
        text = text.replace("data: {", f"data: {{classes: {tmp_path}/classes.txt, ")
    (tmp_path / "own.yaml").write_text(text.replace("epochs: 12", "epochs: 1"))
    words = ["compress", "run", str(tmp_path / "own.yaml"), f"--out={tmp_path}", f"--data={photos}", "--trust-code"]
    said = ended(
        start(f"import sys\nfrom compress import cli\nsys.argv = {[*words, '--until=distill']}\ncli.main()"),
        within_s=300,
    )
    assert [code for code, _ in said] == [0, 0], said
    assert [folder.name[:2] for folder in sorted((tmp_path / "own").glob("0*"))] == ["00", "01", "02"]
