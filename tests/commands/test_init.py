"""A recipe for a checkpoint and a folder: the network is recognized, the images are read, and what is written can be run."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import write_classes, write_imagenet_layout, write_photo
from PIL import Image
from torch import nn
from torchvision.models import mobilenet_v3_small
from typer.testing import CliRunner

from compress.cli import app
from compress.commands.init import ways, write
from compress.commands.init.draft import Draft, recipe
from compress.commands.init.estimate import SETTLED, START_S, StepTime, halved, planned, timed
from compress.commands.init.images import Folder, look_at
from compress.commands.init.ways import Network, Tried, _Judge
from compress.commands.init.write import write_draft
from compress.commands.shards import write_shards
from compress.errors import CompressError
from compress.models.architectures import build
from compress.models.published import IMAGENET
from compress.models.recognize import fingerprint, recognize
from compress.models.structure import count
from compress.recipe import shipped
from compress.recipe.read import read_recipe
from export.errors import DataError
from export.images.folders import list_folder
from export.images.preprocess import Preprocess
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
    told = "\n".join(
        write_draft(str(checkpoint), tmp_path / "data", out, arch=None, latency_ms=None, minutes=30, trust_code=False)
    )
    recipe = read_recipe(out)
    assert recipe.model is not None
    assert recipe.model.arch == "torchvision:mobilenet_v3_small"
    assert not recipe.model.reset_head
    assert recipe.name == "mine"
    assert recipe.targets.min_speedup == 2
    assert "for 3 classes" in told
    assert "epochs of distillation and" in told
    with pytest.raises(CompressError, match=r"max_latency_ms: must be > 0, got -5"):
        list(
            write_draft(
                str(checkpoint),
                tmp_path / "data",
                tmp_path / "b.yaml",
                arch=None,
                latency_ms=-5,
                minutes=30,
                trust_code=False,
            )
        )
    assert not (tmp_path / "b.yaml").exists()
    with pytest.raises(CompressError, match="exists already"):
        next(
            write_draft(
                str(checkpoint), tmp_path / "data", out, arch=None, latency_ms=None, minutes=30, trust_code=False
            )
        )
    with pytest.raises(CompressError, match="mobilenet: unknown network; give torchvision:NAME, timm:NAME"):
        next(write_draft(str(checkpoint), tmp_path / "data", tmp_path / "b.yaml", arch="mobilenet", latency_ms=None, minutes=30, trust_code=False))  # fmt: skip


def test_other_classes_start_the_classifier_anew_and_train_the_teacher(checkpoint: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "data", classes=("cat", "dog"))
    out = tmp_path / "mine.yaml"
    told = list(
        write_draft(str(checkpoint), tmp_path / "data", out, arch=None, latency_ms=None, minutes=30, trust_code=False)
    )
    recipe = read_recipe(out)
    assert recipe.model is not None
    assert recipe.model.reset_head
    assert recipe.stages[0].stage == "source"
    assert recipe.stages[0].fine_tune
    assert any("epochs for the new classifier come first" in line for line in told)


def test_a_path_of_many_words_stays_one_line(checkpoint: Path, tmp_path: Path) -> None:
    data, weights = tmp_path / " ".join(["images"] * 20), tmp_path / f"{' '.join(['weights'] * 20)}.pt"
    write_classes(data)
    weights.write_bytes(checkpoint.read_bytes())
    out = tmp_path / "new" / "mine.yaml"
    list(write_draft(str(weights), data, out, arch=None, latency_ms=None, minutes=30, trust_code=False))
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
    told = "\n".join(
        write_draft(str(checkpoint), tmp_path / "data", out, arch=None, latency_ms=None, minutes=30, trust_code=False)
    )
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
    assert (arch, 7, 3) in [match[:3] for match in found]


def test_a_fingerprint_knows_neither_order_nor_counters() -> None:
    assert fingerprint(["a", "b", "b.num_batches_tracked"]) == fingerprint(["b", "a"]) != fingerprint(["a"])


def test_a_checkpoint_of_nobody_s_network_asks_for_its_name(tmp_path: Path) -> None:
    torch.save({"mine.weight": torch.zeros(3, 3)}, tmp_path / "w.pt")
    with pytest.raises(CompressError, match="--arch"):
        next(
            write_draft(
                str(tmp_path / "w.pt"),
                tmp_path,
                tmp_path / "r.yaml",
                arch=None,
                latency_ms=None,
                minutes=30,
                trust_code=False,
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
    told = write_draft(
        str(tmp_path / "w.pt"), tmp_path / "data", out, arch=arch, latency_ms=None, minutes=30, trust_code=True
    )
    text = "\n".join(told)
    assert "100.0% of 8 images are labelled right" in text
    assert ("mirrored 0.0% of them: left and right differ" in text) == differ
    recipe = read_recipe(out)
    assert recipe.data.augment.flip == (not differ)
    assert recipe.targets.min_speedup is None  # no INT8 kernel beats microseconds


def folder_of(tmp_path: Path, train: int) -> Folder:
    """Two classes, of which so many training images are listed, and no validation images."""
    write_classes(tmp_path, classes=("a", "b"))
    folder = look_at(tmp_path)
    return replace(folder, listing=replace(list_folder(tmp_path), train=(("a/1.jpg", 0),) * train, val=()))


@pytest.mark.parametrize("classes", [2, 3])
def test_an_estimate_counts_every_stage(tmp_path: Path, classes: int) -> None:
    folder = folder_of(tmp_path, 7500)
    network = Network("cifar:resnet20", classes, folder.prepared((32, 32), 1.0, IMAGENET), None, None)
    plan = planned(folder, network, StepTime(forward=0.001, half=0.0005, step=0.0028, exact=0.002, layers=50), 3600)
    # 8 epochs of distillation, 2 of QAT; the teacher sees 8 views.
    student, settled = 7500 * (0.0028 + 0.0003), SETTLED * 0.0005
    assert (plan.source, plan.distill, plan.qat) == (0 if classes == 2 else 8, 8, 2)
    assert plan.seconds["source"] == pytest.approx(START_S + (0 if classes == 2 else 8 * 7500 * 0.0059))
    assert plan.seconds["distill"] == pytest.approx(8 * (student + settled) + 8 * 7500 * 0.001)
    assert plan.seconds["qat"] == pytest.approx(2 * 7500 * (1.5 * 0.002 + 0.0003))


def test_a_step_of_the_half_is_timed_and_of_the_whole_where_nothing_can_be_cut() -> None:
    model, shape = build("cifar:resnet20", num_classes=10), (3, 32, 32)
    assert count(halved(model, shape), shape).macs == pytest.approx(0.5 * count(model, shape).macs, rel=0.1)
    clock = timed(model, shape, 32)
    assert 0 < clock.half < clock.step
    assert clock.step <= clock.exact
    assert not model.training
    alone = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert count(halved(alone, shape), shape).macs == count(alone, shape).macs


@pytest.mark.parametrize(("arch", "has_heads"), [("timm:test_vit", True), ("cifar:resnet20", False)])
def test_a_recipe_opens_the_heads_of_attention_where_there_are_any(arch: str, has_heads: bool, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 20)
    network = Network(arch, 2, folder.prepared((32, 32), 1.0, IMAGENET), 0.9, 0.9)
    model = build(arch, num_classes=2, shape=network.shape).eval()
    given = Draft("a.pth", tmp_path, folder, network, model, 1e6, None, trust_code=False)
    plan = planned(folder, network, StepTime(forward=0.001, half=0.0005, step=0.0028, exact=0.002, layers=50), 3600)
    assert ("inside_heads: true" in recipe(given, plan, "a")) == has_heads


def test_a_plan_trains_what_the_minutes_allow_and_nothing_where_it_would_be_too_little(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 7500)
    network = Network("cifar:resnet20", 2, folder.prepared((32, 32), 1.0, IMAGENET), 0.9, 0.9)
    clock = StepTime(forward=0.004, half=0.002, step=0.0084, exact=0.006, layers=50)
    plans = [planned(folder, network, clock, 60 * minutes) for minutes in (4, 9, 12, 60)]
    assert [plan.distill for plan in plans] == sorted(plan.distill for plan in plans)
    assert (plans[0].distill, plans[0].qat, plans[-1].distill) == (0, 0, 8)
    assert all(plan.total <= 60 * minutes for plan, minutes in zip(plans, (4, 9, 12, 60), strict=True))
    assert planned(folder, network, clock, 8 * 3600, longer=3).distill == 24
    busy = StepTime(0.008, 0.004, 0.0168, 0.012, 50, share=0.5)
    assert planned(folder, network, busy, 1800) == planned(folder, network, clock, 1800)


def test_recipes_are_listed_and_copied(tmp_path: Path) -> None:
    assert any(line.startswith("quickstart ") for line in shipped.listing())
    assert read_recipe(shipped.copy("quickstart", tmp_path / "new" / "mine.yaml")).name == "quickstart"
    with pytest.raises(CompressError, match="did you mean quickstart"):
        shipped.copy("quikstart", None)


def write_placed(folder: Path, task: str) -> None:
    """Write six images with masks, boxes in YOLO's format, or a labels.csv."""
    rows = ["file,labels"]
    for part, index in ((part, index) for part in ("train", "val") for index in range(3)):
        inside = folder / part if task == "multilabel" else folder / "images" / part
        write_photo(inside / f"{index}.png", width=96, height=64, seed=index)
        if task == "segmentation":
            (folder / "masks" / part).mkdir(parents=True, exist_ok=True)
            mask = np.full((64, 96), index, np.uint8)
            mask[:8] = 3  # none of the classes
            Image.fromarray(mask).save(folder / "masks" / part / f"{index}.png")
        elif task == "detection":
            (folder / "labels" / part).mkdir(parents=True, exist_ok=True)
            boxes = "".join(
                f"{label} 0.5 0.5 0.4 0.6\n" for label in range(index + 1)
            )  # more in one image than in another
            (folder / "labels" / part / f"{index}.txt").write_text(boxes)
        else:
            rows.append(f"{part}/{index}.png,{'cat;dog;owl' if index else 'cat'}")
    if task == "multilabel":
        (folder / "labels.csv").write_text("\n".join(rows))
    else:
        (folder / "classes.txt").write_text("cat\ndog\nowl\n")


