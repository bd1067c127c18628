"""Judge a student in training by its loss on images that it does not train on, so that no training ends below its start.

The loss is the training's own, in augmented views of its own kind, which the teacher knows less by heart than the plain images.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from compress.data.batches import Batch
from compress.distillation.step import TeacherOutput, mean_loss, needs_teacher
from compress.quant.layers import deployed_once
from compress.ranks import gather, share_
from compress.recipe.losses import KD_ONLY, MSE_ONLY, FeatureTerm, LossTerm
from compress.run import Run
from compress.tasks import Task

SHARE = 20  # one training image of 20 judges
FEWEST, MOST = 32, 500  # images that judge; where a twentieth is fewer than FEWEST, these are trained on as well
SMALL = 4096  # values of an image's output that are remembered
VIEW = -1  # the number of the judges' view, which no epoch shows


def judging_images(images: int, *, seed: int) -> tuple[Tensor, bool]:
    """Return the indices of the images, of a number of training images, that judge, and whether these are held out."""
    count = min(max(images // SHARE, FEWEST), MOST, images)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return order[:count], images // SHARE >= FEWEST


def judged_terms(terms: Sequence[LossTerm], *, has_classes: bool) -> tuple[LossTerm, ...]:
    """Return the losses that compare two networks at any time: with constant weights, and without adapters, which learn."""
    compared = [term for term in terms if not isinstance(term, FeatureTerm)]
    return tuple(term.model_copy(update={"schedule": "constant", "warmup": 0.0}) for term in compared) or (
        KD_ONLY if has_classes else MSE_ONLY
    )


def judge(
    run: Run, task: Task, terms: Sequence[LossTerm], teacher: Callable[[], nn.Module], images: Tensor
) -> Callable[[nn.Module], float]:
    """Return the function that measures a network's loss on `images` (indices), shared by all ranks, with rank 0's weights.

    `task` is that of the training, whose loss has the same scale.
    """
    terms = judged_terms(terms, has_classes=task.output.has_classes)
    network = teacher() if needs_teacher(terms) else None
    shares = images.split(run.recipe.data.eval_batch_size)[run.rank :: run.ranks]
    known: list[Tensor] = []  # the teacher's outputs, if they are small

    def taught(number: int, batch: Batch) -> TeacherOutput:
        if network is None:
            return TeacherOutput(torch.empty(0), {})
        if number < len(known):
            return TeacherOutput(known[number], {})
        output = network(batch.images).float()
        if output[0].numel() <= SMALL:
            known.append(output)
        return TeacherOutput(output, {})

    def losses(model: nn.Module) -> Iterator[tuple[float, int]]:
        for number, batch in enumerate(run.feed.view(VIEW, shares)):
            outputs, answer = model(batch.images).float(), taught(number, batch)
            values = [term.weight * mean_loss(term, task, outputs, iter(()), answer, batch.targets) for term in terms]
            yield float(torch.stack(values).sum()), len(batch.targets)

    @torch.inference_mode()
    def loss(model: nn.Module) -> float:
        share_(model.state_dict().values(), run.group)
        training = model.training
        model.eval()
        with deployed_once(model):
            mine = list(losses(model))
        model.train(training)
        found = [part for rank in gather(mine) for part in rank]
        # fsum rounds exactly, so it does not matter which rank had which batch.
        return math.fsum(mean * count for mean, count in found) / sum(count for _, count in found)

    return loss
