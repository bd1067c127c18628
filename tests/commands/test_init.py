"""A recipe for a checkpoint and a folder: the network is recognized, the images are read, and what is written can be run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import write_classes, write_imagenet_layout, write_photo
from PIL import Image
from torch import nn
from torchvision.models import mobilenet_v3_small

from compress.commands.init.estimate import OTHERS_S, SCORED, Clock, run_seconds
from compress.commands.init.images import look_at
from compress.commands.init.network import Network
from compress.commands.init.write import write_draft
from compress.commands.shards import write_shards
from compress.errors import CompressError
from compress.models.architectures import build
from compress.models.recognize import fingerprint, recognize
from compress.recipe import shipped
from compress.recipe.read import read_recipe
from export.errors import DataError
from export.images.folders import list_folder
from export.onnx_file.to_onnx import to_onnx


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileNetV3 for three classes, in a wrapper as training scripts write it."""
    path = tmp_path_factory.mktemp("init") / "last.pt"
    network = mobilenet_v3_small(num_classes=3)
    torch.nn.init.zeros_(network.classifier[3].weight)  # the same label at every size: none is right by chance
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, path)
    return path


def test_a_checkpoint_and_a_folder_become_a_recipe_that_reads(checkpoint: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "data")
    out = tmp_path / "new" / "mine.yaml"
    told = "\n".join(write_draft(str(checkpoint), tmp_path / "data", out, arch=None, latency_ms=None, trust_code=False))
    recipe = read_recipe(out)
    assert recipe.model is not None
    assert recipe.model.arch == "torchvision:mobilenet_v3_small"
    assert not recipe.model.reset_head
    assert recipe.name == "mine"
    assert recipe.targets.min_speedup == 2
    assert "for 3 classes" in told
    assert "of them training" in told
    with pytest.raises(CompressError, match=r"max_latency_ms: must be > 0, got -5"):
        list(
            write_draft(
                str(checkpoint), tmp_path / "data", tmp_path / "b.yaml", arch=None, latency_ms=-5, trust_code=False
            )
        )
    assert not (tmp_path / "b.yaml").exists()
    with pytest.raises(CompressError, match="exists already"):
        next(write_draft(str(checkpoint), tmp_path / "data", out, arch=None, latency_ms=None, trust_code=False))
    with pytest.raises(CompressError, match="mobilenet: unknown network; give torchvision:NAME, timm:NAME"):
        next(write_draft(str(checkpoint), tmp_path / "data", tmp_path / "b.yaml", arch="mobilenet", latency_ms=None, trust_code=False))  # fmt: skip


def test_other_classes_start_the_classifier_anew_and_train_the_teacher(checkpoint: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "data", classes=("cat", "dog"))
    out = tmp_path / "mine.yaml"
    list(write_draft(str(checkpoint), tmp_path / "data", out, arch=None, latency_ms=None, trust_code=False))
    recipe = read_recipe(out)
    assert recipe.model is not None
    assert recipe.model.reset_head
    assert recipe.stages[0].stage == "source"
    assert recipe.stages[0].fine_tune


def test_a_path_of_many_words_stays_one_line(checkpoint: Path, tmp_path: Path) -> None:
    data, weights = tmp_path / " ".join(["images"] * 20), tmp_path / f"{' '.join(['weights'] * 20)}.pt"
    write_classes(data)
    weights.write_bytes(checkpoint.read_bytes())
    out = tmp_path / "new" / "mine.yaml"
    list(write_draft(str(weights), data, out, arch=None, latency_ms=None, trust_code=False))
    recipe = read_recipe(out)
    assert recipe.model is not None
    assert (recipe.data.path, recipe.model.weights) == (str(data), str(weights))


@pytest.mark.parametrize("split", [False, True])
def test_images_without_class_folders_are_labelled_by_the_network(
    checkpoint: Path, tmp_path: Path, split: bool
) -> None:
    for part in ("train", "val") if split else (".",):
        for index in range(5):
            write_photo(tmp_path / "data" / part / f"{index}.png", seed=index)
    out = tmp_path / "mine.yaml"
    told = "\n".join(write_draft(str(checkpoint), tmp_path / "data", out, arch=None, latency_ms=None, trust_code=False))
    recipe = read_recipe(out)
    assert recipe.task == "unlabelled"
    assert recipe.model is not None
    assert not recipe.model.reset_head
    assert f"no labels, 5 images ({'5 for validation' if split else 'a fifth is held out'})" in told
    assert "labelled right" not in told


def test_an_empty_class_folder_is_a_mistake_and_not_a_folder_without_labels(tmp_path: Path) -> None:
    write_classes(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        look_at(tmp_path)


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "timm:ghostnet_050", "cifar:resnet20"])
def test_a_network_is_recognized_with_its_number_of_classes(arch: str) -> None:
    state = build(arch, num_classes=7).state_dict()
    found = recognize(dict(reversed(state.items())))  # files sort names as they like
    assert (arch, 7, 3) in [tuple(match) for match in found]