@pytest.mark.parametrize(
    ("task", "arch"),
    [
        ("segmentation", "torchvision:lraspp_mobilenet_v3_large"),
        ("segmentation", "fpn:resnet18"),
        ("detection", "torchvision:ssdlite320_mobilenet_v3_large"),
        ("detection", "ssdlite:mobilenet_v3_small"),
        ("multilabel", "cifar:resnet8"),
    ],
)
@pytest.mark.parametrize("same", [True, False])
def test_masks_boxes_and_several_labels_become_a_recipe_that_reads(
    tmp_path: Path, task: str, arch: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "timed", lambda *_: StepTime(0.001, 0.0005, 0.0021, 0.0015, 50))
    monkeypatch.setattr(ways, "FEWEST", 2)
    monkeypatch.setattr(ways, "FIRST", 2)
    monkeypatch.setattr(ways, "BATCH", 1)
    write_placed(tmp_path / "data", task)
    torch.save(build(arch, num_classes=3 if same else 7).state_dict(), tmp_path / "w.pt")
    out = tmp_path / "mine.yaml"
    words = {"arch": None, "latency_ms": None, "minutes": 30, "trust_code": False}
    told = "\n".join(write_draft(str(tmp_path / "w.pt"), tmp_path / "data", out, **words))  # type: ignore[arg-type]
    recipe = read_recipe(out)
    assert recipe.model is not None
    assert (recipe.task, recipe.model.arch, recipe.model.reset_head) == (task, arch, not same)
    assert f"{arch} for {3 if same else 7} classes" in told
    assert "3 images with" in told
    assert recipe.data.ignore_index == (3 if task == "segmentation" else None)
    if arch == "torchvision:ssdlite320_mobilenet_v3_large":
        assert (recipe.data.image_size, recipe.data.mean) == (320, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_masks_or_boxes_under_a_classifier_s_weights_ask_for_other_weights(
    checkpoint: Path, tmp_path: Path, task: str
) -> None:
    write_placed(tmp_path / "data", task)
    lines = write_draft(
        str(checkpoint),
        tmp_path / "data",
        tmp_path / "x.yaml",
        arch=None,
        latency_ms=None,
        minutes=30,
        trust_code=False,
    )
    with pytest.raises(
        CompressError, match=f"data set for {task}, but .*mobilenet_v3_small, which gives .* such as torchvision:"
    ):
        list(lines)


def test_init_speaks_before_it_reads_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "compress.commands.init.write", None)  # whose import takes seconds
    result = CliRunner().invoke(app, ["init", "--weights", "w.pt", "--data", "images"])
    assert isinstance(result.exception, ImportError)
    assert "reads    w.pt and the images of images" in result.output


