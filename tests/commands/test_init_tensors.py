"""A recipe for a network whose outputs are no classes: an encoder, a file of several outputs, a vision tower of transformers."""

import json
from pathlib import Path

import pytest
import timm
import torch
from networks import TwoHeaded
from photographs import write_classes
from torch import Tensor, nn

from compress.commands.init import write
from compress.commands.init.estimate import StepTime
from compress.commands.init.write import write_draft
from compress.models.architectures import build
from compress.models.published import published
from compress.models.structure import ends_in_classifier
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from export.onnx_file.to_onnx import to_onnx


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "timed", lambda *_: StepTime(0.001, 0.0005, 0.0021, 0.0015, 50))


def drafted(weights: Path, folder: Path, arch: str | None = None) -> tuple[Recipe, str]:
    """Return the recipe that init writes for three class folders, and what it says."""
    write_classes(folder / "data")
    words = {"arch": arch, "latency_ms": None, "minutes": 30, "trust_code": arch is not None}
    told = list(write_draft(str(weights), folder / "data", folder / "mine.yaml", **words))  # type: ignore[arg-type]
    return read_recipe(folder / "mine.yaml"), "\n".join(told)


def losses(recipe: Recipe) -> set[str]:
    return {term.name for stage in recipe.stages if stage.stage in ("distill", "qat") for term in stage.loss}


def test_a_checkpoint_without_its_classifier_is_an_encoder(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "w.pt")
    recipe, told = drafted(tmp_path / "w.pt", tmp_path)
    assert recipe.model is not None
    assert (recipe.task, recipe.model.arch, recipe.model.outputs) == ("tensors", "timm:test_resnet", {})
    assert "timm:test_resnet, which gives tensors" in told
    assert losses(recipe) == {"mse"}
    assert recipe.targets.max_drop == 0.1


