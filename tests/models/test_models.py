import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_pruning
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.models.architectures import build
from compress.models.digest import source_digest
from compress.models.saved import Architecture, load_float, save_network
from compress.models.structure import check_logits, check_output, classifier, count
from compress.models.weights import load_weights_

FACTORY = """\
from torch import nn

class Net(nn.Sequential):
    pass

def network(num_classes):
    return Net(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


class HeadFirst(nn.Module):
    """Registers its head before its body, and takes 32 pixels only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 32 * 32, 5)
        self.body = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).flatten(1))
        return logits


class Attention(nn.Module):
    """Attends over 16 pixels with 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.embed = nn.Conv2d(3, 8, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).mT
        attended: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return attended


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 7)

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(images.flatten(2).mT, self.project.weight)


# Building


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "torchvision:googlenet", "timm:resnet10t"])
def test_a_library_network_gives_one_logit_for_each_class_in_eval_mode(arch: str) -> None:
    model = build(arch, num_classes=7)
    assert not model.training
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_a_network_of_one_size_is_built_for_the_recipes() -> None:
    model = build("timm:test_vit", num_classes=7, shape=(3, 64, 64))  # its own is 160
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(ModelError, match=r"vit_b_16: cannot be built for 100 pixels .* data\.image_size"):
        build("torchvision:vit_b_16", num_classes=7, shape=(3, 100, 100))


@pytest.mark.parametrize(
    ("arch", "near"),
    [("torchvision:resnet81", "resnet18"), ("torchvision:ResNet50", "resnet50"), ("timm:resnet10s", "resnet10t")],
)
def test_an_unknown_name_is_refused_with_the_nearest(arch: str, near: str) -> None:
    with pytest.raises(ModelError, match=f"{arch}: .* of this name; did you mean .*{near}"):
        build(arch, num_classes=7)


def test_a_network_for_another_task_is_refused() -> None:
    with pytest.raises(ModelError, match="torchvision has no network of this name"):
        build("torchvision:keypointrcnn_resnet50_fpn", num_classes=7)


def test_timm_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="pip install timm"):
        build("timm:resnet10t", num_classes=7)


def test_a_persons_own_file_is_built_with_their_trust(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    model = build(f"{tmp_path}/mine.py:network", num_classes=7, trust_code=True)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_a_persons_own_file_may_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "blocks_of_mine.py").write_text(FACTORY)
    (tmp_path / "mine.py").write_text("from blocks_of_mine import network\n")
    path = list(sys.path)
    assert isinstance(build(f"{tmp_path}/mine.py:network", num_classes=7, trust_code=True), nn.Module)
    assert sys.path == path


def test_two_files_may_not_import_different_neighbours_of_one_name(tmp_path: Path) -> None:
    """Python would give the second file the first one's."""
    for folder, width in (("first", "8"), ("second", "16")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cells_of_mine.py").write_text(FACTORY.replace("8", width))
        (tmp_path / folder / "mine.py").write_text("from cells_of_mine import network\n")
    assert isinstance(build(f"{tmp_path}/first/mine.py:network", num_classes=7, trust_code=True), nn.Module)
    with pytest.raises(ModelError, match=r"imports cells_of_mine, but \S+/first/cells_of_mine\.py has that name"):
        build(f"{tmp_path}/second/mine.py:network", num_classes=7, trust_code=True)


def test_a_persons_own_file_is_not_run_without_their_trust(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{FACTORY}")
    with pytest.raises(ModelError, match=r"runs the code in \S+/mine\.py; read it first, then add --trust-code"):
        build(f"{tmp_path}/mine.py:network", num_classes=7)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (FACTORY.replace("def network", "def netwrok"), "defines no network; did you mean netwrok"),
        (FACTORY.replace("(num_classes)", "()"), r"must be callable as network\(num_classes\)"),
        ("def network(num_classes):\n    return 3\n", r"must return a torch\.nn\.Module, returned int"),
        ("def network(:\n", "cannot be imported: invalid syntax"),
        ("import no_such_module\n", "cannot be imported: No module named 'no_such_module'"),
    ],
    ids=["misspelt", "signature", "no module", "syntax", "import"],
)
def test_an_own_file_that_cannot_be_used_is_refused(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ModelError, match=message):
        build(f"{tmp_path}/mine.py:network", num_classes=7, trust_code=True)


