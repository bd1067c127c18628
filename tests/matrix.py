"""Take an architecture through the whole chain, small and on one core, and say what came out.

Prune to 60 % of the multiply-accumulates, fake-quantize, calibrate, one training step, deploy, export, compare ONNX Runtime with the
fake-quantized network, audit the optimized graph. `python tests/matrix.py` does it for every architecture and rewrites the table in
docs/models.md; with `--latency` it also times INT8 against FP32 at 224 pixels.
"""

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from networks import lively
from sklearn.datasets import load_sample_images
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.models.architectures import build
from compress.models.structure import classifier, count
from compress.pruning.costs import measure_layers
from compress.pruning.plan import choose, cut_, find_groups, smallest_widths
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, float_on_purpose, freeze_batchnorm_, prepare
from compress.quant.reference import reference_of
from export.audit import audit
from export.onnx_file.graph import weight_levels
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.runtime.latency import Speedup, speedup, time_sessions
from export.runtime.session import bind, open_session
from export.tasks.classification import CLASSIFICATION
from export.verify import verify

# The smallest images that an architecture takes with something left to convolve: ViT has one size; of Swin's multiply-accumulates at 64
# pixels most would lie in padded windows.
IMAGE_SIZES = {
    "torchvision:resnet18": 64,
    "torchvision:resnet34": 32,
    "torchvision:resnet50": 32,
    "torchvision:wide_resnet50_2": 32,
    "torchvision:resnext50_32x4d": 32,
    "torchvision:vgg16_bn": 32,
    "torchvision:densenet121": 32,
    "torchvision:googlenet": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:mobilenet_v3_large": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:regnet_y_400mf": 64,
    "torchvision:shufflenet_v2_x1_0": 64,
    "torchvision:convnext_tiny": 32,
    "torchvision:swin_t": 112,
    "timm:efficientnet_lite0": 64,
    "timm:vit_tiny_patch16_224": 224,
    "timm:repvgg_a0": 64,
    "cifar:resnet20": 32,
    "cifar:resnet8x4": 32,
    "cifar:wrn_16_2": 32,
}
TARGET = TARGETS["cpu_avx2"]  # 7-bit weights: exact on every x86, so that parity does not depend on the machine
CLASSES = 10  # five regions of each of two photographs
IMAGES = 40
KEEP_MACS = 0.6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BEGIN, END = "<!-- table: make matrix -->", "<!-- end of table -->"
DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"


@dataclass(frozen=True)
class Row:
    """What the chain made of one architecture."""

    arch: str
    image_size: int
    kept_macs: float
    integer_layers: int
    float_layers: tuple[str, ...]
    float_reasons: dict[str, str]  # why an operation or a layer runs in float
    on_grid: bool  # every int8 weight in the file lies on the target's grid
    first_divergence: (
        str | None
    )  # the first tensor whose own layer ONNX Runtime computes otherwise than torch, beyond ties
    agreement: float  # of ONNX Runtime with torch, by arg-max
    snr_db: float  # of ONNX Runtime's logits against torch's, about their mean over images
    rounding_snr_db: float  # of the fake-quantized logits against the float ones, for comparison
    int8_speedup: Speedup | None = None