def test_a_factory_without_an_argument_serves_all_its_outputs(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from networks import TwoHeaded\ndef encoder():\n    return TwoHeaded()\n")
    torch.save(TwoHeaded().state_dict(), tmp_path / "w.pt")
    recipe, _ = drafted(tmp_path / "w.pt", tmp_path, f"{tmp_path}/own.py:encoder")
    assert recipe.model is not None
    assert (recipe.task, list(recipe.model.outputs)) == ("tensors", ["embedding", "heat"])


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.body(images).relu()
        pooled = maps.mean((2, 3))
        return maps, pooled, self.head(pooled)


class Ends(nn.Module):
    """Ends in a classifier, or in a mean."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.body, self.last = nn.Conv2d(3, 3, 3, 2, 1), last

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(images).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_an_onnx_file_of_three_outputs_names_them(tmp_path: Path) -> None:
    pytest.importorskip("onnx2torch")
    names = ("encoder_maps", "hidden_state", "scores")  # a file's author chose them
    torch.onnx.export(Three().eval(), (torch.zeros(2, 3, 32, 32),), tmp_path / "net.onnx", output_names=names, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("n")},), external_data=False)  # fmt: skip
    recipe, told = drafted(tmp_path / "net.onnx", tmp_path)
    assert recipe.model is not None
    assert (recipe.task, tuple(recipe.model.outputs), recipe.data.image_size) == ("tensors", names, 32)
    assert "which gives encoder_maps, hidden_state, scores" in told


@pytest.mark.parametrize(("channels", "task"), [(3, "classification"), (8, "tensors")])
def test_a_file_that_ends_in_a_mean_is_a_classifier_only_of_the_folder_s_classes(
    tmp_path: Path, channels: int, task: str
) -> None:
    pytest.importorskip("onnx2torch")
    network = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    to_onnx(network.eval(), tmp_path / "net.onnx", shape=(3, 32, 32), metadata={})
    recipe, _ = drafted(tmp_path / "net.onnx", tmp_path)
    assert recipe.task == task


def test_an_encoder_ends_in_a_norm_or_a_mean() -> None:
    ends = {
        "linear": nn.Linear(3, 8),
        "without bias": nn.Linear(3, 8, bias=False),
        "softmax": nn.Softmax(1),
        "mean": nn.Identity(),
        "norm": nn.LayerNorm(3),
    }
    found = {name for name, last in ends.items() if ends_in_classifier(Ends(last)(torch.randn(2, 3, 8, 8)))}
    assert found == {"linear", "without bias", "softmax"}


HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
}


@pytest.mark.parametrize(
    ("processor", "size", "resize", "stretch", "kernel", "mean"),
    [
        (CLIP | HALVES, (224, 224), 256 / 224, False, "bicubic", 0.5),
        ({"size": {"height": 384, "width": 288}, "resample": 2} | HALVES, (384, 288), 1.0, True, "bilinear", 0.5),
        ({"size": 224, "do_normalize": False} | HALVES, (224, 224), 1.0, True, "bilinear", 0.0),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875} | HALVES, (224, 224), 1 / 0.875, False, "bilinear", 0.5),
        ({"size": 64, "rescale_factor": 1 / 127.5} | HALVES, (64, 64), 1.0, True, "bilinear", 0.25),
        ({}, (48, 48), 1.0, False, "bilinear", 0.485),
    ],
)
def test_a_folder_s_processor_says_how_images_are_seen(
    tmp_path: Path, processor: dict[str, object], size: object, resize: float, stretch: bool, kernel: str, mean: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"image_size": 48}}))
    if processor:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = published(f"hf:{tmp_path}")
    assert found is not None
    assert (found.image_size, found.stretch, found.look.interpolation) == (size, stretch, kernel)
    assert found.resize == pytest.approx(resize)
    assert found.normalize[0][0] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("arch", "kernel"), [("torchvision:resnet18", "bilinear"), ("torchvision:swin_t", "bicubic"), ("timm:resnet18", "bicubic")]
)  # fmt: skip
def test_a_library_says_its_kernel(arch: str, kernel: str) -> None:
    found = published(arch)
    assert found is not None
    assert found.look.interpolation == kernel


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def test_of_a_network_of_images_and_texts_the_image_tower_is_taken(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    texts, images = SMALL | {"vocab_size": 9}, SMALL | {"image_size": 32, "patch_size": 16}
    network = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=texts, vision_config=images, projection_dim=24)
    ).eval()
    network.save_pretrained(tmp_path / "clip")
    said = {"image_processor": CLIP | HALVES | {"crop_size": 32, "size": {"shortest_edge": 36}}}
    (tmp_path / "clip" / "processor_config.json").write_text(json.dumps(said))
    recipe, _ = drafted(tmp_path / "clip", tmp_path)
    assert recipe.model is not None
    assert (recipe.task, list(recipe.model.outputs), recipe.data.resize) == ("tensors", ["pooler_output"], 36 / 32)
    tower, seen = (
        build(recipe.model.arch, num_classes=0, outputs=list(recipe.model.outputs)),
        torch.randn(2, 3, 32, 32),
    )
    with torch.no_grad():
        assert torch.equal(tower(seen), network.get_image_features(pixel_values=seen).pooler_output)
    assert not any("text" in name or "logit" in name for name in tower.state_dict())


def test_depths_without_an_axis_of_channels_are_a_map(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DPTConfig(**SMALL | {"num_hidden_layers": 4}, image_size=32, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
                                    neck_hidden_sizes=[8] * 4, fusion_hidden_size=8)  # fmt: skip
    transformers.DPTForDepthEstimation(config).save_pretrained(tmp_path / "dpt")
    recipe, _ = drafted(tmp_path / "dpt", tmp_path)
    assert recipe.model is not None
    assert (recipe.task, list(recipe.model.outputs)) == ("tensors", ["predicted_depth"])
    network = build(recipe.model.arch, num_classes=0, outputs=["predicted_depth"])
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 1, 32, 32)


def test_the_pooled_output_of_a_vision_tower_is_served(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(image_size=32, patch_size=16, **SMALL)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    said = {"size": {"height": 32, "width": 32}, "resample": 3, **HALVES}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(said))
    recipe, _ = drafted(tmp_path / "tower", tmp_path)
    assert recipe.model is not None
    assert (recipe.task, list(recipe.model.outputs)) == ("tensors", ["pooler_output"])
    assert "it also gives last_hidden_state" in (tmp_path / "mine.yaml").read_text()
    data = recipe.data
    assert (data.image_size, data.framing, data.interpolation) == (32, "stretch", "bicubic")
    assert data.mean == (0.5, 0.5, 0.5)
