"""Grey images of 16 bits that are wider than high: through the whole chain, the check, the gate, and predictions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from compress.cli import app
from export import predict, verify
from export.bundle.read import read_bundle
from export.check.findings import check_bundle
from export.gate.__main__ import main as gate_main

RECIPE = """
name: depth
target: cpu_avx2
data: {path: IMAGES, channels: 1, image_size: [16, 24], mean: [0.3], std: [0.35], augment: {crop: pad}}
model: {arch: "NETWORK:network"}
stages:
  - {stage: source, fit: {epochs: 12, batch_size: 16, lr: 0.1}}
  - {stage: prune, keep_macs: 0.7}
  - {stage: distill, fit: {epochs: 3, batch_size: 16, lr: 0.02}}
  - {stage: ptq, calibration_images: 64, methods: [minmax]}
  - {stage: export, verify_images: 16}
  - {stage: bench, seconds: 0.02, blocks: 6, batches: [1], threads: [1], image_sizes: [[16, 32]]}
"""
NETWORK = """
from torch import nn

def network(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes),
    )
"""
CLASSES = 4


def draw(root: Path, *, per_class: int = 80) -> Path:
    """Write digits below CLASSES as depths: 16 bits, twice as wide as high."""
    bunch = load_digits()
    for label in range(CLASSES):
        for number, digit in enumerate(bunch.images[bunch.target == label][:per_class]):
            folder = root / ("val" if number % 4 == 0 else "train") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray((digit * (65535 / 16)).astype(np.int32))
            depths = np.asarray(small.resize((32, 16), Image.Resampling.BILINEAR)).astype(np.uint16)
            Image.fromarray(depths).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    (folder / "network.py").write_text(NETWORK)
    recipe = RECIPE.replace("IMAGES", str(draw(folder / "images"))).replace("NETWORK", str(folder / "network.py"))
    (folder / "recipe.yaml").write_text(recipe)
    done = CliRunner().invoke(app, ["run", str(folder / "recipe.yaml"), "--out", str(folder), "--trust-code"])
    assert done.exit_code == 0, done.output
    return folder


def test_the_bundle_says_how_such_images_are_fed(finished: Path) -> None:
    place = finished / "depth" / "bundle"
    said = json.loads((place / "preprocess.json").read_text())
    assert (said["image_size"], said["color"], said["scale"]) == ([16, 24], "grey", 1 / 65535)
    bundle, findings = check_bundle(place)
    assert findings == []
    assert bundle is not None
    assert bundle.manifest["input"] == {"name": "input", "shape": [None, 1, 16, 24], "dtype": "float32"}
    assert bundle.golden.images.dtype == np.uint16
    assert bundle.golden.images.shape[1:] == (16, 24, 1)
    assert int(bundle.golden.images.max()) > 50_000
    assert "dims: [ 1, 16, 24 ]" in (place / "serving" / "triton" / "depth" / "config.pbtxt").read_text()


def test_it_learns_and_is_timed_at_its_own_size_and_at_another(finished: Path) -> None:
    report = json.loads((finished / "depth" / "report.json").read_text())
    assert min(row["score"] for row in report["deployed"]) > 0.8
    assert {tuple(row["image_size"]) for row in report["deployed"]} == {(16, 24), (16, 32)}
    assert "16 x 24 px" in (finished / "depth" / "report" / "index.html").read_text()


def test_gate_verification_and_predictions_read_the_same_files(
    finished: Path, tmp_path: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    place, images = finished / "depth" / "bundle", finished / "images"
    words = [place, "--baseline", tmp_path / "baseline.json", "--data", images, "--no-latency"]
    for further in (["--update-baseline"], []):
        assert called(gate_main, *words, *further) == 0, capsys.readouterr()
    assert called(verify.main, place, "--data", images, "--images", 16) == 0
    capsys.readouterr()
    files = sorted((images / "val").rglob("*.png"))
    assert called(predict.main, place, *files, "--json", "--top", 1) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [Path(one["image"]).parent.name == one["found"][0]["label"] for one in found]
    report = json.loads((finished / "depth" / "report.json").read_text())
    served = next(row for row in report["deployed"] if row["name"] == read_bundle(place).served)
    assert np.mean(right) == pytest.approx(served["score"])


def test_an_image_of_other_channels_or_bits_is_refused_in_a_sentence(
    finished: Path, tmp_path: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 16)).save(tmp_path / "colours.png")
    Image.new("L", (32, 16)).save(tmp_path / "eight.png")
    names = [tmp_path / "colours.png", tmp_path / "eight.png"]
    assert called(predict.main, finished / "depth" / "bundle", *names) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("(")[2].partition(")")[0] for line in lines] == [
        "has 3 channels of 8 bits, not 1 channel of 16 bits",
        "has 1 channel of 8 bits, not 1 channel of 16 bits",
    ]
