"""Find the network of a checkpoint: by its tensors, by the name that is given, or from a file that brings the network."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.data.teachers import foreign
from compress.errors import CompressError, ModelError
from compress.models.architectures import build, takes_classes
from compress.models.outputs import LOGITS, TRAINING, tensors_of
from compress.models.published import published
from compress.models.recognize import Match, channels_of, encoder, matched, recognize, task_of
from compress.models.structure import PROBES, ends_in_classifier, output_of
from compress.models.weights import load_weights_
from export.runtime.native import first_line

# Outputs of transformers' networks that are steps on the way, left out where there are others.
WITHIN = re.compile(r"hidden_state|attentions|^(enc|encoder|init|intermediate|aux|auxiliary)_|^(aux|loss)$|_loss$")
KINDS = {2: "classification", 3: "detection", 4: "segmentation"}  # by the dimensions of the outputs


def brought_by(weights: str) -> str | None:
    """Return the architecture of a file or folder that contains a whole network; None for a checkpoint."""
    kind = "hf" if Path(weights).is_dir() else {".onnx": "onnx", ".pt2": "exported"}.get(Path(weights).suffix)
    return f"{kind}:{weights}" if kind else None


def matches(weights: str, state: dict[str, Tensor], arch: str | None, *, trust_code: bool) -> Iterator[Match]:
    """Yield the networks that fit, the likeliest first, each found when it is asked for; CompressError where there is none."""
    if whole := brought_by(weights):
        yield whole_match(whole)
        return
    if arch is not None:
        yield given(arch, state, trust_code=trust_code)
        return
    none = True
    for match in recognize(state):
        none = False
        yield match
    if none:
        raise CompressError(
            f"{weights}: none of the networks of torchvision, timm or the CIFAR papers, nor a segmenter or detector of this package, has its "
            f"{len(state):,} tensors ({', '.join(list(state)[:3])}, …): name yours with --arch my_file.py:factory --trust-code"
        )


def whole_match(arch: str) -> Match:
    """Return a whole network with its number of classes, or the outputs to serve, and channels; CompressError if it takes no such images."""
    known, network = published(arch), build(arch, num_classes=0, outputs=())
    channels = channels_of(network, network.state_dict())
    height, width = known.image_size if known else (224, 224)
    noise = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(0))
    try:
        found = dict(tensors_of(network.forward(noise.requires_grad_())))  # without the hook that packs them
    except RuntimeError as error:
        raise CompressError(
            f"{arch}: does not take images of {height} x {width} ({first_line(error)}); name it as model.arch in a recipe, with its data.image_size"
        ) from error
    if not found:
        raise CompressError(
            f"{arch}: gives no float tensor for an image, as after an argmax: give the network without that step"
        )
    varied = [name for name, one in found.items() if len(one) == len(noise) and bool((one != one[:1]).any())] or [
        *found
    ]
    folder = arch.startswith("hf:")  # a file's outputs were chosen by a person
    within = {name for name in varied if (WITHIN.search(name) if folder else name in TRAINING)}
    served = tuple(name for name in varied if name not in within) or tuple(varied)
    output = found[served[0]]
    if len(served) > 1 or (served[0] not in ("output", *LOGITS) and (folder or len(found) > 1)):
        return Match(arch, 0, channels, served, tuple(name for name in found if name not in served))
    return Match(arch, output.shape[1], channels, None if output.ndim > 2 or ends_in_classifier(output) else ())


def given(arch: str, state: dict[str, Tensor], *, trust_code: bool) -> Match:
    """Return a named network with the checkpoint's number of classes, from its last layer, and channels, from its first."""
    if task_of(arch) in ("segmentation", "detection") and (match := matched(arch, state, trust_code=trust_code)):
        return match
    if not takes_classes(arch, trust_code=trust_code):
        return Match(arch, 0, channels_of(build(arch, num_classes=0, trust_code=trust_code, outputs=()), state), ())
    if arch.startswith("timm:") and (match := encoder(arch, state)):
        return match
    classes = [
        tensor.shape[0]
        for name, tensor in state.items()
        if tensor.ndim > 1 and f"{name.rpartition('.')[0]}.bias" in state
    ]
    number = classes[-1] if classes else next(reversed(state.values())).shape[0]
    return Match(arch, number, channels_of(build(arch, num_classes=number, trust_code=trust_code), state))


def loaded(match: Match, weights: str, side: int, *, trust_code: bool) -> nn.Module:
    """Return the network with its weights, in eval mode."""
    known = published(match.arch)
    own = known.size if known else side  # transformers are built for one size
    shape = None if match.channels == 3 else (match.channels, own, own)
    model = build(match.arch, num_classes=match.classes, shape=shape, trust_code=trust_code, outputs=match.outputs)
    if foreign(match.arch) is None:
        load_weights_(model, match.arch, weights, reset_head=False)
    return model


def kind_of(match: Match, *, trust_code: bool) -> str:
    """Return what the network is for: classification, segmentation, detection or tensors; for one of a person's own its outputs tell."""
    if match.outputs is not None:
        return "tensors"
    if (task := task_of(match.arch)) is not None:
        return task
    known = published(match.arch)
    sides = dict.fromkeys((*([known.size] if known else []), *PROBES))
    shape = None if match.channels == 3 else (match.channels, *(next(iter(sides)),) * 2)
    model = build(match.arch, num_classes=match.classes, shape=shape, trust_code=trust_code)
    for side in sides:
        with suppress(ModelError):
            outputs = output_of(model, (match.channels, side, side))
            if not isinstance(outputs, Tensor):
                raise CompressError(
                    f"{match.arch}: returns a {type(outputs).__name__}, and one tensor is served: return it alone, or all from a factory "
                    "without an argument (docs/tensors.md)"
                )
            return KINDS.get(outputs.ndim, "classification")
    return "classification"  # it takes another size, perhaps the images' own
