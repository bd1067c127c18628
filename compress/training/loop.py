"""The one training loop. Plain training, distillation and quantization-aware training each pass in their own step."""

import bisect
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compress.data.batches import Batch
from compress.errors import CompressError
from compress.logs.stage_log import StageLog
from compress.ranks import first_decides, gather, rank
from compress.recipe.stages import Fit
from compress.training import compilation
from compress.training.checkpoint import Progress, Snapshot, State
from compress.training.device import Network, place_
from compress.training.guards import (
    NotFiniteError,
    batch_norm_named,
    is_out_of_memory,
    not_finite,
    record_,
    stop_reason,
)
from compress.training.held import Held, Losses
from compress.training.shares import shared
from compress.training.speed import AUTOCAST, Pace, thread_limit
from compress.training.sync_batchnorm import synchronized
from export.command.files import write_json

Step = Callable[[nn.Module, Batch, float], dict[str, Tensor]]  # (model, batch, fraction of the training done)
Result = TypeVar("Result")
CHECKPOINT_EVERY_S = 20.0
CHECK_EVERY_STEPS = 100  # that the loss is finite
MAX_ROLLBACKS = 3


@dataclass(frozen=True)
class Loop:
    """What a training takes from the run: data, evaluation, log, device, ranks."""

    batches: Callable[[int], Iterator[Batch]]  # (epoch) to this rank's batches, the same each time
    steps_per_epoch: int
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    metric: str  # title of what `evaluate` returns as "score"
    log: StageLog
    checkpoint: Path
    summary: Path  # JSON: the training's progress and events
    device: torch.device
    ranks: int
    seed: int
    phase: str
    group: dist.ProcessGroup | None = None  # in which ranks share gradients; None is torch's default group
    before_step: Callable[[nn.Module, float], None] | None = None  # (model, fraction of the training done)
    after_backward: Callable[[nn.Module], None] | None = None
    left_out: Callable[[], int] = lambda: 0  # number of training images that could not be read so far
    held: Held | None = None


