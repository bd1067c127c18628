"""What init writes for networks that others' code saved runs to a bundle, unchanged but for its length; the bundle predicts and is judged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from typer.testing import CliRunner

from compress.cli import app
from export.bundle.read import read_bundle
from export.gate.checks import Limits
from export.gate.commands import judge, update
from export.gate.latency import Plan
from export.gate.run import Terms
from export.images.read import read_pixels
from export.runtime.session import open_session

SHORT = ["distill.fit.epochs=6", "qat.fit.epochs=1", "ptq.methods=[minmax]"]
BRIEF = ["bench.seconds=0.05", "bench.blocks=6", "bench.batches=[1]", "bench.threads=[1]", "target=cpu_avx2"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 digits as files of 32 pixels, a fifth of them for validation."""
    folder = tmp_path_factory.mktemp("digits")
    found = load_digits()
    for index, (image, label) in enumerate(zip(found.images[:800], found.target, strict=False)):
        path = folder / ("val" if index % 5 == 0 else "train") / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32)).convert("RGB").save(path)
    return folder


def trained(network: nn.Module, digits: Path, mean: Tensor, std: Tensor, call: Callable[[Tensor], Tensor]) -> None:
    files = sorted((digits / "train").rglob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))
    images = (pixels.permute(0, 3, 1, 2) / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    labels = torch.tensor([int(file.parent.name) for file in files])
    optimizer = torch.optim.AdamW(network.train().parameters(), 0.004)
    for step in range(150):
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(call(images[rows]), labels[rows]).backward()
        optimizer.step()
    network.eval()


def timm_resnet(digits: Path) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("test_resnet", num_classes=10)
    trained(network, digits, torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]), network)
    return network


def safetensors(digits: Path, folder: Path) -> Path:
    save_file(timm_resnet(digits).state_dict(), folder / "timm.safetensors")
    return folder / "timm.safetensors"


def onnx(digits: Path, folder: Path) -> Path:
    pytest.importorskip("onnx2torch")
    batch = ({0: torch.export.Dim("n")},)
    torch.onnx.export(
        timm_resnet(digits),
        (torch.zeros(2, 3, 32, 32),),
        folder / "net.onnx",
        opset_version=20,
        dynamic_shapes=batch,
        external_data=False,
        verbose=False,
    )
    return folder / "net.onnx"


def pretrained(digits: Path, folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    widths = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    config = transformers.ResNetConfig(**widths, id2label={index: str(index) for index in range(10)})
    network = transformers.ResNetForImageClassification(config)
    half = torch.full((3,), 0.5)
    trained(network, digits, half, half, lambda images: network(pixel_values=images).logits)
    network.save_pretrained(folder / "hf")
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0, **values).save_pretrained(
        folder / "hf"
    )
    return folder / "hf"


@pytest.mark.acceptance
@pytest.mark.parametrize("saved", [safetensors, onnx, pretrained])
def test_what_init_wrote_runs_to_a_bundle(saved: Callable[[Path, Path], Path], digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    given = ["--weights", str(saved(digits, tmp_path)), "--data", str(digits), "-o", str(recipe)]
    told = CliRunner().invoke(app, ["init", *given], catch_exceptions=False).output
    assert "left and right differ" in told
    changes = [part for change in (*SHORT, *BRIEF, "targets={max_drop: 0.05}") for part in ("--set", change)]
    ran = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path), *changes], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    bundle = read_bundle(tmp_path / "mine" / "bundle")
    session, right = open_session(bundle.files[bundle.served]), 0
    files = sorted((digits / "val").rglob("*.png"))
    for file in files:
        pixels = bundle.preprocess.normalize(read_pixels(file, bundle.preprocess)[None])
        right += bundle.labels[session.run(None, {"input": pixels})[0].argmax()] == file.parent.name
    assert right / len(files) > 0.85
    limits, plan = Limits(max_latency_ratio=None), Plan(seconds=0.1)
    update(bundle.path, tmp_path / "baseline.json", Terms(digits, limits, plan))
    verdict = judge(bundle.path, tmp_path / "baseline.json", Terms(None, limits, plan))
    assert verdict.exit_code == 0, verdict
