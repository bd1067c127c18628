"""One execution of a recipe: its device, target, data and teacher, for the stages to use."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from compress.artifact import Metrics, lineage
from compress.data.augment import Augmentation
from compress.data.batches import steps_per_epoch
from compress.data.dataset import Dataset
from compress.data.feed import Feed
from compress.data.images import FileImages
from compress.data.labelled import relabelled
from compress.data.named import download
from compress.errors import CompressError, ModelError
from compress.logs.stage_log import StageLog, Tell
from compress.models.architectures import build
from compress.models.decodes import Decode, function_of
from compress.models.digest import source_digest, teachers_digest
from compress.models.outputs import signature_of
from compress.models.saved import Architecture, load_float, rebuild
from compress.models.structure import check_logits, check_output, count
from compress.models.teachers import seen, teacher_of
from compress.models.weights import load_weights_
from compress.ranks import first_decides, gather, rank, ranks, share_
from compress.recipe.arguments import as_served, data_settings, fits, limits_of, teachers_of
from compress.recipe.schema import Model, Recipe
from compress.recipe.stages import Fit, StudentStage
from compress.tasks import TASKS, Task, aligning, evaluate
from compress.tasks.decoded import decoded, with_decoder
from compress.tasks.predictions import LOGITS, Labeller, labels_of
from compress.tasks.references import with_references
from compress.training.device import Network, device_of, gradient_group, place_
from compress.training.held import Held
from compress.training.loop import Loop, Step, fit
from export.images.size import Shape
from export.onnx_file.targets import TARGETS, Target, resolve_target
from export.runtime.own import OwnMetric, open_metric

LOGIT_IMAGES = 8


@dataclass
class Watch:
    """The log that is open now, which counts the images that a stage reads."""

    log: StageLog | None = None

    def seen(self, images: int) -> None:
        """Count images in the log."""
        if self.log is not None:
            self.log.seen(images)


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
    watch: Watch = field(default_factory=Watch, compare=False)

    @cached_property
    def dataset(self) -> Dataset:
        """The images, opened on first use."""
        if self.opened is not None:
            return self.opened()
        task = TASKS[self.recipe.task]
        found = task.open(data_settings(self.recipe), _augmentation(self.recipe))
        if self.recipe.decode is not None:
            return self._decoded(found)
        if found.classes:
            return found
        recipe, model = self.recipe, self.recipe.model
        if not task.output.has_classes:
            return self._referred(found)
        labeller = Labeller(
            teachers_of(recipe),
            None if model is None else (model.arch, model.weights),
            None if recipe.data.classes is None else Path(recipe.data.classes),
            self.trust_code,
        )
        classes, train, val = first_decides(
            lambda: labels_of(
                found,
                labeller,
                memory=Path(recipe.out) / LOGITS,
                batch_size=recipe.data.eval_batch_size,
                workers=recipe.data.workers,
                device=self.device,
            )
        )
        return relabelled(found, classes, torch.from_numpy(train), torch.from_numpy(val))

    def _referred(self, found: Dataset) -> Dataset:
        """Return the images with the outputs of the recipe's uncompressed network as truths."""
        data, model, given = self.recipe.data, self.recipe.model, teachers_of(self.recipe)
        weights = {} if model is None else model.outputs

        def build_source() -> nn.Module:
            if model is None:
                return teacher_of(given, None, seen(found.preprocess), trust_code=self.trust_code, outputs=())
            return self._source_of(model, 0, found.preprocess.shape, tuple(weights))

        facts = {"teacher": teachers_digest(given), "model": model and source_digest(model.arch, model.weights)}
        referred = with_references(
            found,
            build_source,
            facts | ({"outputs": list(weights)} if weights else {}),
            memory=Path(self.recipe.out) / LOGITS,
            batch_size=data.eval_batch_size,
            workers=data.workers,
            device=self.device,
        )
        return replace(referred, outputs=as_served(self.recipe, referred.outputs))

    def _decoded(self, found: Dataset) -> Dataset:
        """Return the images with what the source's outputs are and how they become boxes."""
        model, asked = self.recipe.model, self.recipe.decode
        assert model is not None and asked is not None, "one without the other was refused"  # noqa: PT018
        network = self._source_of(model, len(found.classes), found.preprocess.shape, tuple(model.outputs))
        function = function_of(asked.function, trust_code=self.trust_code)
        found = with_decoder(found, network, function, limits_of(asked))
        return replace(found, outputs=as_served(self.recipe, found.outputs))

    def _source_of(self, model: Model, classes: int, shape: Shape, outputs: tuple[str, ...]) -> nn.Module:
        found = build(model.arch, num_classes=classes, shape=shape, trust_code=self.trust_code, outputs=outputs)
        if model.weights is not None:
            load_weights_(found, model.arch, model.weights, reset_head=model.reset_head)
        return found

    @cached_property
    def _decode(self) -> Decode | None:
        """The recipe's decode as a torch module."""
        asked = self.recipe.decode
        if asked is None or (data := self.dataset).decoder is None:
            return None
        function = function_of(asked.function, trust_code=self.trust_code)
        return Decode(function, data.decoder.outputs, data.preprocess.image_size, len(data.classes))

    @property
    def gives_logits(self) -> bool:
        """Whether a network's one output is a logit for each class, or a built-in detector's rows."""
        return TASKS[self.recipe.task].output.has_classes and self.recipe.decode is None

    @property
    def served(self) -> tuple[str, ...] | None:
        """The names of the outputs that networks return side by side, or of the one chosen of several; None for a single one."""
        if self.gives_logits:
            return None
        chosen = self.recipe.model.outputs if self.recipe.model else {}
        return tuple(one.name for one in self.dataset.outputs) or tuple(chosen) or None

    @property
    def num_classes(self) -> int:
        """The number of classes that networks are built for; 0 where outputs are not classes."""
        return len(self.dataset.classes) if self.task.output.has_classes else 0

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """The shape of one image's output; None for a size that depends on the network."""
        if not self.task.output.has_classes:
            return tuple(self.dataset.val.labels.shape[1:])
        return self.task.output.output_shape(len(self.dataset.classes), self.dataset.preprocess.image_size)

    def of(self, chain: Recipe) -> "Run":
        """Return the run of one of the recipe's chains, on the same images."""
        return replace(self, recipe=chain, opened=lambda: self.dataset)

    @property
    def task(self) -> Task:
        """What the network is for; a task of tensors knows the network's outputs."""
        found = TASKS[self.recipe.task]
        if self.recipe.decode is not None and self.dataset.decoder is not None and self._decode is not None:
            return aligning(decoded(found, self.dataset, self._decode), self.dataset.outputs)
        if found.output.has_classes:
            return found
        return aligning(replace(found, output=found.output.of(self.dataset.outputs)), self.dataset.outputs)

    @cached_property
    def judged(self) -> Task:
        """The task with what its losses need to know of the data."""
        return self.task if self.task.fitted is None else self.task.fitted(self.task, self.dataset)

    @cached_property
    def learned(self) -> Task:
        """The task with the training loss, which weighs classes if the recipe says so; CompressError where it cannot."""
        if self.recipe.data.balance != "class_weights":
            return self.judged
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

    @cached_property
    def feed(self) -> Feed:
        """The images in batches."""
        data = self.recipe.data
        return Feed(
            self.dataset,
            _augmentation(self.recipe),
            self.device,
            self.recipe.seed,
            data.eval_batch_size,
            data.workers,
            data.balance == "sampler",
            self.rank,
            self.ranks,
            self.watch.seen,
        )

    def log(self, out: Path, stage: str) -> StageLog:
        """Return the log of a stage, silent on all ranks but 0."""
        self.watch.log = StageLog(out, stage=stage, verbose=self.verbose, enabled=self.rank == 0, tell=self.tell)
        return self.watch.log

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
        held: Held | None = None,
    ) -> Network:
        """Train in the one loop. `phase` names the training's files; epochs cycle through `views` views (None: all new)."""
        without = held.images if held else ()
        loop = Loop(
            batches=lambda epoch: self.feed.training(
                settings.batch_size, epoch=epoch, view=epoch if views is None else epoch % views, without=without
            ),
            steps_per_epoch=steps_per_epoch(len(self.dataset.train) - len(without), settings.batch_size),
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
            held=held,
        )
        log.note_detail(f"{len(self.dataset.train):,} training images {self.dataset.train.place}")
        return fit(model, step, settings, loop)

    def start(self, given: Model | StudentStage) -> tuple[Architecture, nn.Module]:
        """Return a network of the recipe with its initial weights, random by seed or given, on the CPU.

        Raises ModelError where it cannot be built or loaded, or does not return logits of the data's classes.
        """
        architecture = Architecture(given.arch, self.num_classes, self.shape, outputs=self.served)
        torch.manual_seed(self.recipe.seed)
        model = rebuild(architecture, trust_code=self.trust_code)
        if given.weights is not None:
            load_weights_(model, given.arch, given.weights, reset_head=given.reset_head)
        self.check(model, logits=True)
        return architecture, model

    def check(self, model: nn.Module, *, logits: bool) -> None:
        """Raise ModelError where a network does not give what the task needs for the data's classes.

        `logits` also looks at its outputs for a few training images, on the CPU: probabilities are refused.
        """
        check_output(model, self.shape, output=self.output_shape)
        wanted, found = (
            [(one.name, one.shape) for one in outputs]
            for outputs in (self.dataset.outputs, signature_of(model, self.shape) if self.dataset.outputs else ())
        )
        if wanted != found:
            raise ModelError(f"{type(model).__name__}: must have the outputs {wanted}, has {found}: name its own alike")
        for batch in self.feed.calibration(LOGIT_IMAGES) if logits and self.gives_logits else ():
            check_logits(model, batch.images.cpu())

    def teacher(self, directory: Path) -> nn.Module:
        """Return the recipe's `teacher`, else the source of an artifact; on the device, in eval mode, without gradients."""
        if self.recipe.teacher:
            return self.given_teacher()
        return place_(self.load_source(directory).requires_grad_(False), self.device)

    def given_teacher(self, *, whole: bool = False) -> nn.Module:
        """Return the recipe's `teacher` on the device; with `whole` as a torch network, which can be exported."""
        student = seen(self.dataset.preprocess)
        classes = self.dataset.classes if self.gives_logits else None
        found = teacher_of(
            teachers_of(self.recipe), classes, student, trust_code=self.trust_code, whole=whole, outputs=self.served
        )
        place_(found.requires_grad_(False), self.device)
        for batch in self.feed.calibration(LOGIT_IMAGES) if self.gives_logits else ():
            found.note_probabilities_(batch.images)
        try:
            self.check(found, logits=False)
        except ModelError as error:
            names = ", ".join(one.network for one in self.recipe.teacher)
            raise ModelError(
                f"teacher {names}: {error}; list its outputs' names in a text file and set it as `classes`"
            ) from error
        return found

    def load_source(self, directory: Path) -> nn.Module:
        """Return the source network of an artifact, the baseline of every comparison, in eval mode on the CPU."""
        if self.recipe.model is None:
            return self.given_teacher(whole=True).cpu()
        return load_float(lineage(directory)[0], trust_code=self.trust_code)

    @cached_property
    def own_metric(self) -> OwnMetric | None:
        """The recipe's own metric; raises UserError where its code is not trusted or is none."""
        if self.recipe.score is None:
            return None
        if not self.trust_code:
            raise CompressError(
                f"score: {self.recipe.score}: measuring it runs that file; read it first, then add --trust-code"
            )
        return open_metric(self.recipe.score)

    def paths(self) -> list[Path]:
        """Return the files of the validation images that can be read, in order; CompressError where they are in shards."""
        images = self.dataset.held_out
        if type(images) is not FileImages:
            raise CompressError("score: needs images in files, and these are in shards: leave it out, or unpack them")
        names = map(images.name, range(len(images)))
        return [images.root / name for name in names if name not in self.dataset.val.broken]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return score and loss of rank 0's network on all validation images, of which each rank runs a part."""
        share_(model.state_dict().values(), self.group)  # batch-norm's statistics differ between ranks
        return evaluate(model, self.feed.validation(shared=True), self.judged)

    def measure(self, model: nn.Module) -> Metrics:
        """Return a float network's stage metrics: score, loss, parameters, multiply-accumulates, size."""
        costs = count(model, self.shape)
        return {
            **self.evaluate(model),
            "params_m": costs.params / 1e6,
            "macs_m": costs.macs / 1e6,
            "size_mb": costs.params * 4 / 1e6,
        }


def _augmentation(recipe: Recipe) -> Augmentation:
    return Augmentation(**recipe.data.augment.model_dump())


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
    if ranks() > 1:
        first_decides(lambda: download(settings.name, settings.path, recipe.task))  # once
    return Run(recipe, device, rank(), ranks(), target, trust_code, verbose, gradient_group(device))
