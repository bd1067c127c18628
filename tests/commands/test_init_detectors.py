"""What init writes for a folder of transformers' detectors (its processor's preprocessing, what it serves, how it learns), and for a YOLOX."""

import json
from pathlib import Path

import pytest
import torch
from test_detection_chain import write_squares
from typer.testing import CliRunner

from compress.cli import app
from compress.models.architectures import build
from compress.recipe.read import read_recipe

PROCESSOR = {
    "image_processor_type": "RTDetrImageProcessor",
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_resize": True,
    "resample": 2,
    "size": {"height": 64, "width": 96},
    "image_mean": [0.5, 0.25, 0.5],
    "image_std": [0.5, 0.5, 0.25],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny RT-DETR for red and blue in `rt_detr`, and squares of these classes in `data`."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("queries")
    write_squares(folder / "data", "train", 4, 0)
    write_squares(folder / "data", "val", 4, 1)
    from queried import stepped

    torch.manual_seed(0)
    config = transformers.RTDetrConfig(**stepped(num_labels=2, id2label={0: "red", 1: "blue"}))
    network = transformers.RTDetrForObjectDetection(config)
    for weight in network.parameters():  # else all images look alike
        torch.nn.init.normal_(weight, std=1 / weight[0].numel() ** 0.5)
    network.save_pretrained(folder / "rt_detr")
    (folder / "rt_detr" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def test_a_folder_of_transformers_detectors_becomes_a_recipe_of_queries(root: Path) -> None:
    given = ["--weights", str(root / "rt_detr"), "--data", str(root / "data"), "-o", str(root / "mine.yaml")]
    result = CliRunner().invoke(app, ["init", *given])
    assert result.exit_code == 0, result.output
    recipe = read_recipe(root / "mine.yaml")
    assert recipe.task == "detection"
    assert recipe.decode is not None
    assert recipe.decode.function == "queries"
    assert recipe.data.image_size == (64, 96)
    assert recipe.data.framing == "stretch"
    assert (recipe.data.mean, recipe.data.std) == ((0.5, 0.25, 0.5), (0.5, 0.5, 0.25))
    assert recipe.model is not None
    assert [*recipe.model.outputs] == ["logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits"]
    distilled = next(stage for stage in recipe.stages if stage.stage == "distill")
    assert distilled.fit.clip_norm == 1


def test_classes_in_another_order_than_the_images_are_refused(root: Path) -> None:
    config = json.loads((root / "rt_detr" / "config.json").read_text())
    (root / "turned").mkdir()
    for file in (root / "rt_detr").iterdir():
        (root / "turned" / file.name).write_bytes(file.read_bytes())
    turned = config | {"id2label": {"0": "blue", "1": "red"}, "label2id": {"blue": 0, "red": 1}}
    (root / "turned" / "config.json").write_text(json.dumps(turned))
    given = ["--weights", str(root / "turned"), "--data", str(root / "data"), "-o", str(root / "turned.yaml")]
    result = CliRunner().invoke(app, ["init", *given])
    assert result.exit_code == 2
    assert "has the classes blue, red, " in result.stderr
    assert "list them there in the network's order" in result.stderr


def test_a_yolox_of_other_classes_learns_the_images_first(tmp_path: Path) -> None:
    pytest.importorskip("yolox")
    write_squares(tmp_path / "data", "train", 4, 0)
    write_squares(tmp_path / "data", "val", 4, 1)
    torch.save({"model": build("yolox:nano", num_classes=80).state_dict()}, tmp_path / "nano.pth")
    given = ["--arch", "yolox:nano", "--weights", str(tmp_path / "nano.pth"), "--data", str(tmp_path / "data")]
    result = CliRunner().invoke(app, ["init", *given, "-o", str(tmp_path / "mine.yaml")])
    assert result.exit_code == 0, result.output
    assert "its classes are not the images'" in " ".join(result.output.split())
    recipe = read_recipe(tmp_path / "mine.yaml")
    assert recipe.model is not None
    assert recipe.model.reset_head
    assert recipe.data.framing == "letterbox_corner"
    source = recipe.stages[0]
    assert source.stage == "source"
    assert source.fit is not None
    assert source.fine_tune

    given[1] = "yolox:tiny"
    result = CliRunner().invoke(app, ["init", *given, "-o", str(tmp_path / "other.yaml")])
    assert result.exit_code == 2
    assert "give weights of this architecture" in result.stderr