def test_the_network_is_named_before_the_images_are_opened(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "look_at", None)
    lines = write_draft(
        str(checkpoint), tmp_path, tmp_path / "x.yaml", arch=None, latency_ms=None, minutes=30, trust_code=False
    )
    assert next(lines).endswith("torchvision:mobilenet_v3_small for 3 classes")


def test_the_cheapest_size_within_a_point_of_the_best_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path / "data", per_class=30)
    scores = {64: 0.3, 96: 0.69, 128: 0.795, 160: 0.8, 192: 0.79, 224: 0.75}
    torch.save(build("torchvision:resnet18", num_classes=3).state_dict(), tmp_path / "w.pt")
    seen = list[int]()

    def raced(_: _Judge, asked: list[Preprocess]) -> list[Tried]:
        seen.extend(way.image_size[0] for way in asked)
        return [Tried(way, 90, scores.get(way.image_size[0], 0.1), float(way.image_size[0]) ** 2) for way in asked]

    monkeypatch.setattr(_Judge, "raced", raced)
    monkeypatch.setattr(write, "timed", lambda *_: StepTime(0.001, 0.0005, 0.0021, 0.0015, 50))
    out = tmp_path / "mine.yaml"
    words = {"arch": None, "latency_ms": None, "minutes": 30, "trust_code": False}
    told = "\n".join(write_draft(str(tmp_path / "w.pt"), tmp_path / "data", out, **words))  # type: ignore[arg-type]
    assert set(scores) < set(seen)
    assert read_recipe(out).data.image_size == 128
    assert re.search(r" 128 +16.0x +79.5% +90  <- the cheapest within a point of the best\n", told)
    assert (tmp_path / "mine_night.yaml").exists()