def test_a_fingerprint_knows_neither_order_nor_counters() -> None:
    assert fingerprint(["a", "b", "b.num_batches_tracked"]) == fingerprint(["b", "a"]) != fingerprint(["a"])


def test_a_checkpoint_of_nobody_s_network_asks_for_its_name(tmp_path: Path) -> None:
    torch.save({"mine.weight": torch.zeros(3, 3)}, tmp_path / "w.pt")
    with pytest.raises(CompressError, match="--arch"):
        next(
            write_draft(
                str(tmp_path / "w.pt"), tmp_path, tmp_path / "r.yaml", arch=None, latency_ms=None, trust_code=False
            )
        )


def test_broken_images_are_counted_and_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path)
    next(tmp_path.rglob("*.*g")).write_bytes(b"no image")
    assert len(look_at(tmp_path).broken) == 1


SIDES = """
import torch
from torch import nn
def network(num_classes):
    return nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, num_classes))
"""


@pytest.mark.parametrize("differ", [True, False])
def test_images_are_mirrored_only_where_the_network_knows_them_mirrored(tmp_path: Path, differ: bool) -> None:
    (tmp_path / "sides.py").write_text(SIDES)
    one = torch.ones(1)
    rows = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) if differ else torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    state = {"0.weight": torch.ones(1, 3, 1, 1), "0.bias": 0 * one, "3.weight": rows, "3.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "w.pt")
    for label, halves in (("a", (255, 0 if differ else 255)), ("b", (0, 255 if differ else 0))):
        (tmp_path / "data" / label).mkdir(parents=True)
        pixels = np.repeat(np.array(halves, np.uint8), 16)[None, :, None].repeat(32, 0).repeat(3, 2)
        for index in range(4):
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{index}.png")
    out, arch = tmp_path / "mine.yaml", f"{tmp_path}/sides.py:network"
    told = write_draft(str(tmp_path / "w.pt"), tmp_path / "data", out, arch=arch, latency_ms=None, trust_code=True)
    text = "\n".join(told)
    assert "100.0% of 8 images are labelled right" in text
    assert ("mirrored 0.0% of them: left and right differ" in text) == differ
    recipe = read_recipe(out)
    assert recipe.data.augment.flip == (not differ)
    assert recipe.targets.min_speedup is None  # no INT8 kernel beats microseconds


@pytest.mark.parametrize("score", [None, 0.9])
def test_an_estimate_counts_every_stage(tmp_path: Path, score: float | None) -> None:
    write_classes(tmp_path, classes=("a", "b"))
    folder = replace(look_at(tmp_path), listing=replace(list_folder(tmp_path), train=(("a/1.jpg", 0),) * 7500, val=()))
    network = Network("cifar:resnet20", 2, 32, 1.0, (0.5,) * 3, (0.5,) * 3, score, score)
    training, others = run_seconds(folder, network, Clock(forward=0.001, step=0.004))
    # 8 epochs of distillation and 2 of QAT by half a step each, twice as dear in QAT; the teacher sees 8 views.
    student = 7500 * (0.5 * 0.004 + 0.0003)
    source = 0 if score else 8 * 7500 * 0.0043
    assert training == pytest.approx(source + 8 * student + 2 * 2 * student + 8 * 7500 * 0.001)
    assert others == pytest.approx(OTHERS_S + SCORED * 0.001)


def test_recipes_are_listed_and_copied(tmp_path: Path) -> None:
    assert any(line.startswith("quickstart ") for line in shipped.listing())
    assert read_recipe(shipped.copy("quickstart", tmp_path / "new" / "mine.yaml")).name == "quickstart"
    with pytest.raises(CompressError, match="did you mean quickstart"):
        shipped.copy("quikstart", None)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_folder_of_masks_or_boxes_names_the_recipe_to_take(tmp_path: Path, task: str) -> None:
    write_photo(tmp_path / "images" / "train" / "a.png", width=24, height=20)
    if task == "segmentation":
        write_photo(tmp_path / "masks" / "train" / "a.png", width=24, height=20)
        (tmp_path / "classes.txt").write_text("ground\ncat\n")
    else:
        (tmp_path / "labels" / "train").mkdir(parents=True)
        (tmp_path / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
        (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(
        CompressError, match=f"data set for {task}.*recipes/{task}_int8.yaml --data {tmp_path} --weights w.pt"
    ):
        next(write_draft("w.pt", tmp_path, tmp_path / "x.yaml", arch=None, latency_ms=None, trust_code=False))
    assert shipped.copy(f"{task}_int8", tmp_path / "copy.yaml").exists()


def test_an_onnx_file_becomes_a_recipe_of_its_own_size(tmp_path: Path) -> None:
    write_classes(tmp_path / "data")
    to_onnx(mobilenet_v3_small(num_classes=3).eval(), tmp_path / "net.onnx", shape=(3, 64, 64), metadata={})
    out = tmp_path / "mine.yaml"
    weights = str(tmp_path / "net.onnx")
    list(write_draft(weights, tmp_path / "data", out, arch=None, latency_ms=None, trust_code=False))
    recipe = read_recipe(out)
    assert recipe.model is not None
    assert (recipe.model.arch, recipe.model.weights, recipe.data.image_size) == (f"onnx:{weights}", None, 64)
    assert "optimizer: adamw, lr: 0.001" in (tmp_path / "mine.yaml").read_text()  # no batch-norm is left
    write_classes(tmp_path / "two", classes=("cat", "dog"))
    with pytest.raises(CompressError, match=r"has 3 classes, .* has 2, and a whole network keeps its classifier"):
        next(write_draft(weights, tmp_path / "two", tmp_path / "b.yaml", arch=None, latency_ms=None, trust_code=False))


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 64)])
def test_an_onnx_file_of_one_channel_is_taken_and_one_of_two_sides_is_a_sentence(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    write_depths(tmp_path / "depths")
    network = nn.Sequential(nn.Conv2d(shape[0], 4, 3, 8, 1), nn.Flatten(), nn.Linear(shape[1] * shape[2] // 16, 2))
    to_onnx(network.eval(), tmp_path / "net.onnx", shape=shape, metadata={})
    out, weights = tmp_path / "mine.yaml", str(tmp_path / "net.onnx")
    lines = write_draft(weights, tmp_path / "depths", out, arch=None, latency_ms=None, trust_code=False)
    if shape[0] == 3:
        with pytest.raises(CompressError, match=r"does not take images of 224 x 224 .*data.image_size"):
            list(lines)
    else:
        list(lines)
        recipe = read_recipe(out)
        assert (recipe.data.channels, recipe.data.image_size) == (1, 32)


def test_shards_become_the_recipe_of_their_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_imagenet_layout(tmp_path / "data")
    write_shards("data", Path("shards"), size_mb=1)
    texts = []
    for name in ("data", "shards"):
        out = tmp_path / name / "mine.yaml"
        list(write_draft(str(checkpoint), Path(name), out, arch=None, latency_ms=None, trust_code=False))
        texts.append(out.read_text())
        out.unlink()
    assert texts[0] == texts[1].replace("shards", "data")


def write_depths(folder: Path) -> None:
    """Write class folders of depths, grey of 16 bits."""
    for label, name in enumerate(("near", "far")):
        (folder / name).mkdir(parents=True)
        for index in range(6):
            values = np.random.default_rng(10 * label + index).integers(
                20_000 * label, 20_000 * label + 9_000, (32, 40)
            )
            Image.fromarray(values.astype(np.uint16)).save(folder / name / f"{index}.png")


def test_depths_under_weights_of_one_channel_are_measured_and_kept_in_sixteen_bits(tmp_path: Path) -> None:
    write_depths(tmp_path / "depths")
    torch.save(build("cifar:resnet8", num_classes=2, shape=(1, 32, 32)).state_dict(), tmp_path / "grey.pt")
    out = tmp_path / "mine.yaml"
    lines = write_draft(
        str(tmp_path / "grey.pt"), tmp_path / "depths", out, arch=None, latency_ms=None, trust_code=False
    )
    told = "\n".join(lines)
    data = read_recipe(out).data
    assert data.channels == 1
    assert "opened: 12 of 1 channel of 16 bits; read as 1 channel of 16 bits" in told
    if data.mean[0] not in (0.5, 0.0):
        assert data.mean[0] == pytest.approx(14_500 / 65_535, abs=0.01)  # 4,500 and 24,500


def test_depths_under_weights_for_colours_are_read_as_colours_and_that_is_said(
    checkpoint: Path, tmp_path: Path
) -> None:
    write_depths(tmp_path / "depths")
    out = tmp_path / "mine.yaml"
    words = {"arch": None, "latency_ms": None, "trust_code": False}
    told = "\n".join(write_draft(str(checkpoint), tmp_path / "depths", out, **words))  # type: ignore[arg-type]
    assert "opened: 12 of 1 channel of 16 bits; read as colours of 8 bits, as the weights take them" in told
    assert read_recipe(out).data.channels == 3
    write_classes(tmp_path / "colours", classes=("cat", "dog"))
    torch.save(build("cifar:resnet8", num_classes=2, shape=(1, 32, 32)).state_dict(), tmp_path / "grey.pt")
    with pytest.raises(CompressError, match=r"most images have 3 channels of 8 bits, and .*grey\.pt takes 1 channel"):
        list(write_draft(str(tmp_path / "grey.pt"), tmp_path / "colours", tmp_path / "b.yaml", **words))  # type: ignore[arg-type]
