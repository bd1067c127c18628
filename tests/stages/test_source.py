"""The source stage trains the teacher, an auxiliary classifier beside it, and saves it without that."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from drawn import few_scenes
from photographs import write_classes, write_photo
from safetensors.torch import load_file
from torch.nn import functional as F

from compress.data.batches import Batch
from compress.data.digest import NOTES
from compress.data.named import DATA_SETS, NamedSet
from compress.distillation.step import auxiliary_training
from compress.models.architectures import auxiliary, build
from compress.models.saved import load_float
from compress.recipe.schema import Recipe
from compress.run import open_run
from compress.stages import source
from compress.tasks import TASKS
from export.images.preprocess import IGNORED

ARCH, CLASSES = "torchvision:deeplabv3_mobilenet_v3_large", 4


@pytest.mark.parametrize(("arch", "layer"), [("fcn_resnet50", "layer3"), ("deeplabv3_mobilenet_v3_large", "4")])
def test_the_classifier_reads_torchvisions_layer(arch: str, layer: str) -> None:
    found = auxiliary(f"torchvision:{arch}", CLASSES)
    assert found is not None
    assert found[0] == f"backbone.{layer}"
    assert dict(build(f"torchvision:{arch}", num_classes=CLASSES).named_modules()).keys() >= {found[0]}
    for other in (
        "torchvision:lraspp_mobilenet_v3_large",
        "torchvision:resnet18",
        "fpn:resnet18",
        "fcn_a.py:deeplabv3_",
    ):
        assert auxiliary(other, CLASSES) is None


def test_its_loss_counts_half_as_in_torchvisions_training() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(
        ARCH.partition(":")[2], weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True
    )
    mine, found = build(ARCH, num_classes=CLASSES), auxiliary(ARCH, CLASSES)
    assert found is not None
    layer, head = found
    state = theirs.state_dict()
    mine.load_state_dict({name: value for name, value in state.items() if not name.startswith("aux_classifier")})
    head.load_state_dict(theirs.aux_classifier.state_dict())
    learner, step = auxiliary_training(TASKS["segmentation"], mine, layer=layer, head=head, label_smoothing=0.0)
    images, masks = torch.randn(3, 3, 32, 48), torch.randint(0, CLASSES, (3, 32, 48))
    masks[:, :4] = IGNORED
    torch.manual_seed(1)  # of dropout
    measured = step(learner.train(), Batch(images, masks), 0.0)
    torch.manual_seed(1)
    outputs = theirs.train()(images)
    main, second = (F.cross_entropy(outputs[name], masks, ignore_index=IGNORED) for name in ("out", "aux"))
    assert measured["loss"].item() == pytest.approx((main + 0.5 * second).item(), rel=1e-5)
    measured["loss"].backward()
    assert all(parameter.grad is not None for parameter in learner.parameters())


def test_what_is_odd_about_the_data_is_logged_before_training(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", classes=("cat", "dog"))
    for file in sorted(root.glob("*/*")):
        (root / "train" / file.parent.name).mkdir(parents=True, exist_ok=True)
        file.rename(root / "train" / file.parent.name / file.name)
    shutil.copytree(root / "train" / "dog", root / "val" / "dog")
    write_photo(root / "val" / "cat" / "new.png", seed=99)
    data = {"dataset": "imagefolder", "path": str(root), "image_size": 16}
    small = f"{Path(__file__).parent.parent / 'networks.py'}:small"
    fit = {"epochs": 1, "batch_size": 4, "lr": 0.01}
    recipe = Recipe.model_validate(
        {
            "name": "a", "data": data, "model": {"arch": small}, "device": "cpu", "out": str(tmp_path / "out"),
            "stages": [{"stage": "source", "fit": fit}],
        }
    )  # fmt: skip
    run = open_run(recipe, trust_code=True, verbose=False)
    source.apply(recipe.stages[0], None, tmp_path, run)  # type: ignore[arg-type]
    (note,) = json.loads((tmp_path / NOTES).read_text())
    assert note.startswith("4 of 5 validation images are training images too, byte for byte (val/dog/")
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0]) == {"note": note}


def test_it_is_trained_and_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA_SETS, "scenes_plain", NamedSet(32, scenes=few_scenes("scenes_plain", train=8, val=4)))
    fit = {"epochs": 1, "batch_size": 4, "lr": 0.01}
    data = {"dataset": "scenes_plain"}
    recipe = Recipe.model_validate(
        {
            "name": "a", "task": "segmentation", "data": data, "model": {"arch": ARCH}, "device": "cpu",
            "stages": [{"stage": "source", "fit": fit}],
        }
    )  # fmt: skip
    run = open_run(recipe, trust_code=False, verbose=False)
    section = recipe.stages[0]
    metrics = source.apply(section, None, tmp_path, run)  # type: ignore[arg-type]
    assert metrics["score"] is not None
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (epoch,) = [line for line in lines if "epoch" in line]
    assert epoch["auxiliary"] > 0
    assert not [name for name in load_file(tmp_path / "weights.safetensors") if "aux" in name or "adapter" in name]
    assert run.evaluate(load_float(tmp_path, trust_code=False))["score"] == pytest.approx(metrics["score"], abs=1e-4)
