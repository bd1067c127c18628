"""The training loop. Plain training, distillation and quantization-aware training differ by the step they pass in, never by a copy of it."""

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

from compress.artifact import write_json
from compress.data.batches import Batch
from compress.errors import CompressError
from compress.log import StageLog
from compress.ranks import first_decides, gather, rank
from compress.recipe.stages import Fit
from compress.training import compilation
from compress.training.checkpoint import Progress, Snapshot, State
from compress.training.guards import is_out_of_memory, not_finite, record_, stop_reason
from compress.training.speed import AUTOCAST, Pace, thread_limit
from compress.training.sync_batchnorm import synchronized

Step = Callable[[nn.Module, Batch, float], dict[str, Tensor]]  # (model, batch, part of the training that is done)
Network = TypeVar("Network", bound=nn.Module)
Result = TypeVar("Result")
CHECKPOINT_EVERY_S = 20.0
CHECK_EVERY_STEPS = 100  # whether the loss is still finite
MAX_RETURNS = 3  # to the last good epoch


@dataclass(frozen=True)
class Loop:
    """What surrounds the step."""

    batches: Callable[[int], Iterator[Batch]]  # epoch -> this rank's batches, a pure function of the epoch
    steps_per_epoch: int
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    metric: str  # what `evaluate` calls "score", for readers
    log: StageLog
    checkpoint: Path
    summary: Path  # JSON: how far the training came and what happened to it
    device: torch.device
    ranks: int
    seed: int
    phase: str
    group: dist.ProcessGroup | None = (
        None  # of several ranks, what they share gradients through; None is the default one
    )
    before_step: Callable[[nn.Module, float], None] | None = (
        None  # (model in training mode, part of the training that is done)
    )
    after_backward: Callable[[nn.Module], None] | None = None
    left_out: Callable[[], int] = lambda: 0  # how many training images could not be read so far


