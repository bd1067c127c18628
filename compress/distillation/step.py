"""Distillation: the student learns from a weighted sum of losses, some against the labels, some against the teacher.

`distillation` gives what `train.fit` trains (the student with its adapters) and the step that does it. The teacher is a callable that answers a
batch with logits and features: the network itself (`online_teacher`), or what it said before (`compress.distillation.teacher`).
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.data.batches import Batch
from compress.distillation import features, logits
from compress.distillation.adapters import Review, Widen
from compress.distillation.taps import Tapped, tap
from compress.errors import CompressError
from compress.recipe.losses import (
    AnyFeatureTerm,
    AnyLogitTerm,
    ATTerm,
    CrossEntropyTerm,
    DISTTerm,
    DKDTerm,
    FeatureTerm,
    FitNetTerm,
    KDTerm,
    LossTerm,
    MSETerm,
    NKDTerm,
    PKTTerm,
    ReviewTerm,
    RKDTerm,
    SPTerm,
)
from compress.tasks import Task
from compress.training.loop import Step

# The factor of a loss's weight after a part `done` of the training, in [0, 1).
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear_up": lambda done: done,
    "linear_down": lambda done: 1.0 - done,
    "cosine_down": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


class TeacherAnswer(NamedTuple):
    """What the teacher says about a batch: logits (batch, classes), and features by module path."""

    logits: Tensor
    features: Mapping[str, Tensor]


class StudentAnswer(NamedTuple):
    """What the student says about a batch: logits (batch, classes), and for each feature loss the adapted features of its layers."""

    logits: Tensor
    features: Sequence[Sequence[Tensor]]


Teacher = Callable[[Batch], TeacherAnswer]
Loss = Callable[[Tensor, Tensor], Tensor]  # (student's, teacher's) -> ()
LabelledLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (student's, teacher's, targets) -> ()


class Learner(nn.Module):
    """A student with the adapters that train beside it; `student` alone is kept.

    In training mode it returns a StudentAnswer, in eval mode the student's logits, as networks with auxiliary heads do.
    """

    def __init__(
        self, student: nn.Module, tapped: Tapped, adapters: Sequence[nn.Module], layers: Sequence[Sequence[str]]
    ) -> None:
        """Take the student, how its features are read, and for each feature loss an adapter (list → list) and the layers it takes."""
        super().__init__()
        self.student, self.adapters = student, nn.ModuleList(adapters)
        self._tapped, self._layers = tapped, tuple(layers)

    def forward(self, images: Tensor) -> StudentAnswer | Tensor:
        """Return the answer to images (batch, 3, height, width)."""
        if not self.training:
            return self.student(images)  # type: ignore[no-any-return]
        output, found = self._tapped(images)
        chosen = zip(self.adapters, self._layers, strict=True)
        return StudentAnswer(output, [adapter([found[path] for path in paths]) for adapter, paths in chosen])


def supervised_step(task: Task, *, label_smoothing: float) -> Step:
    """Return the step of plain training on the targets."""

    def step(model: nn.Module, batch: Batch, _done: float) -> dict[str, Tensor]:
        return {"loss": task.loss(model(batch.images), batch.targets, label_smoothing=label_smoothing)}

    return step


def online_teacher(network: nn.Module, terms: Sequence[LossTerm]) -> Teacher:
    """Return the teacher that runs on every batch, on the very view that the student sees: in eval mode, without gradients.

    Raises ModelError where a loss names a layer that it does not have.
    """
    tapped = tap(network.eval(), _once(_teacher_layers(term) for term in _of_features(terms)))

    @torch.no_grad()
    def answer(batch: Batch) -> TeacherAnswer:
        with torch.autocast("cpu", enabled=False):  # a CPU's bf16 answers otherwise too often (docs/training.md)
            return TeacherAnswer(*tapped(batch.images))

    return answer


def no_teacher(_batch: Batch) -> TeacherAnswer:
    """Stand in where every loss is against the labels."""
    return TeacherAnswer(torch.empty(0), {})


def needs_teacher(terms: Sequence[LossTerm]) -> bool:
    """Tell whether a loss is against the teacher."""
    return any(not isinstance(term, CrossEntropyTerm) for term in terms)


def needs_features(terms: Sequence[LossTerm]) -> bool:
    """Tell whether a loss is against the teacher's features, so that its logits are not enough."""
    return bool(_of_features(terms))