def test_an_own_file_that_is_missing_is_named_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "network.py").touch()
    with pytest.raises(ModelError, match=r"netwrok\.py: the model's file does not exist; did you mean \S+/network\.py"):
        build(f"{tmp_path}/netwrok.py:network", num_classes=7, trust_code=True)


# Counting


def test_counts_are_those_of_hand_arithmetic() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16 x 16 outputs, 27 products each
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, (3, 1), groups=4),  # 14 x 16 outputs, 2 * 3 products each
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    counts = count(model, (3, 32, 32))
    assert counts.macs == 8 * 16 * 16 * 27 + 8 * 14 * 16 * 6 + 80
    assert counts.params == (8 * 27 + 8) + 16 + (8 * 6 + 8) + (80 + 10)


def test_attention_counts_by_its_four_projections() -> None:
    assert count(Attention(), (3, 4, 4)).macs == 16 * 3 * 8 + 4 * 16 * 8 * 8


def test_a_layers_weight_counts_however_it_is_used() -> None:
    assert count(Functional(), (3, 4, 4)).macs == 16 * 3 * 7


def test_counts_agree_with_torch_pruning_on_a_resnet() -> None:
    model = build("torchvision:resnet18", num_classes=10)
    _, params, macs, _ = torch_pruning.utils.count_ops_and_params(model, torch.zeros(1, 3, 64, 64), layer_wise=True)
    convolutions = sum(macs[module] for module in model.modules() if isinstance(module, nn.Conv2d))
    counts = count(model, (3, 64, 64))
    assert counts.macs == convolutions + 512 * 10  # theirs counts a linear layer's bias, too
    assert counts.params == params


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "efficientnet_b0"])
def test_counts_are_those_torchvision_publishes(name: str) -> None:
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    counts = count(build(f"torchvision:{name}", num_classes=1000), (3, 224, 224))
    assert counts.macs / 1e9 == pytest.approx(published["_ops"], rel=0.01)
    assert counts.params == published["num_params"]


def test_counting_leaves_the_network_as_it_was() -> None:
    model = build("torchvision:resnet18", num_classes=10).train()
    model.get_submodule("bn1").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count(model, (3, 32, 32))
    classifier(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not model.get_submodule("bn1").training
    assert not any(module._forward_hooks for module in model.modules())


# The classifier


@pytest.mark.parametrize(
    ("arch", "path"),
    [
        ("torchvision:resnet18", "fc"),
        ("torchvision:mobilenet_v3_small", "classifier.3"),
        ("torchvision:efficientnet_b0", "classifier.1"),
        ("torchvision:squeezenet1_1", "classifier.1"),
        ("torchvision:densenet121", "classifier"),
        ("timm:vit_tiny_patch16_224", "head"),
    ],
)
def test_the_classifier_is_found(arch: str, path: str) -> None:
    assert classifier(build(arch, num_classes=7)) == path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "path"), [("torchvision:vgg11", "classifier.6"), ("torchvision:vit_b_16", "heads.head")]
)
def test_the_classifier_of_a_large_network_is_found(arch: str, path: str) -> None:
    assert classifier(build(arch, num_classes=7)) == path


def test_the_classifier_is_the_layer_that_runs_last_not_the_one_written_last() -> None:
    assert classifier(HeadFirst()) == "head"


