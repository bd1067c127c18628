"""Given teachers: from any kind of file, one or several, each with its own image size, normalization and classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data.teachers import GivenTeacher, foreign
from compress.errors import ModelError
from compress.models.architectures import build
from compress.models.digest import class_names, existing_file
from compress.models.foreign import OnnxFile, rebuilt
from compress.models.outputs import serve_
from compress.models.weights import load_weights_
from export.errors import first
from export.images.preprocess import Preprocess

SMALLEST = 1e-12  # smallest probability before the logarithm, as a softmax in float32 has zeros
NEAREST = 1e-6  # to 0 and 1 before a sigmoid's inverse; float32 has steps of 6e-8 below 1


@dataclass(frozen=True)
class Seen:
    """A network's preprocessing: (height, width) in pixels; mean and deviation of each channel, for pixels in [0, 1]."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def seen(preprocess: Preprocess) -> Seen:
    """Return what a network sees by a bundle's preprocessing."""
    return Seen(preprocess.image_size, preprocess.mean, preprocess.std)


class Member(nn.Module):
    """One teacher: turns the student's images into its own preprocessing, returns logits of the student's classes."""

    def __init__(self, network: nn.Module, own: Seen, student: Seen, order: Sequence[int] | None) -> None:
        """Take a network, its and the student's preprocessing, and the output for each class (None: all, in order)."""
        super().__init__()
        self.network, self.order = network, order
        self.inverse: Callable[[Tensor], Tensor] = lambda outputs: outputs  # from outputs to logits
        self.size = None if own.size == student.size else own.size
        # From (pixels - m) / s, the student's, to (pixels - m') / s' is one product and one sum.
        scale = torch.tensor(student.std) / torch.tensor(own.std)
        shift = (torch.tensor(student.mean) - torch.tensor(own.mean)) / torch.tensor(own.std)
        same = (own.mean, own.std) == (student.mean, student.std)
        self.scale: Tensor | None
        self.shift: Tensor
        self.register_buffer("scale", None if same else scale.view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, classes, …) for normalized images (n, channels, height, width) of the student's size."""
        logits = self.inverse(self.outputs(images))
        return logits if self.order is None else logits[:, self.order]

    def outputs(self, images: Tensor) -> Tensor:
        """Return the network's own outputs for the student's images."""
        if self.scale is not None:
            images = images * self.scale + self.shift
        if self.size is not None:
            larger = self.size[0] >= images.shape[2] and self.size[1] >= images.shape[3]  # then antialias has no effect
            images = F.interpolate(images, self.size, mode="bilinear", antialias=not larger)
        outputs: Tensor = self.network(images)
        return outputs


class Teacher(nn.Module):
    """One teacher or several, whose logits are averaged, a geometric mean of probabilities (Hinton 2015, section 2).

    Unlike a mean of probabilities it is the same ensemble at every temperature, so one cached number serves all losses.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def first(self) -> nn.Module:
        """The first teacher's own network."""
        member = self.members[0]
        assert isinstance(member, Member)
        return member.network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, classes, …)."""
        if len(self.members) == 1:
            alone: Tensor = self.members[0](images)
            return alone
        return torch.stack([member(images) for member in self.members]).mean(dim=0)

    @torch.no_grad()
    def note_probabilities_(self, images: Tensor) -> None:
        """Make members that return probabilities for these images, as after a softmax or sigmoids, return logits."""
        for member in self.members:
            assert isinstance(member, Member)
            outputs = member.outputs(images)
            if bool(((outputs >= 0) & (outputs <= 1)).all()):
                sums = outputs.sum(dim=1)
                is_softmax = torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
                member.inverse = _log if is_softmax else _logit


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(min=SMALLEST).log()


def _logit(probabilities: Tensor) -> Tensor:
    return probabilities.logit(eps=NEAREST)


def teacher_of(
    given: Sequence[GivenTeacher],
    classes: tuple[str, ...] | None,
    student: Seen,
    *,
    trust_code: bool,
    whole: bool = False,
    outputs: Sequence[str] | None = None,
) -> Teacher:
    """Return a student's teachers in eval mode on the CPU, with outputs for `classes` (None: their own, in order), or `outputs` by name.

    `whole` rebuilds ONNX files as torch networks, whose cost can be counted and which can be exported. Raises ModelError
    where a teacher cannot be built, or lacks a class.
    """
    return Teacher(
        [_member(one, classes, student, trust_code=trust_code, whole=whole, outputs=outputs) for one in given]
    ).eval()


def _member(
    given: GivenTeacher,
    classes: tuple[str, ...] | None,
    student: Seen,
    *,
    trust_code: bool,
    whole: bool,
    outputs: Sequence[str] | None,
) -> Member:
    kind, path = foreign(given.network) or ("", "")
    if kind == "onnx":
        network = serve_(rebuilt(path) if whole else OnnxFile(existing_file(path, "the teacher's file")), outputs)
    else:
        channels, names = len(student.mean), own_names(given) or classes or ()
        shape = None if channels == 3 else (channels, *(given.image_size or student.size))
        network = build(given.network, num_classes=len(names), shape=shape, trust_code=trust_code, outputs=outputs)
    if given.weights is not None:
        load_weights_(network, given.network, given.weights, reset_head=False)
    own = Seen(given.image_size or student.size, given.mean or student.mean, given.std or student.std)
    return Member(network, own, student, _order(given, network, classes))


def own_names(given: GivenTeacher) -> tuple[str, ...] | None:
    """Return the names of a teacher's outputs from its `classes` file, None without one."""
    return None if given.classes is None else class_names(given.classes)


def _order(given: GivenTeacher, network: nn.Module, classes: tuple[str, ...] | None) -> list[int] | None:
    """Return the number of the teacher's output for each class, None where outputs are the classes in order."""
    names = own_names(given) or names_within(network)
    if classes is None or names is None or names == classes:
        return None
    lacking = [name for name in classes if name not in names]
    if given.classes is None and lacking:
        return None  # a library's class names may differ from the folders' names
    if lacking:
        raise ModelError(
            f"teacher {given.network}: {given.classes} has {len(names):,} classes and lacks {len(lacking):,} of the data's {len(classes):,}: "
            f"{first(lacking)}; use the data's names"
        )
    return [names.index(name) for name in classes]


def names_within(network: nn.Module) -> tuple[str, ...] | None:
    """Return a transformers network's names of its classes, None for other networks."""
    labels = getattr(getattr(network, "config", None), "id2label", None)
    return tuple(labels[index] for index in range(len(labels))) if labels else None