def distillation(
    terms: Sequence[LossTerm], task: Task, *, student: nn.Module, teacher: Teacher, images: Tensor, seed: int
) -> tuple[Learner, Step]:
    """Return the learner to train and its step; `learner.student` is the student.

    `images` (1, 3, s, s), on the student's device, tells the features' shapes; `seed` starts the adapters. Raises ModelError for a layer that
    the student does not have, and CompressError where a loss cannot use what a layer returns.
    """
    feature_terms = _of_features(terms)
    tapped, adapters = tap(student, _once(term.layers for term in feature_terms)), []
    if feature_terms:
        training = student.training
        with torch.no_grad():
            student.eval()
            mine = tapped(images)[1]
        student.train(training)
        its = teacher(Batch(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))).features
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            adapters = [_adapter(term, mine, its) for term in feature_terms]
    return Learner(student, tapped, adapters, [term.layers for term in feature_terms]), _step(terms, task, teacher)


def check_layers(terms: Sequence[LossTerm], *, student: nn.Module, teacher: nn.Module) -> None:
    """Raise ModelError where a loss names a layer that the network does not have."""
    for term in _of_features(terms):
        tap(student, term.layers)
        tap(teacher, _teacher_layers(term))


def weight_of(term: LossTerm, done: float) -> float:
    """Return a term's weight after a part `done` of the training, in [0, 1)."""
    warmed_up = min(done / term.warmup, 1.0) if term.warmup else 1.0
    return term.weight * warmed_up * SCHEDULES[term.schedule](done)


def _step(terms: Sequence[LossTerm], task: Task, teacher: Teacher) -> Step:
    """Return the step: one dictionary with the weighted sum as "loss" and every loss's own value."""
    ask = teacher if needs_teacher(terms) else no_teacher
    labels, measures = _labels(terms), [_measure(term, task) for term in terms]

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        taught = ask(batch)
        answer: StudentAnswer = model(batch.images)
        adapted = iter(answer.features)
        with torch.autocast(batch.images.device.type, enabled=False):  # products inside losses stay in float32
            values = [
                measure(answer.logits, next(adapted) if isinstance(term, FeatureTerm) else (), taught, batch.targets)
                for term, measure in zip(terms, measures, strict=True)
            ]
            factors = [weight_of(term, done) for term in terms]
            total = torch.stack([factor * value for factor, value in zip(factors, values, strict=True)]).sum()
        return {"loss": total, **dict(zip(labels, values, strict=True))}

    return step


Measure = Callable[
    [Tensor, Sequence[Tensor], TeacherAnswer, Tensor], Tensor
]  # (logits, adapted, taught, targets) -> ()


def _measure(term: LossTerm, task: Task) -> Measure:
    """Return what computes one term of the sum, without its weight."""
    if isinstance(term, CrossEntropyTerm):
        smoothing = term.label_smoothing
        return lambda outputs, _adapted, _taught, targets: task.loss(outputs, targets, label_smoothing=smoothing)
    if isinstance(term, FeatureTerm):
        of_layer, paths = _feature_loss(term), _teacher_layers(term)
        return lambda _outputs, adapted, taught, _targets: torch.stack(
            [of_layer(mine, taught.features[path]) for mine, path in zip(adapted, paths, strict=True)]
        ).sum()
    loss = _standardized(_logit_loss(term)) if term.standardize else _logit_loss(term)
    return lambda outputs, _adapted, taught, targets: loss(
        task.rows(outputs), task.rows(taught.logits), task.truth_rows(targets)
    )


