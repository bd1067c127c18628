"""The training loop. Plain training, distillation and quantization-aware training differ by the step they pass in, never by a copy of it."""

import bisect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compress.data.batches import Batch
from compress.errors import CompressError
from compress.log import StageLog
from compress.recipe import Fit

Step = Callable[[nn.Module, Batch, float], dict[str, Tensor]]  # (model, batch, part of the training that is done)
Network = TypeVar("Network", bound=nn.Module)
CHECKPOINT_EVERY_S = 20.0


@dataclass(frozen=True)
class Loop:
    """What surrounds the step."""

    batches: Callable[[int], Iterator[Batch]]  # epoch -> this rank's batches, a pure function of the epoch
    steps_per_epoch: int
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    log: StageLog
    checkpoint: Path
    device: torch.device
    ranks: int
    seed: int
    phase: str
    before_step: Callable[[nn.Module, float], None] | None = (
        None  # (model in training mode, part of the training that is done)
    )
    after_backward: Callable[[nn.Module], None] | None = None


def precision_of(settings: Fit, device: torch.device) -> torch.dtype | None:
    """Return the autocast type, None for plain float32."""
    if settings.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if settings.precision == "bf16" else None


def learning_rate(settings: Fit, step: int, steps_per_epoch: int) -> float:
    """Return the rate of a step: linear warm-up, then a factor at each milestone or a cosine to zero (Loshchilov & Hutter 2017, eq. 5)."""
    warm_up, total = settings.warmup_epochs * steps_per_epoch, settings.epochs * steps_per_epoch
    if step < warm_up:
        return settings.lr * (step + 1) / warm_up
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
    so a run that was killed goes on from its checkpoint to the same bits. Raises CompressError when the loss is no longer finite.
    """
    model = place_(model, loop.device)
    optimizer = make_optimizer(model, settings)
    average = _average(model, settings)
    done = _resume(loop.checkpoint, model, optimizer, average)
    wrapped = _wrap(model, settings, loop)
    loop.log.start(epochs=settings.epochs, batches=loop.steps_per_epoch, done=done, phase=loop.phase)
    saved_at = time.monotonic()
    for epoch in range(done, settings.epochs):
        torch.manual_seed(hash((loop.seed, epoch)) % 2**63)  # dropout
        measurements = _epoch(wrapped, model, step, settings, loop, optimizer, average, epoch)
        result = cast(Network, average.module) if average else model
        measurements |= loop.evaluate(result)
        loop.log.epoch(measurements)
        if not math.isfinite(measurements["loss"]):
            raise CompressError(
                f"{loop.phase}: the loss is {measurements['loss']} in epoch {epoch + 1}; lower fit.lr or set fit.clip_norm"
            )
        if loop.log.enabled and epoch + 1 < settings.epochs and time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
            _save(loop.checkpoint, epoch + 1, model, optimizer, average)
            saved_at = time.monotonic()
    return (cast(Network, average.module) if average else model).eval()


def _epoch(
    wrapped: nn.Module,
    model: nn.Module,
    step: Step,
    settings: Fit,
    loop: Loop,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    epoch: int,
) -> dict[str, float]:
    """Train one epoch; return the means of the step's measurements, the rate and the speed."""
    dtype, total = precision_of(settings, loop.device), settings.epochs * loop.steps_per_epoch
    sums: dict[str, Tensor] = {}
    images, started, rate = 0, time.perf_counter(), 0.0
    model.train()
    for index, batch in enumerate(loop.batches(epoch), start=epoch * loop.steps_per_epoch):
        rate = learning_rate(settings, index, loop.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if loop.before_step:
            loop.before_step(model, index / total)
        with torch.autocast(loop.device.type, dtype, enabled=dtype is not None):
            measured = step(wrapped, batch, index / total)
        measured["loss"].backward()
        if loop.after_backward:
            loop.after_backward(model)
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.update_parameters(model)
        for name, value in measured.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        images += len(batch.images) * loop.ranks
        loop.log.batch(images=len(batch.images) * loop.ranks, loss=measured["loss"].detach())
    means = {name: float(value) / loop.steps_per_epoch for name, value in sums.items()}
    return means | {"lr": rate, "images_per_s": images / (time.perf_counter() - started)}


def _average(model: nn.Module, settings: Fit) -> AveragedModel | None:
    if not settings.ema_decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)


def _wrap(model: nn.Module, settings: Fit, loop: Loop) -> nn.Module:
    """Return what the step calls: the model itself, distributed or compiled around the same parameters."""
    wrapped = model
    if loop.ranks > 1:
        wrapped = DistributedDataParallel(
            wrapped, device_ids=[loop.device.index] if loop.device.type == "cuda" else None
        )
    return torch.compile(wrapped) if settings.compile else wrapped  # type: ignore[return-value]


def _save(
    path: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None
) -> None:
    state = {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if average:
        state["average"] = average.state_dict()
    aside = path.with_suffix(".partial")
    with aside.open("wb") as file:  # torch hides what went wrong with a path of its own, such as a full disk
        torch.save(state, file)
    aside.rename(path)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None) -> int:
    """Load the checkpoint of a run that was killed, if there is one; return the epochs it has behind it."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average:
        average.load_state_dict(state["average"])
    return int(state["epoch"])
