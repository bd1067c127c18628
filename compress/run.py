"""One execution of a recipe: its device, target, data and teacher, for the stages to use."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from compress.artifact import Metrics, lineage
from compress.data.augment import Augmentation
from compress.data.batches import (
    Batch,
    epoch_shares,
    eval_batches,
    in_order,
    steps_per_epoch,
    train_batches,
    view_batches,
)
from compress.data.dataset import Dataset, relabelled
from compress.data.images import ImageSet
from compress.data.named import NAMED
from compress.data.split import sampled
from compress.errors import CompressError, ModelError
from compress.logs.stage_log import StageLog, Tell
from compress.models.architectures import build
from compress.models.digest import class_names, source_digest, teachers_digest
from compress.models.saved import Architecture, load_float, rebuild
from compress.models.structure import check_logits, check_output, count
from compress.models.teachers import Seen, names_within, own_names, teacher_of
from compress.models.weights import load_weights_
from compress.ranks import barrier, first_decides, gather, rank, ranks
from compress.recipe.arguments import data_settings, fits, teachers_of
from compress.recipe.schema import Model, Recipe
from compress.recipe.stages import Fit, StudentStage
from compress.tasks import TASKS, Task, evaluate
from compress.tasks.predictions import predictions
from compress.training.device import device_of, gradient_group
from compress.training.loop import Loop, Network, Step, fit, place_
from export.command.files import key_of, writing
from export.images.preprocess import Preprocess
from export.images.size import Shape
from export.onnx_file.targets import TARGETS, Target, resolve_target

LOGIT_IMAGES = 8
TUNING_IMAGES = 2000


@dataclass(frozen=True)
class Run:
    """One execution of a recipe."""

    recipe: Recipe
    device: torch.device
    rank: int
    ranks: int
    target: Target
    trust_code: bool
    verbose: bool
    group: dist.ProcessGroup | None = None  # in which ranks share gradients; None is torch's default group
    tell: Tell | None = None  # also gets each epoch's measurements
    opened: Callable[[], Dataset] | None = None  # returns the images that another run has opened

    @cached_property
    def dataset(self) -> Dataset:
        """The images, opened on first use."""
        if self.opened is not None:
            return self.opened()
        found = self.task.open(data_settings(self.recipe), self.augmentation)
        if found.classes:
            return found
        classes, train, val = first_decides(lambda: self._predicted(found))
        return relabelled(found, classes, torch.from_numpy(train), torch.from_numpy(val))

    def of(self, chain: Recipe) -> "Run":
        """Return the run of one of the recipe's chains, on the same images."""
        return replace(self, recipe=chain, opened=lambda: self.dataset)

    @property
    def task(self) -> Task:
        """What the network is for."""
        return TASKS[self.recipe.task]

    @cached_property
    def learned(self) -> Task:
        """The task with the training loss, which weighs classes if the recipe says so; CompressError where it cannot."""
        if self.recipe.data.balance != "class_weights":
            return self.task
        if self.task.class_weights is None:
            raise CompressError(
                f"data.balance: the loss of {self.task.output.name} allows no class_weights: leave it out"
            )
        weights = self.task.class_weights(self.dataset.train, len(self.dataset.classes)).to(self.device)
        return replace(self.task, loss=partial(self.task.loss, weights=weights))

    @property
    def int8_targets(self) -> tuple[Target, ...]:
        """The targets of INT8 files, the recipe's `target` first; empty where that has no INT8."""
        if self.target.precision != "int8":
            return ()
        further = (TARGETS[name] for name in self.recipe.further_targets)
        return tuple(dict.fromkeys((self.target, *further)))

    @property
    def shape(self) -> Shape:
        """One image as the network's input takes it: channels, height, width."""
        return self.dataset.preprocess.shape

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """What the network gives for one image; None for a size that is its own."""
        return self.task.output.output_shape(len(self.dataset.classes), self.dataset.preprocess.image_size)

    def validation(self, *, limit: int | None = None, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Return the validation batches in order, or a rank's share; `limit` takes n images, spread over the set."""
        images = self.dataset.val
        shares = in_order(len(images), limit).split(self.recipe.data.eval_batch_size)
        return self._unchanged(images, shares[rank::ranks])

    def with_unlabelled(self) -> "Run":
        """Return the run of a teacher's student, whose training images need no label."""
        return replace(self, opened=lambda: self.dataset.with_unlabelled)

    def calibration(self, images: int, *, labelled: bool = False) -> Iterator[Batch]:
        """Return n unaugmented training images in batches, spread over the set; `labelled` excludes others."""
        shown = self.dataset.train if labelled else self.dataset.with_unlabelled.train
        return self._unchanged(shown, in_order(len(shown), images).split(min(self.recipe.data.eval_batch_size, 32)))

    def tuning(self) -> Iterator[Batch]:
        """Return the tuning split: unaugmented training images, drawn by seed, on which stages choose."""
        images = self.dataset.train
        # Without classes all images are one stratum.
        strata = torch.zeros(len(images), dtype=torch.int64) if images.labels.is_floating_point() else images.labels
        chosen = sampled(strata.numpy(), len(self.dataset.classes), images=TUNING_IMAGES, seed=self.recipe.seed)
        return self._unchanged(images, torch.from_numpy(chosen).split(self.recipe.data.eval_batch_size))

    def _unchanged(self, images: ImageSet, shares: Sequence[torch.Tensor]) -> Iterator[Batch]:
        preprocess, workers = self.dataset.preprocess, self.recipe.data.workers
        return eval_batches(images, preprocess, shares, device=self.device, workers=workers)

    def views(self, images: int) -> Iterator[Batch]:
        """Return n augmented training images in batches, spread over the set, the same on every rank."""
        n = len(self.dataset.train)
        chosen = torch.arange(min(images, n)) * n // min(images, n)
        return self.view(0, chosen.split(32))

    def view(self, number: int, shares: Sequence[torch.Tensor]) -> Iterator[Batch]:
        """Return the training images of each share (indices) under one augmented view, without broken ones."""
        return (batch for batch in self._shown(number, shares) if len(batch.targets))

    def _shown(self, view: int, shares: Sequence[torch.Tensor]) -> Iterator[Batch]:
        return view_batches(
            self.dataset,
            shares,
            augmentation=self.augmentation,
            seed=self.recipe.seed,
            view=view,
            workers=self.recipe.data.workers,
            device=self.device,
        )

    @property
    def augmentation(self) -> Augmentation:
        """The random changes of training images."""
        return Augmentation(**self.recipe.data.augment.model_dump())

    def training(self, settings: Fit, epoch: int, view: int) -> Iterator[Batch]:
        """Return this rank's share of an epoch's batches, under one view."""
        shares = epoch_shares(
            self.dataset.train,
            settings.batch_size,
            seed=self.recipe.seed,
            epoch=epoch,
            rank=self.rank,
            ranks=self.ranks,
            balance=self.recipe.data.balance == "sampler",
        )
        return train_batches(self.dataset, self._shown(view, shares), settings.batch_size)

    def log(self, out: Path, stage: str) -> StageLog:
        """Return the log of a stage, silent on all ranks but 0."""
        return StageLog(out, stage=stage, verbose=self.verbose, enabled=self.rank == 0, tell=self.tell)

    def fit(
        self,
        model: Network,
        step: Step,
        settings: Fit,
        *,
        log: StageLog,
        phase: str,
        views: int | None = None,
        before_step: Callable[[nn.Module, float], None] | None = None,
        after_backward: Callable[[nn.Module], None] | None = None,
    ) -> Network:
        """Train in the one loop. `phase` names the training's files; epochs cycle through `views` views (None: all new)."""
        loop = Loop(
            batches=lambda epoch: self.training(settings, epoch, epoch if views is None else epoch % views),
            steps_per_epoch=steps_per_epoch(len(self.dataset.train), settings.batch_size),
            evaluate=self.evaluate,
            metric=self.task.output.metric.title,
            log=log,
            checkpoint=log.out / f"checkpoint-{phase}.pt",
            summary=log.out / f"training-{phase}.json",
            device=self.device,
            ranks=self.ranks,
            seed=self.recipe.seed,
            phase=phase,
            group=self.group,
            before_step=before_step,
            after_backward=after_backward,
            left_out=lambda: len(set().union(*gather(set(self.dataset.train.broken)))),
        )
        log.note_detail(f"{len(self.dataset.train):,} training images {self.dataset.train.place}")
        return fit(model, step, settings, loop)

    def start(self, given: Model | StudentStage) -> tuple[Architecture, nn.Module]:
        """Return a network of the recipe with its initial weights, random by seed or given, on the CPU.

        Raises ModelError where it cannot be built or loaded, or does not return logits of the data's classes.
        """
        architecture = Architecture(given.arch, len(self.dataset.classes), self.shape)
        torch.manual_seed(self.recipe.seed)
        model = rebuild(architecture, trust_code=self.trust_code)
        if given.weights is not None:
            load_weights_(model, given.arch, given.weights, reset_head=given.reset_head)
        self.check_output(model)
        self.check_logits(model)
        return architecture, model

    def check_output(self, model: nn.Module) -> None:
        """Raise ModelError where a network's output has not the shape that the task needs for the data's classes."""
        check_output(model, self.shape, output=self.output_shape)

    def check_logits(self, model: nn.Module) -> None:
        """Raise ModelError where a network on the CPU returns probabilities for a few training images."""
        for batch in self.calibration(LOGIT_IMAGES):
            check_logits(model, batch.images.cpu())

    def load(self, directory: Path) -> nn.Module:
        """Return an artifact's float network on the device."""
        return place_(load_float(directory, trust_code=self.trust_code), self.device)

    def teacher(self, directory: Path) -> nn.Module:
        """Return the recipe's `teacher`, else the source of an artifact; on the device, in eval mode, without gradients."""
        if self.recipe.teacher:
            return self.given_teacher()
        return place_(self.load_source(directory).requires_grad_(False), self.device)

    def given_teacher(self, *, whole: bool = False) -> nn.Module:
        """Return the recipe's `teacher` on the device; with `whole` as a torch network, which can be exported."""
        student = _seen(self.dataset.preprocess)
        found = teacher_of(
            teachers_of(self.recipe), self.dataset.classes, student, trust_code=self.trust_code, whole=whole
        )
        place_(found.requires_grad_(False), self.device)
        for batch in self.calibration(LOGIT_IMAGES):
            found.note_probabilities_(batch.images)
        try:
            self.check_output(found)
        except ModelError as error:
            names = ", ".join(one.network for one in self.recipe.teacher)
            raise ModelError(
                f"teacher {names}: {error}; list its outputs' names in a text file and set it as `classes`"
            ) from error
        return found

    def _predicted(self, images: Dataset) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64]]:
        """Return the teacher's classes and its predictions for training and validation images, from a cache."""
        recipe, model = self.recipe, self.recipe.model
        given = None if recipe.data.classes is None else class_names(Path(recipe.data.classes))
        facts: dict[str, object] = {
            "data": images.digest,
            "classes": given,
            "teacher": teachers_digest(teachers_of(recipe)),
        }
        facts |= {"model": model and source_digest(model.arch, model.weights)}
        file = Path(recipe.out) / "teacher-logits" / f"{key_of(facts)}.npz"
        if not file.exists():
            network, names = self._labeller(images.preprocess, given)
            place_(network, self.device).eval()
            data = recipe.data
            classes, train, val = predictions(
                images, network, names, batch_size=data.eval_batch_size, workers=data.workers, device=self.device
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            with writing(file) as partial:
                np.savez(partial, classes=np.array(classes), train=train, val=val)
        with np.load(file, allow_pickle=False) as found:
            return tuple(found["classes"].tolist()), found["train"], found["val"]

    def _labeller(
        self, preprocess: Preprocess, given: tuple[str, ...] | None
    ) -> tuple[nn.Module, tuple[str, ...] | None]:
        """Return the network whose predictions become labels, on the CPU, and its classes' names, None if unknown."""
        teachers, model = teachers_of(self.recipe), self.recipe.model
        if teachers:
            given = given or own_names(teachers[0])
            taught = teacher_of(teachers, given, _seen(preprocess), trust_code=self.trust_code)
            return taught, given or names_within(taught.first)
        assert model is not None
        if given is None and model.weights is not None:
            raise CompressError(
                "data.classes: missing: without labels the class names are unknown: list them in a text file, one a line"
            )
        network = build(model.arch, num_classes=len(given or ()), shape=preprocess.shape, trust_code=self.trust_code)
        if model.weights is not None:
            load_weights_(network, model.arch, model.weights, reset_head=False)
        return network, given or names_within(network)

    def load_source(self, directory: Path) -> nn.Module:
        """Return the source network of an artifact, the baseline of every comparison, in eval mode on the CPU."""
        if self.recipe.model is None:
            return self.given_teacher(whole=True).cpu()
        return load_float(lineage(directory)[0], trust_code=self.trust_code)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return score and loss of rank 0's network on all validation images, of which each rank runs a part."""
        self.share_(model)  # batch-norm's statistics differ between ranks
        return evaluate(model, self.validation(rank=self.rank, ranks=self.ranks), self.task)

    @torch.no_grad()
    def share_(self, model: nn.Module) -> None:
        """Copy rank 0's weights and statistics to every rank."""
        barrier()  # rank 0 may have been busy for longer than the group's timeout
        for tensor in model.state_dict().values() if self.ranks > 1 else ():
            plain = tensor.contiguous()  # ranks may have different memory formats
            dist.broadcast(plain, 0, group=self.group)
            tensor.copy_(plain)

    def measure(self, model: nn.Module) -> Metrics:
        """Return a float network's stage metrics: score, loss, parameters, multiply-accumulates, size."""
        costs = count(model, self.shape)
        return {
            **self.evaluate(model),
            "params_m": costs.params / 1e6,
            "macs_m": costs.macs / 1e6,
            "size_mb": costs.params * 4 / 1e6,
        }


def _seen(preprocess: Preprocess) -> Seen:
    return Seen(preprocess.image_size, preprocess.mean, preprocess.std)


def open_run(recipe: Recipe, *, trust_code: bool, verbose: bool) -> Run:
    """Return the run on the recipe's device, on this rank's own if there are several; rank 0 decides the target.

    Raises CompressError where a rank finds no device, or one of another kind than the others.
    """
    device = device_of(recipe.device)
    if len(kinds := set(gather(device.type))) > 1:
        raise CompressError(
            f"device: {recipe.device} is {' and '.join(sorted(kinds))} on different ranks; set device: cpu, or use machines with GPUs only"
        )
    if device.type == "cpu" and ranks() > 1 and any(fit.sync_batchnorm for fit in fits(recipe)):
        raise CompressError(
            "fit.sync_batchnorm: torch has it on GPUs only, and these ranks train on CPUs; leave it out"
        )
    target = first_decides(lambda: resolve_target(recipe.target))
    settings = data_settings(recipe)
    fetch = NAMED.get(settings.name) or TASKS[recipe.task].folders.get(settings.name)
    if ranks() > 1 and fetch is not None:
        first_decides(lambda: fetch(settings.path) and None)  # downloads once
    return Run(recipe, device, rank(), ranks(), target, trust_code, verbose, gradient_group(device))


def as_numpy(batches: Iterator[Batch]) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
    """Yield (images (n, channels, height, width), truths (n, ...)) as contiguous arrays for ONNX Runtime."""
    for batch in batches:
        yield batch.images.cpu().contiguous().numpy(), batch.targets.cpu().numpy()
