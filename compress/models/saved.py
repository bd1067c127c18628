"""A saved network: architecture and cuts as JSON, weights as safetensors. No pickles."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

from compress.models.architectures import build
from compress.models.structure import versioned
from compress.pruning.plan import Cut, cut_
from compress.quant.fake_quant import Ranges
from compress.quant.prepare import prepare
from export.command.files import write_json
from export.images.size import Shape, size_of, written
from export.onnx_file.targets import TARGETS

ARCHITECTURE, WEIGHTS = "architecture.json", "weights.safetensors"


@dataclass(frozen=True)
class Architecture:
    """All that is needed to rebuild a network, apart from its weights."""

    arch: str
    num_classes: int
    shape: Shape  # of one image
    cuts: tuple[tuple[Cut, ...], ...] = ()  # one entry for each pruning step, in order
    target: str | None = None  # of a fake-quantized network, as are the other arguments of `prepare`
    ranges: Ranges = "moving_average"
    keep_float: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = None  # the served ones by name, where a network has several

    def pruned(self, *steps: tuple[Cut, ...]) -> "Architecture":
        """Return the architecture after further cuts."""
        return replace(self, cuts=self.cuts + steps)


def example_images(shape: Shape, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return one input (1, channels, height, width) for tracing."""
    return torch.zeros(1, *shape, device=device)


def save_network(model: nn.Module, architecture: Architecture, directory: Path) -> None:
    """Write architecture and weights."""
    channels, height, width = architecture.shape
    said = {"image_size": written((height, width)), **({} if channels == 3 else {"channels": channels})}
    facts = dict[str, object]()
    for name, value in asdict(architecture).items():
        facts |= said if name == "shape" else {} if (name, value) == ("outputs", None) else {name: value}
    write_json(directory / ARCHITECTURE, facts)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / WEIGHTS)


def read_architecture(directory: Path) -> Architecture:
    """Read the architecture that `save_network` wrote."""
    value = json.loads((directory / ARCHITECTURE).read_text())
    cuts = tuple(tuple(Cut(cut["root"], tuple(cut["remove"])) for cut in step) for step in value.pop("cuts"))
    keep_float = tuple(value.pop("keep_float", ()))  # missing in float networks of version 0.1.0
    shape = (value.pop("channels", 3), *size_of(value.pop("image_size")))
    outputs = tuple(value.pop("outputs")) if "outputs" in value else None
    return Architecture(**value, shape=shape, cuts=cuts, keep_float=keep_float, outputs=outputs)


def rebuild(architecture: Architecture, *, trust_code: bool) -> nn.Module:
    """Return the pruned float network with random weights, in eval mode on the CPU."""
    shape, classes, outputs = architecture.shape, architecture.num_classes, architecture.outputs
    model = build(architecture.arch, num_classes=classes, shape=shape, trust_code=trust_code, outputs=outputs)
    for step in architecture.cuts:
        cut_(model, example_images(shape), step)
    return model


def load_float(directory: Path, *, trust_code: bool) -> nn.Module:
    """Return the float network of an artifact, in eval mode on the CPU."""
    model = rebuild(read_architecture(directory), trust_code=trust_code)
    model.load_state_dict(versioned(model, load_file(directory / WEIGHTS)))
    return model.eval()


def prepare_as(architecture: Architecture, model: nn.Module) -> fx.GraphModule:
    """Return the float network fake-quantized with the architecture's settings, without ranges."""
    assert architecture.target is not None
    target = TARGETS[architecture.target]
    images = example_images(architecture.shape)
    return prepare(model, target, images, ranges=architecture.ranges, keep_float=architecture.keep_float)


def load_prepared(directory: Path, *, trust_code: bool) -> fx.GraphModule:
    """Return a saved fake-quantized network, with its ranges, in eval mode on the CPU."""
    architecture = read_architecture(directory)
    model = prepare_as(architecture, rebuild(architecture, trust_code=trust_code))
    model.load_state_dict(versioned(model, load_file(directory / WEIGHTS)))
    return model.eval()