def learning_rate(settings: Fit, step: int, steps_per_epoch: int) -> float:
    """Return a step's rate: linear warm-up, then milestones or a cosine to 0 (Loshchilov & Hutter 2017, eq. 5)."""
    warm_up, total = settings.warmup_epochs * steps_per_epoch, settings.epochs * steps_per_epoch
    if step < warm_up:
        return settings.lr * min((step + 1) / warm_up, 1.0)
    if settings.schedule == "step":
        return settings.lr * settings.gamma ** bisect.bisect_right(settings.milestones, step // steps_per_epoch)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))


def make_optimizer(model: nn.Module, settings: Fit) -> torch.optim.Optimizer:
    """Return the optimizer; biases, batch-norms and other vectors have no weight decay unless `decay_vectors` is set."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {
            "params": [p for p in parameters if p.dim() <= 1],
            "weight_decay": settings.weight_decay if settings.decay_vectors else 0.0,
        },
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    nesterov = settings.nesterov and settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True)


def fit(model: Network, step: Step, settings: Fit, loop: Loop) -> Network:
    """Train `model` and return it in eval mode on its device, or its moving average where the settings ask for one.

    With `loop.held`, return what `Held.chosen_` gives instead: an epoch's network, or the one that it started from.
    `step` returns a dictionary of measurements whose "loss" is minimized; they add up over the parts of a batch that is
    split (`Batch.share`). Every view, dropout and shuffle is a function of (seed, epoch), so a run that was killed continues
    from its checkpoint to the same bits. Where the loss stays not finite after MAX_ROLLBACKS rollbacks, a training with
    `loop.held` ends; raises CompressError without it, and where memory does not suffice for one image.
    """
    model = place_(model, loop.device)
    progress = Progress(micro_batches=settings.micro_batches)
    state = State(model, make_optimizer(model, settings), _average(model, settings), progress)
    state.resume_(loop.checkpoint)
    progress, stopped = state.progress, None
    training = _Training(step, settings, loop, state)
    loop.log.start(epochs=settings.epochs, batches=loop.steps_per_epoch, done=progress.epoch, phase=loop.phase)
    if loop.held:
        loop.held.begin_(state)
    saved_at = time.monotonic()
    started = saved_at - progress.seconds
    synchronizing = synchronized(model, loop.group) if settings.sync_batchnorm and loop.ranks > 1 else nullcontext()
    with thread_limit() as threads, synchronizing:
        pace = training.pace(threads)
        if pace.begin_() and loop.log.enabled:
            state.save(loop.checkpoint)
        wrapped = training.wrap()
        while progress.epoch < settings.epochs and stopped is None:
            try:
                measurements, losses = training.good_epoch(wrapped)
            except NotFiniteError as error:
                if loop.held is None:
                    raise
                stopped = str(error).removeprefix(f"{loop.phase}: ")
                break
            loop.log.epoch(measurements)
            progress.seconds = time.monotonic() - started
            score = measurements["score"]
            record_(progress, score, settings.stop)
            if loop.held and losses:
                loop.held.judge_(state, losses)
            stopped = first_decides(
                partial(stop_reason, settings.stop, progress, score, metric=loop.metric, epochs=settings.epochs)
            )
            if stopped is None:
                pace.after_epoch_(measurements["images_per_s"])
            goes_on = stopped is None and progress.epoch < settings.epochs
            if loop.log.enabled and goes_on and time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                state.save(loop.checkpoint)
                saved_at = time.monotonic()
    if stopped is not None:
        which = "" if loop.held else ", whose network is kept"
        training.tell(f"stopped after epoch {progress.epoch} of {settings.epochs}{which}: {stopped}")
    chosen, said = loop.held.chosen_(state) if loop.held else (state.result, "")
    if chosen is not state.result:
        training.tell(said)
    elif said:
        training.note(said)
    if left_out := loop.left_out():
        training.tell(f"training images that cannot be read were left out: {left_out:,}")
    if loop.log.enabled:
        write_json(
            loop.summary, {"phase": loop.phase, "epochs": settings.epochs, "stopped": stopped, **asdict(progress)}
        )
    return cast(Network, chosen).eval()


@dataclass(frozen=True)
class _Training:
    """A training's parts. `wrapped` is the network that the step calls: itself, distributed or compiled."""

    step: Step
    settings: Fit
    loop: Loop
    state: State

    def good_epoch(self, wrapped: nn.Module) -> tuple[dict[str, float], Losses | None]:
        """Train one epoch, and return its measurements and held-out losses; where one is not finite, repeat it at half the rate."""
        loop, progress, good = self.loop, self.state.progress, self.state.snapshot()
        while True:
            measurements, losses = self.within_memory(lambda: self.epoch(wrapped), good), None
            if math.isfinite(measurements["loss"]):
                more, losses = self.evaluate()
                measurements |= more
            broken = not_finite(measurements)
            if not any(gather(broken is not None)):
                return measurements, losses
            place = f"{broken or 'a loss is not finite'} in epoch {progress.epoch + 1}"
            if progress.rollbacks == MAX_ROLLBACKS:
                self.state.restore_(good)
                raise NotFiniteError(
                    f"{loop.phase}: {place}, also at 1/{2**MAX_ROLLBACKS} of the rate; lower fit.lr or set fit.clip_norm"
                )
            progress.rollbacks += 1
            self.tell(f"{place}: rolled back to its start, at half the rate ({progress.rollbacks} of {MAX_ROLLBACKS})")
            self.state.restore_(good)
            loop.log.epoch_again()

    def evaluate(self) -> tuple[Mapping[str, float], Losses | None]:
        """Return the validation measurements of what the training would give now, and its losses on held-out images."""
        result, held = self.state.result, self.loop.held
        try:
            later = 2 * (self.state.progress.epoch + 1) > self.settings.epochs
            losses = (held.settle if held.settle and later else held.losses)(result) if held else None
            measurements = self.loop.evaluate(result)
            return {**measurements, **({"held_out_loss": losses.value} if losses else {})}, losses
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise CompressError(
                f"{self.loop.phase}: out of memory in the evaluation; lower data.eval_batch_size"
            ) from error

    def within_memory(self, attempt: Callable[[], Result], good: Snapshot) -> Result:
        """Return `attempt()`; where memory runs out, restore the snapshot and try again with half the micro-batch size."""
        loop, progress = self.loop, self.state.progress
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Not inside `except`, where the error still holds the step's tensors.
            images = math.ceil(self.settings.batch_size / loop.ranks / progress.micro_batches)
            place = f"out of memory in epoch {progress.epoch + 1} with {images} {'image' if images == 1 else 'images'} at a time"
            if images == 1:
                raise CompressError(
                    f"{loop.phase}: {place}; take smaller images (data.image_size) or a smaller network"
                )
            if loop.ranks > 1:  # the others wait for this rank's gradient
                raise CompressError(f"{loop.phase}: {place}; set fit.micro_batches: {2 * progress.micro_batches}")
            progress.micro_batches *= 2
            self.tell(f"{place}: restarted, from now on with {progress.micro_batches} micro-batches for each batch")
            self.state.restore_(good)
            gc.collect()
            torch.cuda.empty_cache()
            loop.log.epoch_again()

    def tell(self, text: str) -> None:
        """Write an event into the log and the report."""
        self.state.progress.events.append(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line into the log."""
        loop = self.loop
        loop.log.note(f"{loop.phase}: {text}" if loop.phase != loop.log.stage else text)

    def epoch(self, wrapped: nn.Module) -> dict[str, float]:
        """Train one epoch, or until its loss is not finite; return the step's mean measurements, the rate and the speed."""
        loop, epoch = self.loop, self.state.progress.epoch
        torch.manual_seed(hash((loop.seed, epoch, rank()) if rank() else (loop.seed, epoch)) % 2**63)  # dropout
        sums: dict[str, Tensor] = {}
        images, started = 0, time.perf_counter()
        self.state.model.train()
        for index, batch in enumerate(loop.batches(epoch), start=1):
            measured = self.train_step(wrapped, batch, index - 1)
            for name, value in measured.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value
            images += batch.total
            loop.log.batch(images=batch.total, loss=measured["loss"] * loop.ranks)
            if index % CHECK_EVERY_STEPS == 0:  # reading it waits for the GPU
                broken = not math.isfinite(sums["loss"])
                if any(gather(broken)):
                    break
        of_all = zip(*gather([float(value) for value in sums.values()]), strict=True)
        means = {name: sum(parts) / loop.steps_per_epoch for name, parts in zip(sums, of_all, strict=True)}
        rate = self.state.optimizer.param_groups[0]["lr"]
        return means | {"lr": rate, "images_per_s": images / (time.perf_counter() - started)}

    def train_step(self, wrapped: nn.Module, batch: Batch, index: int) -> dict[str, Tensor]:
        """Train on the epoch's batch number `index`; return the step's measurements, which add up over ranks."""
        loop, settings, state = self.loop, self.settings, self.state
        model, progress, dtype = state.model, state.progress, AUTOCAST[state.progress.precision]
        index += progress.epoch * loop.steps_per_epoch
        done = index / (settings.epochs * loop.steps_per_epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(settings, index, loop.steps_per_epoch) / 2**progress.rollbacks
        if loop.before_step:
            loop.before_step(model, done)
        measured: dict[str, Tensor] = {}
        split = list(batch.split(math.ceil(len(batch.images) / progress.micro_batches)))
        parts = shared(split, ranks=loop.ranks, group=loop.group)
        for number, part in enumerate(parts, start=1):
            named = batch_norm_named(loop.phase, part.images)
            with _synchronized(wrapped, number == len(parts)), named:
                with torch.autocast(loop.device.type, dtype, enabled=dtype is not None):
                    found = self.step(wrapped, part, done)
                (found["loss"] * loop.ranks).backward()  # DDP averages gradients over ranks, whatever their shares
            for name, value in found.items():
                measured[name] = measured.get(name, 0) + value.detach()
        if loop.after_backward:
            loop.after_backward(model)
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if state.average:
            state.average.update_parameters(model)
        return measured

    def wrap(self) -> nn.Module:
        """Return the network that the step calls: the model itself, distributed or compiled around the same parameters."""
        loop, eager = self.loop, self.state.model
        if loop.ranks > 1:
            devices = [loop.device.index] if loop.device.type == "cuda" else None
            eager = DistributedDataParallel(eager, device_ids=devices, process_group=loop.group)
        if not self.settings.compile:
            return eager
        compiled: nn.Module = torch.compile(eager)  # type: ignore[assignment]
        left = (self.settings.epochs - self.state.progress.epoch) * loop.steps_per_epoch
        with self.rehearsal() as run_step:
            loop.log.note(compilation.compare(run_step, eager, compiled, device=loop.device, steps=left))
        return compiled

    def pace(self, threads: int) -> Pace:
        """Return the object that finds the fastest precision and number of threads, at most `threads`."""

        @contextmanager
        def rehearsal() -> Iterator[Callable[[], None]]:
            with self.rehearsal() as run_step:
                yield lambda: run_step(self.state.model)

        loop = self.loop
        return Pace(
            self.state.progress,
            self.settings,
            loop.device,
            loop.steps_per_epoch,
            threads,
            rehearsal,
            note=self.note,
            tell=self.tell,
        )

    @contextmanager
    def rehearsal(self) -> Iterator[Callable[[nn.Module], None]]:
        """Give a function that trains a network for one step; restore everything at the end."""
        good, batch = self.state.snapshot(), next(self.loop.batches(self.state.progress.epoch))
        self.state.model.train()

        def run_step(network: nn.Module) -> None:
            self.within_memory(lambda: self.train_step(network, batch, 0), good)

        yield run_step
        self.state.restore_(good)


def _synchronized(wrapped: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Return the context in which ranks share gradients after a batch's last micro-batch only."""
    distributed = getattr(wrapped, "_orig_mod", wrapped)  # inside torch.compile's
    return distributed.no_sync() if isinstance(distributed, DistributedDataParallel) and not last else nullcontext()


def _average(model: nn.Module, settings: Fit) -> AveragedModel | None:
    if not settings.ema_decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)
