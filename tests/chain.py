"""Take an architecture through the whole chain, small and on one core, and say what came out.

Prune to 60 % of the multiply-accumulates, fake-quantize, calibrate, one training step, deploy, export, compare ONNX Runtime with the
fake-quantized network, audit the optimized graph.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from networks import lively
from planning import cuts_to
from sklearn.datasets import load_sample_images
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.errors import CompressError
from compress.models.architectures import build
from compress.models.detectors import Detector
from compress.models.structure import check_output, classifier, count
from compress.pruning.plan import cut_
from compress.pruning.surgeon import input_covariances
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, float_on_purpose, freeze_batchnorm_, prepare
from compress.quant.reference import reference_of
from export.onnx_file.graph import weight_levels
from export.onnx_file.names import module_of
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.onnx_file.wiring import weights, wire
from export.proof.audit import audit
from export.proof.verify import verify
from export.runtime.session import open_session
from export.tasks.boxes import CENTRED
from export.tasks.classification import CLASSIFICATION
from export.tasks.task import OutputTask

TARGET = TARGETS["cpu_avx2"]  # 7-bit weights: exact on every x86, so that parity does not depend on the machine
CLASSES = 10  # five regions of each of two photographs
KEEP_MACS = 0.6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Row:
    """What the chain made of one architecture."""

    arch: str
    image_size: int
    kept_macs: float  # 1 where pruning was refused
    not_pruned: str | None  # why
    layers: int  # convolutions and linear layers
    float_layers: tuple[str, ...]  # those of them that ONNX Runtime runs in float
    float_products: int  # of two activations, as in attention
    float_reasons: dict[str, str]  # why an operation or a layer runs in float
    on_grid: bool  # every int8 weight in the file lies on the target's grid
    first_divergence: str | None  # the first tensor whose own layer ONNX Runtime computes otherwise than torch
    agreement: float  # of ONNX Runtime with torch: classes, pixels or detections
    snr_db: float  # of ONNX Runtime's logits against torch's, about their mean over images
    rounding_snr_db: float  # of the fake-quantized logits against the float ones, for comparison


def examine(arch: str, image_size: int, task: OutputTask = CLASSIFICATION) -> Row:
    """Take `arch` through the chain; what cannot be pruned goes through whole."""
    torch.manual_seed(0)
    images = 12 if task is not CLASSIFICATION else 40 if image_size <= 128 else 20
    photographs, labels = crops(images, image_size, seed=0)
    shape = (3, image_size, image_size)
    model = enlivened(build(arch, num_classes=CLASSES, shape=shape, trust_code=True), photographs)
    if task is CLASSIFICATION:
        check_output(model, shape, output=(CLASSES,))
    full, not_pruned = count(model, shape).macs, None
    try:
        prune_(model, photographs)
    except CompressError as error:
        not_pruned = str(error)
    kept = count(model, shape).macs / full
    fit_classifier_(model, photographs, labels)
    if task is not CLASSIFICATION:
        spread_(model, photographs[:4])
    prepared = prepare(model, TARGET, photographs)
    calibrate_(prepared, photographs.split(20), "minmax")
    train_one_step_(prepared, photographs[:8], labels[:8] if task is CLASSIFICATION else None)
    unseen, _ = crops(images, image_size, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        to_onnx(deploy(prepared), path, shape=shape, metadata={})
        found, file = audit(path), onnx.load(path)
        (deployed,) = open_session(path, threads=1).run(None, {"input": unseen.numpy()})
        verified = verify(path, [(unseen[:4].numpy(), None)], reference_of(prepared), task=task)
    weighted = [module_of(str(node.name)) for node in wire(file).layers() if weights(node) is not None]
    levels = weight_levels(file).values()
    with torch.no_grad():
        trained, expected = model(unseen).numpy(), prepared(unseen).numpy()
    return Row(
        arch,
        image_size,
        kept,
        not_pruned,
        len(weighted),
        tuple(name for name in found["float_layers"] if name in weighted),
        sum(name not in weighted for name in found["float_layers"]),
        {name: found["reasons"][name] for name in found["float_layers"]} | float_on_purpose(prepared),
        all(level.min() >= TARGET.weight_min and level.max() <= TARGET.weight_max for level in levels),
        verified["first_divergence"],
        float(task.agreement(task.decode(expected), task.decode(deployed)).mean()),
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
        first = float(parameter.detach().flatten()[0])
        if isinstance(owner, nn.BatchNorm2d):
            parameter.data += 1.0 if name.endswith("bias") else 0.0
        elif first and bool((parameter == first).all()):
            # Norms and gains start at 1; layer scales at 1e-6, where a block would say nothing.
            nn.init.uniform_(parameter, *((0.5 * first, 1.5 * first) if first > 0.1 else (0.2, 0.6)))
        elif parameter.dim() == 2 and isinstance(owner, nn.Linear):
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")  # transformers start at a third of that or less
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)
    return measure_batchnorm_(model, images)


@torch.no_grad()
def measure_batchnorm_(model: nn.Module, images: Tensor) -> nn.Module:
    """Set batch-norms' statistics to those of `images`; return the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()  # it alone: in a training mode of its own a detector wants boxes
    model(images[:32])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.clamp_(min=1e-2)  # a channel that is silent on these images would be loud on the next
    return model.eval()


def prune_(model: nn.Module, images: Tensor) -> None:
    """Cut the network to its budget, as the prune stage does, but the same part everywhere."""
    seen, head = input_covariances(model, images.split(20)), classifier(model)
    cuts = cuts_to(model, KEEP_MACS, images.shape[-1], exclude=(head,), scope="local", covariances=seen)
    cut_(model, images[:1], cuts)


@torch.no_grad()
def fit_classifier_(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Fit a last layer that is linear to the labels by ridge regression, so that logits tell images apart.

    Batch-norms are measured again first.
    """
    measure_batchnorm_(model, images)
    head = model.get_submodule(classifier(model))
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    if not isinstance(head, nn.Linear) or seen[0].dim() != 2:
        return
    features = seen[0].double()  # (n, features)
    targets = F.one_hot(labels, CLASSES).double() - 1 / CLASSES
    centred = features - features.mean(0)
    gram = centred @ centred.T
    gram += 1.0 * gram.diagonal().mean() * torch.eye(len(gram))
    weight = 10 * (centred.T @ torch.linalg.solve(gram, targets)).T  # (classes, features)
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.copy_(-weight @ features.mean(0))


@torch.no_grad()
def spread_(model: nn.Module, images: Tensor) -> None:
    """Let logits differ by about 2, so that predictions do, and FCOS's boxes be large enough to overlap."""
    detects = isinstance(model, Detector)
    heads, outputs = "classification_head" if detects else classifier(model), model(images)
    deviation = (outputs[..., 1:CLASSES] if detects else outputs).std()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and heads in name and layer.out_channels % (CLASSES + detects) == 0:
            layer.weight.mul_(2 / deviation)
        if isinstance(layer, nn.Conv2d) and "bbox_reg" in name and detects and model.kind == CENTRED:
            assert layer.bias is not None
            layer.bias.add_(1.0)  # in strides


def train_one_step_(prepared: fx.GraphModule, images: Tensor, labels: Tensor | None) -> None:
    """Move every weight by one step of quantization-aware training, under cross-entropy or towards 0; leave eval mode."""
    prepared.train()
    freeze_batchnorm_(prepared)
    outputs = prepared(images)
    (outputs.square().mean() if labels is None else F.cross_entropy(outputs, labels)).backward()
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
