"""The distillation step: a weighted sum of losses, some against the labels, some against the teacher.

`distillation` returns the network that `training.loop.fit` trains (the student with its adapters) and its step. A teacher
is a function from a batch to logits and features: the network itself (`online_teacher`) or a cache of its logits
(`compress.distillation.teacher`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data.batches import Batch
from compress.distillation import features, logits
from compress.distillation.adapters import Auxiliary, Review, Widened
from compress.distillation.taps import Tapped, tap
from compress.errors import CompressError
from compress.pruning.graph import Attached
from compress.recipe.losses import (
    LABELLED,
    BoxesTerm,
    CrossEntropyTerm,
    DiceTerm,
    FeatureTerm,
    LogitTerm,
    LossTerm,
    MSETerm,
)
from compress.tasks import Task
from compress.training.loop import Step

# The factor of a loss's weight after a fraction `done` of the training, in [0, 1).
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear_up": lambda done: done,
    "linear_down": lambda done: 1.0 - done,
    "cosine_down": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


class TeacherOutput(NamedTuple):
    """The teacher's logits (batch, classes) for a batch, and its features by module path."""

    logits: Tensor
    features: Mapping[str, Tensor]


class StudentOutput(NamedTuple):
    """The student's logits (batch, classes) for a batch, and for each feature loss the adapted features of its layers."""

    logits: Tensor
    features: Sequence[Sequence[Tensor]]


class Loss(NamedTuple):
    """A recipe's loss: a function of student's and teacher's logits, or of one layer's features."""

    function: Callable[..., Tensor]  # (student's, teacher's; of LABELLED also the targets) -> ()
    fields: tuple[str, ...] = ()  # of the recipe's section, passed to the function by name
    adapter: Callable[[Sequence[torch.Size], Sequence[torch.Size]], nn.Module] | None = None  # takes maps only


LOSSES: Mapping[str, Loss] = {
    "kd": Loss(logits.kd_loss, ("temperature",)),
    "mse": Loss(logits.mse_loss),
    "dkd": Loss(logits.dkd_loss, ("alpha", "beta", "temperature")),
    "dist": Loss(logits.dist_loss, ("beta", "gamma", "temperature")),
    "nkd": Loss(logits.nkd_loss, ("gamma", "temperature")),
    "pkt": Loss(features.pkt_loss),
    "cwd": Loss(features.cwd_loss, ("temperature",), adapter=Widened),
    "pkd": Loss(features.pkd_loss, adapter=Widened),
    "review": Loss(features.review_loss, adapter=Review),
}
EXCLUSIVE = ("dice", "dkd", "dist", "nkd")  # need exactly one right class for each row
AUXILIARY = 0.5  # the weight of an auxiliary classifier's loss, as in torchvision's training
Teacher = Callable[[Batch], TeacherOutput]
Count = Callable[[Batch], Tensor | int]


class Learner(nn.Module):
    """A student with its adapters, which are dropped after training.

    In training mode it returns a StudentOutput, in eval mode the student's logits, as networks with auxiliary heads do.
    """

    def __init__(
        self,
        student: nn.Module,
        tapped: Tapped,
        adapters: Sequence[nn.Module],
        layers: Sequence[Sequence[str]],
        *,
        attached: bool = False,
    ) -> None:
        """Take the student, its tap, for each feature loss an adapter (list → list) and the layers that it reads, and whether nothing detaches.

        A DETR's decoder layer gives the next one boxes that are detached, and learns its own from a loss in every layer (Zhu 2021,
        Deformable DETR, section 4.2). From a loss on the last layer alone its boxes learn nothing, and drift while all around them learns.
        """
        super().__init__()
        self.student, self.adapters = student, nn.ModuleList(adapters)
        self._tapped, self._layers, self._attached = tapped, tuple(layers), attached

    def forward(self, images: Tensor) -> StudentOutput | Tensor:
        """Run the student on images (batch, channels, height, width)."""
        if not self.training:
            return self.student(images)  # type: ignore[no-any-return]
        with Attached() if self._attached else nullcontext():
            output, found = self._tapped(images)
        chosen = zip(self.adapters, self._layers, strict=True)
        return StudentOutput(output, [adapter([found[path] for path in paths]) for adapter, paths in chosen])


def supervised_step(task: Task, *, label_smoothing: float) -> Step:
    """Return the step of plain training on the labels."""

    def step(model: nn.Module, batch: Batch, _done: float) -> dict[str, Tensor]:
        outputs = model(batch.images)
        (share,) = _shares(batch, [lambda part: task.loss_count(outputs, part.targets)])
        return {"loss": task.loss(outputs, batch.targets, label_smoothing=label_smoothing) * share}

    return step