def _logit_loss(term: AnyLogitTerm) -> LabelledLoss:
    """Translate a recipe's loss between logits into a plain function."""
    match term:
        case KDTerm():
            return _unlabelled(partial(logits.kd_loss, temperature=term.temperature))
        case MSETerm():
            return _unlabelled(logits.mse_loss)
        case DKDTerm():
            return partial(logits.dkd_loss, alpha=term.alpha, beta=term.beta, temperature=term.temperature)
        case DISTTerm():
            of_both = partial(logits.dist_loss, beta=term.beta, gamma=term.gamma, temperature=term.temperature)
            return _unlabelled(of_both)
        case NKDTerm():
            return partial(logits.nkd_loss, gamma=term.gamma, temperature=term.temperature)


def _feature_loss(term: AnyFeatureTerm) -> Loss:
    """Translate a recipe's loss between features into a plain function of one layer's."""
    match term:
        case FitNetTerm():
            return features.fitnet_loss
        case ATTerm():
            return features.at_loss
        case SPTerm():
            return features.sp_loss
        case RKDTerm():
            return partial(features.rkd_loss, distance=term.distance, angle=term.angle)
        case PKTTerm():
            return features.pkt_loss
        case ReviewTerm():
            return features.review_loss


def _unlabelled(loss: Loss) -> LabelledLoss:
    return lambda student, teacher, _targets: loss(student, teacher)


def _standardized(loss: LabelledLoss) -> LabelledLoss:
    return lambda student, teacher, targets: loss(logits.standardized(student), logits.standardized(teacher), targets)


def _adapter(term: AnyFeatureTerm, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> nn.Module:
    """Return what brings the student's features to the shapes that the term's loss compares."""
    mine = [_shape(term, "student", path, student) for path in term.layers]
    its = [_shape(term, "teacher", path, teacher) for path in _teacher_layers(term)]
    match term:
        case FitNetTerm():
            for path, a, b in zip(term.layers, mine, its, strict=True):
                if len(a) != len(b):
                    raise CompressError(
                        f"fitnet: layer {path}: only one of student and teacher returns a map; name another layer"
                    )
            return Widen(mine, its)
        case ReviewTerm():
            return Review(mine, its)
        case _:
            return nn.Identity()


def _shape(term: AnyFeatureTerm, side: str, path: str, found: Mapping[str, Tensor]) -> torch.Size:
    """Return the shape of one layer's features; raise CompressError where the term's loss cannot use them."""
    if path not in found:
        raise CompressError(
            f"{term.name}: layer {path} of the {side} returns no tensor, or never runs; name another layer"
        )
    shape = found[path].shape
    maps_only = isinstance(term, ATTerm | ReviewTerm)
    if len(shape) == 4 or (len(shape) == 2 and not maps_only):
        return shape
    wanted = "(n, channels, height, width)" + ("" if maps_only else " or (n, channels)")
    shown = ", ".join(["n", *map(str, shape[1:])])
    raise CompressError(f"{term.name}: layer {path} of the {side} returns ({shown}); name one that returns {wanted}")


def _of_features(terms: Sequence[LossTerm]) -> list[AnyFeatureTerm]:
    return [term for term in terms if isinstance(term, FeatureTerm)]


def _teacher_layers(term: AnyFeatureTerm) -> tuple[str, ...]:
    return term.teacher_layers or term.layers


def _once(paths: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Return every path once, in order."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(paths)))


def _labels(terms: Sequence[LossTerm]) -> list[str]:
    """Return what the terms are reported as: their names, with a number where a recipe has a loss more than once."""
    counts: Counter[str] = Counter()
    labels = []
    for term in terms:
        counts[term.name] += 1
        labels.append(term.name if counts[term.name] == 1 else f"{term.name}_{counts[term.name]}")
    return labels