def examine(arch: str, image_size: int) -> Row:
    """Take `arch` through the chain."""
    torch.manual_seed(0)
    photographs, labels = crops(IMAGES, image_size, seed=0)
    model = enlivened(build(arch, num_classes=CLASSES), photographs)
    full = count(model, image_size).macs
    prune_(model, image_size)
    kept = count(model, image_size).macs / full
    fit_classifier_(model, photographs, labels)
    prepared = prepare(model, TARGET, photographs)
    calibrate_(prepared, photographs.split(20), "minmax")
    train_one_step_(prepared, photographs[:8], labels[:8])
    unseen, _ = crops(IMAGES, image_size, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "int8.onnx")
        to_onnx(deploy(prepared), file, image_size=image_size, metadata={})
        found = audit(file)
        (deployed,) = open_session(file, threads=1).run(None, {"input": unseen.numpy()})
        verified = verify(file, [(unseen[:4].numpy(), None)], reference_of(prepared), task=CLASSIFICATION)
        levels = weight_levels(onnx.load(file)).values()
    with torch.no_grad():
        trained, expected = model(unseen).numpy(), prepared(unseen).numpy()
    return Row(
        arch,
        image_size,
        kept,
        len(found.integer_layers),
        found.float_layers,
        {name: found.reasons[name] for name in found.float_layers} | float_on_purpose(prepared),
        all(level.min() >= TARGET.weight_min and level.max() <= TARGET.weight_max for level in levels),
        verified.first_divergence,
        float(np.mean(expected.argmax(1) == deployed.argmax(1))),
        snr_db(expected, deployed),
        snr_db(trained, expected),
    )