def auxiliary_training(
    task: Task, student: nn.Module, *, layer: str, head: nn.Module, label_smoothing: float
) -> tuple[Learner, Step]:
    """Return the learner and the step of plain training with a second classifier `head` on the outputs of `layer`."""
    learner = Learner(student, tap(student, [layer]), [Auxiliary(head)], [[layer]])

    def step(model: nn.Module, batch: Batch, _done: float) -> dict[str, Tensor]:
        outputs, ((second,),) = model(batch.images)
        second = F.interpolate(second, outputs.shape[2:], mode="bilinear")
        (share,) = _shares(batch, [lambda part: task.loss_count(outputs, part.targets)])
        loss, other = (
            task.loss(one, batch.targets, label_smoothing=label_smoothing) * share for one in (outputs, second)
        )
        return {"loss": loss + AUXILIARY * other, "auxiliary": other}

    return learner, step


def online_teacher(network: nn.Module, terms: Sequence[LossTerm]) -> Teacher:
    """Return a teacher that runs on every batch, on the same views as the student, in eval mode, without gradients.

    Raises ModelError where a loss names a layer that the network does not have.
    """
    tapped = tap(network.eval(), [path for term in _of_features(terms) for path in _teacher_layers(term)])

    @torch.no_grad()
    def answer(batch: Batch) -> TeacherOutput:
        with torch.autocast("cpu", enabled=False):  # bf16 on a CPU changes too many predictions (docs/training.md)
            return TeacherOutput(*tapped(batch.images))

    return answer


def no_teacher(_batch: Batch) -> TeacherOutput:
    """Return nothing: the dummy teacher for losses that use only the labels."""
    return TeacherOutput(torch.empty(0), {})


def needs_teacher(terms: Sequence[LossTerm]) -> bool:
    """Tell whether any loss compares with the teacher."""
    return any(not isinstance(term, CrossEntropyTerm | DiceTerm) for term in terms)


def needs_features(terms: Sequence[LossTerm]) -> bool:
    """Tell whether any loss compares with the teacher's features, so that its logits are not enough."""
    return bool(_of_features(terms))


def distillation(
    terms: Sequence[LossTerm], task: Task, *, student: nn.Module, teacher: Teacher, images: Tensor, seed: int
) -> tuple[Learner, Step]:
    """Return the learner to train and its step, which measures the weighted sum as "loss" and each loss's unweighted value.

    `images` (1, c, h, w), on the student's device, are run once to find the features' shapes; `seed` initializes the
    adapters. Raises ModelError for a layer that the student does not have, and CompressError where a loss cannot use a
    layer's output.
    """
    learner = _learner(_of_features(terms), student, teacher, images, seed, attached=task.aligned is not None)
    ask = teacher if needs_teacher(terms) else no_teacher
    names = [term.name for term in terms]
    labels = [f"{name}_{n}" if (n := names[: index + 1].count(name)) > 1 else name for index, name in enumerate(names)]

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        taught = ask(batch)
        outputs, adapted = model(batch.images)
        features = iter(adapted)  # of each feature loss in turn
        with torch.autocast(batch.images.device.type, enabled=False):  # products inside losses stay in float32
            means = [mean_loss(term, task, outputs, features, taught, batch.targets) for term in terms]
        counts = [_count(term, task, outputs, lambda part: taught if part is batch else ask(part)) for term in terms]
        values = [mean * share for mean, share in zip(means, _shares(batch, counts), strict=True)]
        weighted = [weight_of(term, done) * value for term, value in zip(terms, values, strict=True)]
        return {"loss": torch.stack(weighted).sum(), **dict(zip(labels, values, strict=True))}

    return learner, step


def _learner(
    terms: Sequence[FeatureTerm], student: nn.Module, teacher: Teacher, images: Tensor, seed: int, *, attached: bool
) -> Learner:
    """Return the student with an adapter for each feature loss, made for the shapes that both networks return."""
    tapped = tap(student, [path for term in terms for path in term.layers])
    adapters: list[nn.Module] = []
    if terms:
        training = student.training
        with torch.no_grad():
            student.eval()
            mine = tapped(images)[1]
        student.train(training)
        its = teacher(Batch(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))).features
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            adapters = [_adapter(term, mine, its) for term in terms]
    return Learner(student, tapped, adapters, [term.layers for term in terms], attached=attached)


def check_layers(terms: Sequence[LossTerm], *, student: nn.Module, teacher: nn.Module) -> None:
    """Raise ModelError where a loss names a layer that student or teacher does not have."""
    for term in _of_features(terms):
        tap(student, term.layers)
        tap(teacher, _teacher_layers(term))


def check_task(terms: Sequence[LossTerm], task: Task) -> None:
    """Raise CompressError for a loss that the task cannot use."""
    for term in terms:
        if isinstance(term, BoxesTerm) and task.places is None:
            raise CompressError(f"loss boxes: {task.output.name} predicts no boxes: leave it out")
        standardized = isinstance(term, LogitTerm) and term.standardize
        if not task.output.has_classes and not isinstance(term, MSETerm | FeatureTerm):
            raise CompressError(f"loss {term.name}: compares classes, and {task.output.name} have none: use mse")
        if not task.output.exclusive and (term.name in EXCLUSIVE or standardized):
            loss = f"{term.name} with standardize" if standardized else term.name
            raise CompressError(
                f"loss {loss}: compares an image's classes, and in {task.output.name} they are independent: use kd or mse"
            )
        if isinstance(term, CrossEntropyTerm):
            check_smoothing(term.label_smoothing, task)