def test_an_onnx_file_becomes_a_recipe_of_its_own_size(tmp_path: Path) -> None:
    write_classes(tmp_path / "data")
    to_onnx(mobilenet_v3_small(num_classes=3).eval(), tmp_path / "net.onnx", shape=(3, 64, 64), metadata={})
    out = tmp_path / "mine.yaml"
    weights = str(tmp_path / "net.onnx")
    list(write_draft(weights, tmp_path / "data", out, arch=None, latency_ms=None, minutes=30, trust_code=False))
    recipe = read_recipe(out)
    assert recipe.model is not None
    assert (recipe.model.arch, recipe.model.weights, recipe.data.image_size) == (f"onnx:{weights}", None, 64)
    assert "optimizer: adamw, lr: 0.001" in (tmp_path / "mine.yaml").read_text()  # no batch-norm is left
    write_classes(tmp_path / "two", classes=("cat", "dog"))
    with pytest.raises(CompressError, match=r"has 3 classes, .* has 2, and a whole network keeps its classifier"):
        list(
            write_draft(
                weights, tmp_path / "two", tmp_path / "b.yaml", arch=None, latency_ms=None, minutes=30, trust_code=False
            )
        )


def test_an_onnx_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "data")
    words = {"arch": None, "latency_ms": None, "minutes": 30, "trust_code": False}
    with pytest.raises(CompressError, match=r"gone\.onnx: the ONNX file does not exist; check the path"):
        list(write_draft(str(tmp_path / "gone.onnx"), tmp_path / "data", tmp_path / "a.yaml", **words))  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "size"), [((1, 32, 32), 32), ((3, 32, 64), (32, 64))])