def crops(number: int, size: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return normalized crops of scikit-learn's two photographs (n, 3, size, size), and which of ten regions each shows (n,)."""
    rng = np.random.default_rng(seed)
    photographs = load_sample_images().images  # two of (427, 640, 3)
    labels = np.arange(number) % CLASSES
    pixels = []
    for label in labels:
        left = 80 * (label // 2) + rng.integers(0, 80)  # five regions that overlap by two thirds
        top = rng.integers(0, 427 - 224)
        crop = torch.from_numpy(photographs[label % 2][top : top + 224, left : left + 224].copy())
        pixels.append(crop.permute(2, 0, 1)[None].float() / 255)
    images = F.interpolate(torch.cat(pixels), (size, size), mode="area")
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), torch.from_numpy(labels)


def enlivened(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the network as if trained: scales, shifts and biases that matter, batch-norm statistics of real photographs.

    Shifts are positive on average, so that most units pass: a random deep ReLU network is chaotic, it makes tens of levels of one tie.
    """
    model = lively(model)
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.LayerNorm) and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(("gamma", "layer_scale")):
            nn.init.uniform_(parameter, 0.2, 0.6)  # at its start of 1e-6 a block would say nothing
        elif isinstance(owner, nn.BatchNorm2d) and name.endswith("bias"):
            parameter.data += 1.0
        elif parameter.dim() == 2:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")  # transformers start at a third of that or less
        elif parameter.dim() == 1 and not isinstance(owner, nn.BatchNorm2d):
            nn.init.normal_(parameter, std=0.1)
    return measure_batchnorm_(model, images)


@torch.no_grad()
def measure_batchnorm_(model: nn.Module, images: Tensor) -> nn.Module:
    """Set batch-norms' statistics to those of `images`; return the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(images[:32])
    return model.eval()


def prune_(model: nn.Module, image_size: int) -> None:
    """Cut the network to its budget, as the prune stage does."""
    example = torch.zeros(1, 3, image_size, image_size)
    layers, macs = measure_layers(model, example), count(model, image_size).macs
    groups = find_groups(model, example, "l2", exclude=(classifier(model),))
    cuts = choose(
        groups,
        layers,
        goal="macs",
        budget=KEEP_MACS * macs,
        fixed=macs - sum(layer.macs for layer in layers),
        scope="local",
        round_to=8,
        min_channels=smallest_widths(groups, 0.1),
    )
    cut_(model, example, cuts)


@torch.no_grad()
def fit_classifier_(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Fit the last layer to the labels by ridge regression, so that logits tell images apart; batch-norms are measured again first."""
    measure_batchnorm_(model, images)
    head = model.get_submodule(classifier(model))
    assert isinstance(head, nn.Linear)
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    features = seen[0].double()  # (n, features)
    targets = F.one_hot(labels, CLASSES).double() - 1 / CLASSES
    centred = features - features.mean(0)
    gram = centred @ centred.T
    gram += 1.0 * gram.diagonal().mean() * torch.eye(len(gram))
    weight = 10 * (centred.T @ torch.linalg.solve(gram, targets)).T  # (classes, features)
    head.weight.copy_(weight)
    head.bias.copy_(-weight @ features.mean(0))


def train_one_step_(prepared: fx.GraphModule, images: Tensor, labels: Tensor) -> None:
    """Move every weight by one step of quantization-aware training; leave eval mode."""
    prepared.train()
    freeze_batchnorm_(prepared)
    F.cross_entropy(prepared(images), labels).backward()
    missing = [name for name, parameter in prepared.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    nn.utils.clip_grad_norm_(prepared.parameters(), 1.0)
    torch.optim.SGD(prepared.parameters(), lr=1e-3).step()
    prepared.eval()


def snr_db(expected: np.ndarray, got: np.ndarray) -> float:
    """Return 10 log10 of the logits' energy about their mean over images, over the error's."""
    error = np.square(got - expected, dtype=np.float64).sum()
    signal = np.square(expected - expected.mean(0), dtype=np.float64).sum()
    return float(10 * np.log10(signal / max(error, 1e-30)))


def time_int8(arch: str) -> Speedup:
    """Return how many times faster the pruned network's INT8 file is than its FP32 file at 224 pixels, batch 1, one thread."""
    torch.manual_seed(0)
    photographs, _ = crops(4, 224, seed=0)
    model = enlivened(build(arch, num_classes=CLASSES), photographs)
    prune_(model, 224)
    prepared = prepare(model, TARGET, photographs)
    calibrate_(prepared, [photographs], "minmax")
    with tempfile.TemporaryDirectory() as folder:
        files = {"fp32": Path(folder, "fp32.onnx"), "int8": Path(folder, "int8.onnx")}
        to_onnx(model, files["fp32"], image_size=224, metadata={})
        to_onnx(deploy(prepared), files["int8"], image_size=224, metadata={})
        runs = {name: bind(open_session(file, threads=1), photographs[:1].numpy()) for name, file in files.items()}
        timings = time_sessions(runs, seconds=4, blocks=20)
    return speedup(timings["fp32"], timings["int8"])


def as_markdown(rows: list[Row]) -> str:
    """Return the table of docs/models.md."""
    titles = ("model", "pixels", "MACs kept", "layers in integers, float", "what else stays float, and why",
              "agreement, SNR (rounding)", "INT8 speed-up at 224")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        reasons = Counter(
            reason.removeprefix("ONNX Runtime has ") for reason in row.float_reasons.values()
        ).most_common()
        faster = row.int8_speedup
        cells = (
            f"`{row.arch}`",
            str(row.image_size),
            f"{row.kept_macs:.3f}",
            f"{row.integer_layers}, {len(row.float_layers)}",
            ", ".join(f"{times} × {reason}" for reason, times in reasons) or "nothing",
            f"{row.agreement:.0%}, {'same bits' if row.snr_db > 200 else f'{row.snr_db:.1f}'} ({row.rounding_snr_db:.1f}) dB",
            "–" if faster is None else f"{faster.ratio:.2f} ({faster.low:.2f}–{faster.high:.2f})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Examine every architecture and put the table into docs/models.md."""
    parser = argparse.ArgumentParser(prog="python tests/matrix.py", description=main.__doc__)
    parser.add_argument("--latency", action="store_true", help="also time INT8 against FP32 at 224 pixels")
    parser.add_argument("--only", metavar="NAME", help="this architecture alone, printed and not written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for arch, image_size in IMAGE_SIZES.items():
        if arguments.only in (None, arch):
            row = examine(arch, image_size)
            timed = arguments.latency and not arch.startswith("cifar:")  # which nobody runs at 224 pixels
            rows.append(replace(row, int8_speedup=time_int8(arch)) if timed else row)
            sys.stdout.write(as_markdown(rows[-1:]).splitlines()[-1] + "\n")
            sys.stdout.flush()
    if arguments.only is None:
        head, _, rest = DOCUMENT.read_text().partition(BEGIN)
        _, _, tail = rest.partition(END)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{as_markdown(rows)}\n{END}{tail}")


if __name__ == "__main__":
    main()
