"""Judge a student in training by its loss on images that it does not train on, so that no training ends below its start.

The loss is that of the labels where the data have some: it orders networks as their score does, where nearness to the teacher does not
(docs/decisions.md). Else it is the training's own. Views are augmented, as the teacher knows the plain images by heart.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.data.batches import Batch
from compress.distillation.step import TeacherOutput, mean_loss, needs_teacher
from compress.pruning.recovery.reconstruction import estimate_batchnorm_
from compress.quant.layers import deployed_once
from compress.ranks import gather, share_
from compress.recipe.losses import KD_ONLY, MSE_ONLY, CrossEntropyTerm, FeatureTerm, LossTerm
from compress.run import Run
from compress.tasks import Task
from compress.training.held import Losses

SHARE = 20  # one training image of 20 judges
FEWEST, MOST = 32, 500  # images that judge; where a twentieth is fewer than FEWEST, these are trained on as well
SMALL = 4096  # values of an image's output that are remembered
GROUP = 10  # images, whose mean loss is one of those that the median is of
CAP = 2.0  # times the loss of a network that knows nothing: what an image counts at most where labels judge
VIEWS, SHOWN = 8, 2_000  # of each judging image at most, and of all together, if they are no more than that


def judging_images(images: int, *, seed: int) -> tuple[Tensor, bool]:
    """Return the indices of the images, of a number of training images, that judge, and whether these are held out."""
    count = min(max(images // SHARE, FEWEST), MOST, images)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return order[:count], images // SHARE >= FEWEST


def judging_views(images: int) -> range:
    """Return the numbers of the views in which so many judging images are seen: negative, as no epoch shows them."""
    return range(-min(max(SHOWN // images, 1), VIEWS), 0)


def judged_terms(terms: Sequence[LossTerm], *, labelled: bool, has_classes: bool) -> tuple[LossTerm, ...]:
    """Return the losses that compare two networks at any time: the labels', or `terms` with constant weights and without adapters, which learn."""
    if labelled:
        return (CrossEntropyTerm(name="cross_entropy"),)
    compared = [term for term in terms if not isinstance(term, FeatureTerm)]
    return tuple(term.model_copy(update={"schedule": "constant", "warmup": 0.0}) for term in compared) or (
        KD_ONLY if has_classes else MSE_ONLY
    )


def judge(
    run: Run, task: Task, terms: Sequence[LossTerm], teacher: Callable[[], nn.Module], images: Tensor
) -> Callable[[nn.Module], Losses]:
    """Return the function that measures a network's losses on `images` (indices), shared by all ranks, with rank 0's weights.

    A network can answer an image of a hundred with outputs a thousand times as large as the others', whose losses would be the mean. So
    where labels judge, an image's loss counts at most CAP times that of a network that knows nothing (`Task.blank`); the mean of such losses still sees every
    error, of which a good network makes few. Losses without such a scale count as the median over groups of GROUP images of their means
    (median of means: Lerasle & Oliveira 2011, Robust Empirical Mean Estimators). `task` is that of the training, whose loss has the same
    scale.
    """
    data, output = run.recipe.data, task.output
    labelled = task.supervised and output.labelled and data.unlabelled is None
    terms = judged_terms(terms, labelled=labelled, has_classes=output.has_classes)
    feed = run.feed
    if labelled:  # a mixed image has no label of its own
        feed = replace(feed, augmentation=replace(feed.augmentation, mixup=0.0, cutmix=0.0))
    network = teacher() if needs_teacher(terms) else None
    shares = images.split(data.eval_batch_size)[run.rank :: run.ranks]
    views = judging_views(len(images))
    known: list[Tensor] = []  # the teacher's outputs, if they are small

    def taught(number: int, batch: Batch) -> Tensor:
        if network is None:
            return torch.empty(0)
        if number < len(known):
            return known[number]
        answer: Tensor = network(batch.images).float()
        if answer[0].numel() <= SMALL:
            known.append(answer)
        return answer

    def losses(model: nn.Module) -> Iterator[float]:
        size = 1 if labelled else GROUP
        for number, batch in enumerate(batch for view in views for batch in feed.view(view, shares)):
            outputs, answer = model(batch.images).float(), taught(number, batch)
            for first in range(0, len(outputs), size):
                mine, its, truths = (rows[first : first + size] for rows in (outputs, answer, batch.targets))
                found = total(mine, its, truths)
                if labelled:
                    most = CAP * total(task.blank(mine), its, truths)
                    found = min(found, most) if math.isfinite(most) else math.nan
                yield found

    def total(mine: Tensor, its: Tensor, truths: Tensor) -> float:
        values = [term.weight * mean_loss(term, task, mine, iter(()), TeacherOutput(its, {}), truths) for term in terms]
        value = float(torch.stack(values).sum())
        return math.inf if math.isnan(value) else value

    @torch.inference_mode()
    def loss(model: nn.Module) -> Losses:
        share_(model.state_dict().values(), run.group)
        training = model.training
        model.eval()
        with deployed_once(model):
            found = torch.tensor(list(losses(model)), dtype=torch.float64)
            each = found.reshape(len(views), len(found) // len(views)).nanmean(0)
            mine = each[~each.isnan()].tolist()
        model.train(training)
        every = [value for rank in gather(mine) for value in rank]
        return Losses(tuple(every), unbounded=not labelled)

    return loss


@torch.no_grad()
def settle_(network: nn.Module, loss: Callable[[nn.Module], Losses], images: Tensor) -> Losses:
    """Set batch-norms' statistics to those over `images` (n, channels, height, width) where that lowers the loss; return the losses.

    The running ones are those of the last few batches, which a few images that blow a network up can ruin; a network whose other weights
    live with such images needs them, however.
    """
    before, running = loss(network), {name: values.clone() for name, values in network.named_buffers()}
    estimate_batchnorm_(network, images)
    after = loss(network)
    if after.value < before.value:
        return after
    for name, values in network.named_buffers():
        values.copy_(running[name])
    return before