class Blocks(nn.Module):
    """Reads blocks of 4 x 4 pixels as channels, and has a position for each of 32 / 4 rows."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(48, 8, 1), nn.Linear(8, 5)
        self.register_buffer("positions", torch.zeros(8))

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(F.pixel_unshuffle(images, 4))
        rows = self.positions[torch.arange(features.shape[2])]
        logits: Tensor = self.head((features + rows[:, None]).mean((2, 3)))
        return logits


def test_the_classifier_is_found_where_no_convolution_reads_the_image_and_other_sizes_raise_index_errors() -> None:
    assert classifier(Blocks()) == "head"


def test_a_network_without_a_classifier_is_refused() -> None:
    with pytest.raises(ModelError, match="no convolution or linear layer runs"):
        classifier(nn.Sequential(nn.Flatten(), nn.Identity()))


def test_an_image_size_that_the_network_does_not_take_is_refused() -> None:
    with pytest.raises(ModelError, match="HeadFirst: does not take images of 16 x 16: mat1 and mat2 shapes"):
        count(HeadFirst(), (3, 16, 16))


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ModelError, match=r"must return logits of shape \(n, 7\), returned shape \(1, 5\)"):
        check_output(HeadFirst(), (3, 32, 32), output=(7,))


@pytest.mark.parametrize(
    ("last", "refused"),
    [
        (nn.Softmax(1), "softmax"),
        (nn.Sequential(nn.Sigmoid(), nn.Unflatten(1, (5, 1)), nn.Flatten()), "sigmoid"),
        (nn.LogSoftmax(1), None),
        (nn.Sequential(nn.Sigmoid(), nn.Linear(5, 5)), None),
        (nn.ReLU(), None),
        (nn.Identity(), None),
    ],
)
def test_a_network_that_answers_with_probabilities_is_refused(last: nn.Module, refused: str | None) -> None:
    model = nn.Sequential(HeadFirst(), last).train()
    images = torch.randn(4, 3, 32, 32)
    if refused is None:
        check_logits(model, images)
        return
    with pytest.raises(ModelError, match=f"returns probabilities, as after a {refused} .* leave the {refused} out"):
        check_logits(model, images)
    assert model.training


# Digest


def test_the_digest_follows_the_content_of_the_weights_not_their_place(tmp_path: Path) -> None:
    first, second, other = (tmp_path / f"{name}.pth" for name in ("first", "second", "other"))
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    other.write_bytes(b"changed")
    digests = [source_digest("torchvision:resnet18", str(file)) for file in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_follows_the_content_of_a_persons_own_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    digests = []
    for code in (FACTORY, FACTORY.replace("8", "16")):
        file.write_text(code)
        digests.append(source_digest(f"{file}:network", None))
    assert digests[0] != digests[1]


def test_the_digest_follows_every_module_that_a_persons_own_file_imports_and_no_other(tmp_path: Path) -> None:
    files = {
        "mine.py": "import torch\nfrom blocks import cell\ndef network(n):\n    import late\n",
        "blocks/cell.py": "from inner.deep import thing\n",  # in a folder without __init__.py
        "inner/__init__.py": "",
        "inner/deep.py": "from . import near\nfrom .nearer import one\n",
        "inner/near.py": "",
        "inner/nearer.py": "",
        "late.py": "",
        "inner/unused.py": "",
        "unrelated.py": "",
    }

    def digest(changed: str, folder: str) -> str:
        for name, code in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{code}# changed\n" if name == changed else code)
        return source_digest(f"{tmp_path / folder / 'mine.py'}:network", None)

    before = digest("", "a")
    assert digest("", "b") == before
    unchanged = {name for name in files if digest(name, "a") == before}
    assert unchanged == {"inner/unused.py", "unrelated.py"}


def test_a_neighbour_that_is_no_python_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def :\n")
    (tmp_path / "mine.py").write_text("import broken\n")
    with pytest.raises(ModelError, match=r"broken\.py: cannot be imported: invalid syntax"):
        source_digest(f"{tmp_path}/mine.py:network", None)


def test_the_digest_tells_architectures_and_named_weights_apart() -> None:
    sources = [
        ("torchvision:resnet50", None),
        ("timm:resnet50", None),
        ("torchvision:resnet50", "torchvision:IMAGENET1K_V1"),
        ("torchvision:resnet50", "torchvision:IMAGENET1K_V2"),
    ]
    assert len({source_digest(*source) for source in sources}) == 4


def test_the_digest_of_missing_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the weights file does not exist"):
        source_digest("torchvision:resnet18", str(tmp_path / "absent.pth"))


def test_the_digest_needs_no_torch() -> None:
    code = "import sys, compress.models.digest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_network_whose_state_has_a_version_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("torchvision:mnasnet0_5", num_classes=3)
    save_network(model, Architecture("torchvision:mnasnet0_5", 3, (3, 32, 32)), tmp_path)
    state = load_float(tmp_path, trust_code=False).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    load_weights_(model, "torchvision:mnasnet0_5", str(tmp_path / "weights.safetensors"), reset_head=False)
