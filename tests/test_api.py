"""The chain in three lines of Python, on a network of another package, as docs/python.md shows it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress.errors import CompressError
from compress.models.structure import count
from export.errors import BundleError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(40, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10).eval()


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code = (ROOT / "docs/python.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(code, "python.md", "exec"), {})
    assert (tmp_path / "student.onnx").is_file()
    assert "in float: []" in capsys.readouterr().out


def test_a_pruned_network_costs_what_was_asked_and_the_given_one_stays(model: nn.Module, images: Tensor) -> None:
    before = model(images[:2])
    student = compress.prune(model, images, keep_macs=0.5)
    assert 0.4 < count(student, (3, 48, 48)).macs / count(model, (3, 48, 48)).macs <= 0.5
    assert torch.equal(model(images[:2]), before)


class OctaveConv(nn.Conv2d):
    """One resolution to two of half of the outputs, or two to one, by slices of its weights."""

    def forward(self, fine: Tensor, coarse: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return (n, outputs, h, w), or two resolutions of it."""
        if coarse is None:
            upper, lower = self.weight.chunk(2)
            return F.conv2d(fine, upper, padding=1), F.conv2d(F.avg_pool2d(fine, 2), lower, padding=1)
        left, right = self.weight.chunk(2, 1)
        return F.conv2d(fine, left, padding=1) + F.interpolate(F.conv2d(coarse, right, padding=1), scale_factor=2.0)


class Octave(nn.Module):
    """Two plain convolutions, an octave of two, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1))
        self.split, self.join = (OctaveConv(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 4)."""
        fine, coarse = self.split(self.stem(x).relu())
        out: Tensor = self.head(self.join(fine.relu(), coarse.relu()).mean((2, 3)))
        return out


def test_a_network_is_pruned_beside_layers_that_map_several_tensors(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Octave().eval()
    student = compress.prune(model, images, keep_macs=0.8)
    assert [student.get_submodule(f"stem.{name}").out_channels for name in (0, 2)] == [16, 16]
    assert count(student, (3, 48, 48)).macs <= 0.8 * count(model, (3, 48, 48)).macs
    with pytest.raises(CompressError, match="as no layer can be cut"):
        compress.prune(model, images, keep_macs=0.8, exclude=["stem.0"])


def test_images_may_be_arrays_or_a_loader(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    loader = [(images[:20], torch.zeros(20)), (images[20:], torch.zeros(20))]
    found = [compress.quantize(model, given) for given in (images, images.numpy(), loader)]
    assert all(torch.equal(one(images[:4]), found[0](images[:4])) for one in found[1:])


def test_a_float_file_gives_the_networks_outputs(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    compress.export(model, tmp_path / "float.onnx", images=images)
    (outputs,) = onnxruntime.InferenceSession(tmp_path / "float.onnx").run(None, {"input": images[:4].numpy()})
    np.testing.assert_allclose(outputs, model(images[:4]).detach().numpy(), atol=1e-4)


def test_export_leaves_a_network_in_training(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    quantized = compress.quantize(model, images).train()
    quantized(images[:8]).sum().backward()
    compress.export(quantized, tmp_path / "int8.onnx")
    assert quantized.training
    assert all(parameter.grad is not None for parameter in quantized.parameters())


class NotFinite(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).sub(1e3).sqrt()


def test_a_file_whose_outputs_are_no_numbers_is_refused(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="differs from the network by nan"):
        compress.export(NotFinite(), tmp_path / "nan.onnx", images=images)


def test_an_unknown_task_and_a_fraction_over_one_are_refused(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="task: must be one of"):
        compress.export(model, tmp_path / "a.onnx", images=images, task="poses")
    with pytest.raises(CompressError, match="keep_macs: must be above 0 and below 1, got 2"):
        compress.prune(model, images, keep_macs=2.0)


def test_a_fraction_that_cannot_be_reached_is_refused(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(CompressError, match="keep_macs"):
        compress.prune(model, images, keep_macs=0.001)


def test_images_of_another_form_are_refused(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(CompressError, match=r"images: must be \(n, channels, height, width\), got \(3, 48, 48\)"):
        compress.quantize(model, images[0])


def test_the_import_takes_no_torch() -> None:
    code = "import sys, compress; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


class Pooling(nn.Module):
    """Attention of one learned query over an image's places, as SigLIP pools."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        places = self.patches(images).flatten(2).transpose(1, 2)
        pooled: Tensor = self.attention(self.query.repeat(images.shape[0], 1, 1), places, places)[0]
        return pooled[:, 0]


def test_a_layer_whose_path_leads_on_to_another_is_deployed_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = compress.quantize(Pooling().eval(), torch.randn(8, 3, 16, 16), target="cpu_avx2")
    found = compress.export(prepared, tmp_path / "pooling.onnx", task="tensors")
    assert {"patches", "attention"} <= set(found["integer_layers"])