def check_smoothing(label_smoothing: float, task: Task) -> None:
    """Raise CompressError where label smoothing is set and the task's loss allows none."""
    if label_smoothing and not task.smooths:
        raise CompressError(
            f"label_smoothing: the loss of {task.output.name} allows none, got {label_smoothing:g}: leave it out"
        )


def weight_of(term: LossTerm, done: float) -> float:
    """Return a term's weight after a fraction `done` of the training, in [0, 1)."""
    warmed_up = min(done / term.warmup, 1.0) if term.warmup else 1.0
    return term.weight * warmed_up * SCHEDULES[term.schedule](done)


def mean_loss(
    term: LossTerm,
    task: Task,
    outputs: Tensor,
    features: Iterator[Sequence[Tensor]],
    taught: TeacherOutput,
    truths: Tensor,
) -> Tensor:
    """Return one loss's value, a mean; `features` yields the student's adapted ones for each feature loss in turn."""
    if isinstance(term, CrossEntropyTerm):
        return task.loss(outputs, truths, label_smoothing=term.label_smoothing)
    if isinstance(term, DiceTerm):
        return logits.dice_loss(task.rows(outputs, truths), task.truth_rows(outputs, truths))
    if task.aligned is not None and not isinstance(term, FeatureTerm):
        taught = taught._replace(logits=task.aligned(outputs, taught.logits))
    if isinstance(term, BoxesTerm):
        assert task.places is not None
        return task.places(outputs, taught.logits)
    if isinstance(term, MSETerm) and task.distance is not None:
        return task.distance(outputs, taught.logits)
    loss = LOSSES[term.name]
    settings = {field: getattr(term, field) for field in loss.fields}
    if isinstance(term, FeatureTerm):
        pairs = zip(next(features), _teacher_layers(term), strict=True)
        return torch.stack([loss.function(mine, taught.features[path], **settings) for mine, path in pairs]).sum()
    pair = (outputs, taught.logits)
    both = list(task.pairs(*pair)) if task.pairs else [task.rows(one, truths) for one in pair]
    if not len(both[0]):  # no pixel of the batch counts, and a mean over none is not a number
        return 0 * outputs.sum()
    if term.standardize:
        both = [logits.standardized(rows) for rows in both]
    return loss.function(*both, *([task.truth_rows(outputs, truths)] if term.name in LABELLED else []), **settings)


def _count(term: LossTerm, task: Task, outputs: Tensor, ask: Teacher) -> Count:
    """Return the function that counts in a part of the batch what the term's loss is a mean over.

    Losses that compare a batch's images see one part's only; a mean over images is the nearest to the whole batch's.
    """
    if isinstance(term, CrossEntropyTerm):
        return lambda part: task.loss_count(outputs, part.targets)
    if isinstance(term, LogitTerm):
        return lambda part: task.row_count(outputs, part.targets)
    count = task.places_count
    if isinstance(term, BoxesTerm) and count is not None:
        return lambda part: count(ask(part).logits)
    return lambda part: len(part.targets)


def _shares(batch: Batch, counts: Sequence[Count]) -> Sequence[Tensor | float]:
    """Return for each loss what factor makes its mean over this part of a batch add up to its mean over the whole."""
    if batch.share is None:
        return [1.0] * len(counts)
    device = batch.images.device
    found = batch.share(lambda part: torch.stack([torch.as_tensor(count(part), device=device) for count in counts]))
    return found.unbind()


def _adapter(term: FeatureTerm, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> nn.Module:
    """Return the adapter that brings the student's features to the shapes that the term's loss compares."""
    adapter = LOSSES[term.name].adapter
    mine = [_shape(term, "student", path, student) for path in term.layers]
    its = [_shape(term, "teacher", path, teacher) for path in _teacher_layers(term)]
    return nn.Identity() if adapter is None else adapter(mine, its)


def _shape(term: FeatureTerm, side: str, path: str, found: Mapping[str, Tensor]) -> torch.Size:
    """Return the shape of one layer's features; raise CompressError where the term's loss cannot use them."""
    if path not in found:
        raise CompressError(
            f"{term.name}: layer {path} of the {side} returns no tensor, or never runs; name another layer"
        )
    shape, maps_only = found[path].shape, LOSSES[term.name].adapter is not None
    if len(shape) == 4 or (len(shape) == 2 and not maps_only):
        return shape
    wanted = "(n, channels, height, width)" + ("" if maps_only else " or (n, channels)")
    shown = ", ".join(["n", *map(str, shape[1:])])
    raise CompressError(f"{term.name}: layer {path} of the {side} returns ({shown}); name one that returns {wanted}")


def _of_features(terms: Sequence[LossTerm]) -> list[FeatureTerm]:
    return [term for term in terms if isinstance(term, FeatureTerm)]


def _teacher_layers(term: FeatureTerm) -> tuple[str, ...]:
    return term.teacher_layers or term.layers