def test_an_onnx_file_of_one_channel_or_of_two_sides_is_taken(
    tmp_path: Path, shape: tuple[int, int, int], size: object
) -> None:
    write_depths(tmp_path / "depths")
    network = nn.Sequential(nn.Conv2d(shape[0], 4, 3, 8, 1), nn.Flatten(), nn.Linear(shape[1] * shape[2] // 16, 2))
    to_onnx(network.eval(), tmp_path / "net.onnx", shape=shape, metadata={})
    out, weights = tmp_path / "mine.yaml", str(tmp_path / "net.onnx")
    list(write_draft(weights, tmp_path / "depths", out, arch=None, latency_ms=None, minutes=30, trust_code=False))
    recipe = read_recipe(out)
    assert (recipe.data.channels, recipe.data.image_size) == (shape[0], size)


def test_shards_become_the_recipe_of_their_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_imagenet_layout(tmp_path / "data")
    write_shards("data", Path("shards"), size_mb=1)
    texts = []
    for name in ("data", "shards"):
        out = tmp_path / name / "mine.yaml"
        list(write_draft(str(checkpoint), Path(name), out, arch=None, latency_ms=None, minutes=30, trust_code=False))
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
        str(tmp_path / "grey.pt"), tmp_path / "depths", out, arch=None, latency_ms=None, minutes=30, trust_code=False
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
    words = {"arch": None, "latency_ms": None, "minutes": 30, "trust_code": False}
    told = "\n".join(write_draft(str(checkpoint), tmp_path / "depths", out, **words))  # type: ignore[arg-type]
    assert "opened: 12 of 1 channel of 16 bits; read as colours of 8 bits, as the weights take them" in told
    assert read_recipe(out).data.channels == 3
    write_classes(tmp_path / "colours", classes=("cat", "dog"))
    torch.save(build("cifar:resnet8", num_classes=2, shape=(1, 32, 32)).state_dict(), tmp_path / "grey.pt")
    with pytest.raises(CompressError, match=r"most images have 3 channels of 8 bits, and .*grey\.pt takes 1 channel"):
        list(write_draft(str(tmp_path / "grey.pt"), tmp_path / "colours", tmp_path / "b.yaml", **words))  # type: ignore[arg-type]


OWN = """
import torch
from torch import nn
def fixed(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 16 * 16, num_classes))
def two(num_classes):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, num_classes)
        def forward(self, images):
            return self.layer(images.mean((2, 3))), images
    return Two()
"""


def own(tmp_path: Path, factory: str, side: int) -> list[str]:
    """Return what init says of a network of a person's own and images of one size, two classes that a grey level tells apart."""
    (tmp_path / "own.py").write_text(OWN)
    for label, grey in (("dark", 30), ("light", 220)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (side, side), (grey + index,) * 3).save(tmp_path / "data" / label / f"{index}.png")
    (tmp_path / "data" / "labels.csv").write_text("id,name\ndark,Night\nlight,Day\n")
    model = build(f"{tmp_path}/own.py:{factory}", num_classes=2, trust_code=True)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    arch, out = f"{tmp_path}/own.py:{factory}", tmp_path / "mine.yaml"
    return list(
        write_draft(
            str(tmp_path / "w.pt"), tmp_path / "data", out, arch=arch, latency_ms=None, minutes=30, trust_code=True
        )
    )


def test_a_network_of_one_size_is_tried_at_the_images_own_beside_a_table_of_something_else(tmp_path: Path) -> None:
    told = "\n".join(own(tmp_path, "fixed", 32))
    assert "seen at  32 pixels" in told
    assert "2 classes" in told


def test_a_network_that_takes_no_size_that_is_tried_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="does not take images of"):
        own(tmp_path, "fixed", 100)


def test_a_network_of_two_outputs_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="returns a tuple, and one tensor is served"):
        own(tmp_path, "two", 32)


def test_chance_is_what_guessing_gives() -> None:
    assert write._by_chance(2, 128) < 0.65
    assert 0.05 < write._by_chance(20, 129) < 0.12