def learning_rate(settings: Fit, step: int, steps_per_epoch: int) -> float:
    """Return the rate of a step: linear warm-up, then a factor at each milestone or a cosine to zero (Loshchilov & Hutter 2017, eq. 5)."""
    warm_up, total = settings.warmup_epochs * steps_per_epoch, settings.epochs * steps_per_epoch
    if step < warm_up:
        return settings.lr * min((step + 1) / warm_up, 1.0)
    if settings.schedule == "step":
        return settings.lr * settings.gamma ** bisect.bisect_right(settings.milestones, step // steps_per_epoch)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))


def make_optimizer(model: nn.Module, settings: Fit) -> torch.optim.Optimizer:
    """Return the optimizer; biases, batch-norms and other vectors have no weight decay unless the settings say so."""
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


def place_(model: Network, device: torch.device) -> Network:
    """Move a network to its device in channels_last: up to eight times faster convolutions on a CPU, tensor cores on a GPU."""
    return model.to(device).to(memory_format=torch.channels_last)


def fit(model: Network, step: Step, settings: Fit, loop: Loop) -> Network:
    """Train `model` and return it in eval mode on its device, or its moving average where the settings ask for one.

    `step` returns one dictionary of measurements whose "loss" is minimized. Every view, dropout and shuffle is a function of (seed, epoch),
    so a run that was killed goes on from its checkpoint to the same bits. Raises CompressError when the loss is not finite whatever the rate,
    and when memory does not suffice for one image.
    """
    model = place_(model, loop.device)
    progress = Progress(micro_batches=settings.micro_batches)
    state = State(model, make_optimizer(model, settings), _average(model, settings), progress)
    state.resume_(loop.checkpoint)
    progress, stopped = state.progress, None
    loop.log.start(epochs=settings.epochs, batches=loop.steps_per_epoch, done=progress.epoch, phase=loop.phase)
    saved_at = time.monotonic()
    started = saved_at - progress.seconds
    synchronizing = synchronized(model, loop.group) if settings.sync_batchnorm and loop.ranks > 1 else nullcontext()
    with thread_limit() as threads, synchronizing:
        pace = _pace(step, settings, loop, state, threads)
        if pace.begin_() and loop.log.enabled:
            state.save(loop.checkpoint)
        wrapped = _wrap(step, settings, loop, state)
        while progress.epoch < settings.epochs and stopped is None:
            measurements = _good_epoch(wrapped, step, settings, loop, state)
            loop.log.epoch(measurements)
            progress.seconds = time.monotonic() - started
            score = measurements["score"]
            record_(progress, score, settings.stop)
            stopped = first_decides(partial(stop_reason, settings.stop, progress, score, metric=loop.metric))
            if stopped is None:
                pace.after_epoch_(measurements["images_per_s"])
            due = progress.epoch < settings.epochs and time.monotonic() - saved_at > CHECKPOINT_EVERY_S
            if loop.log.enabled and due:
                state.save(loop.checkpoint)
                saved_at = time.monotonic()
    if stopped is not None:
        _tell(
            f"stopped after epoch {progress.epoch} of {settings.epochs}, whose network is kept: {stopped}", loop, state
        )
    if left_out := loop.left_out():
        _tell(f"training images that cannot be read were left out: {left_out:,}", loop, state)
    if loop.log.enabled:
        write_json(
            loop.summary, {"phase": loop.phase, "epochs": settings.epochs, "stopped": stopped, **asdict(progress)}
        )
    return cast(Network, state.result).eval()


def _good_epoch(wrapped: nn.Module, step: Step, settings: Fit, loop: Loop, state: State) -> dict[str, float]:
    """Train and evaluate one epoch; where a number is not finite, go back to its start, halve the rate and train it again."""
    good = state.snapshot()
    while True:
        measurements = _within_memory(lambda: _epoch(wrapped, step, settings, loop, state), good, settings, loop, state)
        if math.isfinite(measurements["loss"]):
            measurements |= _evaluate(loop, state)
        broken = not_finite(measurements)
        if not any(gather(broken is not None)):
            return measurements
        place, progress = f"{broken or 'a loss is not finite'} in epoch {state.progress.epoch + 1}", state.progress
        if progress.returns == MAX_RETURNS:
            raise CompressError(
                f"{loop.phase}: {place}, also at 1/{2**MAX_RETURNS} of the rate; lower fit.lr or set fit.clip_norm"
            )
        progress.returns += 1
        _tell(f"{place}: back to its start and on at half the rate ({progress.returns} of {MAX_RETURNS})", loop, state)
        state.restore_(good)
        loop.log.epoch_again()


def _evaluate(loop: Loop, state: State) -> Mapping[str, float]:
    try:
        return loop.evaluate(state.result)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CompressError(f"{loop.phase}: out of memory in the evaluation; lower data.eval_batch_size") from error


def _within_memory(attempt: Callable[[], Result], good: Snapshot, settings: Fit, loop: Loop, state: State) -> Result:
    """Return what the attempt returns; where memory runs out, go back to the snapshot and attempt it with micro-batches of half the size."""
    while True:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Not inside `except`, where the error still holds the step's tensors.
        progress = state.progress
        images = math.ceil(settings.batch_size / loop.ranks / progress.micro_batches)
        place = f"out of memory in epoch {progress.epoch + 1} with {images} {'image' if images == 1 else 'images'} at a time"
        if images == 1:
            raise CompressError(f"{loop.phase}: {place}; take smaller images (data.image_size) or a smaller network")
        if loop.ranks > 1:  # the others wait for this rank's gradient
            raise CompressError(f"{loop.phase}: {place}; set fit.micro_batches: {2 * progress.micro_batches}")
        progress.micro_batches *= 2
        _tell(
            f"{place}: its start again, each batch in {progress.micro_batches} micro-batches from here on", loop, state
        )
        state.restore_(good)
        gc.collect()
        torch.cuda.empty_cache()
        loop.log.epoch_again()


def _tell(text: str, loop: Loop, state: State) -> None:
    """Note what happened, for the log and for the report."""
    state.progress.events.append(text)
    _note(text, loop)


def _note(text: str, loop: Loop) -> None:
    loop.log.note(f"{loop.phase}: {text}" if loop.phase != loop.log.stage else text)


def _epoch(wrapped: nn.Module, step: Step, settings: Fit, loop: Loop, state: State) -> dict[str, float]:
    """Train one epoch; return the means of the step's measurements, the rate and the speed. Ends early once the loss is not finite."""
    epoch = state.progress.epoch
    torch.manual_seed(hash((loop.seed, epoch, rank()) if rank() else (loop.seed, epoch)) % 2**63)  # dropout
    sums: dict[str, Tensor] = {}
    images, started = 0, time.perf_counter()
    state.model.train()
    for index, batch in enumerate(loop.batches(epoch), start=1):
        measured = _train_step(wrapped, batch, step, settings, loop, state, index - 1)
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
    rate = state.optimizer.param_groups[0]["lr"]
    return means | {"lr": rate, "images_per_s": images / (time.perf_counter() - started)}


def _train_step(
    wrapped: nn.Module, batch: Batch, step: Step, settings: Fit, loop: Loop, state: State, index: int
) -> dict[str, Tensor]:
    """Train on one batch, the epoch's number `index`; return the step's measurements: of several ranks, this one's part of their sum."""
    model, progress, dtype = state.model, state.progress, AUTOCAST[state.progress.precision]
    index += progress.epoch * loop.steps_per_epoch
    done = index / (settings.epochs * loop.steps_per_epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(settings, index, loop.steps_per_epoch) / 2**progress.returns
    if loop.before_step:
        loop.before_step(model, done)
    measured: dict[str, Tensor] = {}
    parts = list(batch.split(math.ceil(len(batch.images) / progress.micro_batches)))
    for number, part in enumerate(parts, start=1):
        share = len(part.images) / batch.total
        with _synchronized(wrapped, number == len(parts)):
            with torch.autocast(loop.device.type, dtype, enabled=dtype is not None):
                found = step(wrapped, part, done)
            (
                found["loss"] * (share * loop.ranks)
            ).backward()  # the ranks' gradients are averaged, whatever their shares
        for name, value in found.items():
            measured[name] = measured.get(name, 0) + value.detach() * share
    if loop.after_backward:
        loop.after_backward(model)
    if settings.clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.average:
        state.average.update_parameters(model)
    return measured


def _synchronized(wrapped: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Return the context in which gradients are shared between ranks with a batch's last part only."""
    distributed = getattr(wrapped, "_orig_mod", wrapped)  # inside torch.compile's
    return distributed.no_sync() if isinstance(distributed, DistributedDataParallel) and not last else nullcontext()


def _average(model: nn.Module, settings: Fit) -> AveragedModel | None:
    if not settings.ema_decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)


def _wrap(step: Step, settings: Fit, loop: Loop, state: State) -> nn.Module:
    """Return what the step calls: the model itself, distributed or compiled around the same parameters."""
    eager = state.model
    if loop.ranks > 1:
        devices = [loop.device.index] if loop.device.type == "cuda" else None
        eager = DistributedDataParallel(eager, device_ids=devices, process_group=loop.group)
    if not settings.compile:
        return eager
    compiled: nn.Module = torch.compile(eager)  # type: ignore[assignment]
    left = (settings.epochs - state.progress.epoch) * loop.steps_per_epoch
    with _rehearsal(step, settings, loop, state) as run_step:
        loop.log.note(compilation.compare(run_step, eager, compiled, device=loop.device, steps=left))
    return compiled


def _pace(step: Step, settings: Fit, loop: Loop, state: State, threads: int) -> Pace:
    """Return what finds out how this training runs fastest, with so many threads at most."""

    @contextmanager
    def rehearsal() -> Iterator[Callable[[], None]]:
        with _rehearsal(step, settings, loop, state) as run_step:
            yield lambda: run_step(state.model)

    return Pace(
        state.progress,
        settings,
        loop.device,
        loop.steps_per_epoch,
        threads,
        rehearsal,
        note=lambda text: _note(text, loop),
        tell=lambda text: _tell(text, loop, state),
    )


@contextmanager
def _rehearsal(step: Step, settings: Fit, loop: Loop, state: State) -> Iterator[Callable[[nn.Module], None]]:
    """Give what trains a network for one step; at the end all is as it was."""
    good, batch = state.snapshot(), next(loop.batches(state.progress.epoch))
    state.model.train()

    def run_step(network: nn.Module) -> None:
        _within_memory(lambda: _train_step(network, batch, step, settings, loop, state, 0), good, settings, loop, state)

    yield run_step
    state.restore_(good)
