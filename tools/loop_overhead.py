"""Measure what of a training's time is not the model's: data, logging, metrics, bookkeeping.

`python tools/loop_overhead.py DATA` trains a network on the image folder DATA through the product's own loop (`Run.fit`), with the images in
memory and as files with loader processes, and prints a Markdown table. The model's time is forward, loss, backward, optimizer and the release
of the gradients. What is left of an epoch's steps is the wait for data and bookkeeping; what is left of the epoch, but for its evaluation, is
a fixed cost (snapshot, log, checkpoint). The first epoch is a warm-up. A hand-written loop over ready batches runs before and after each for
comparison. On a GPU the times are CUDA events'.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import compress.data.dataset
from compress.data.batches import Batch
from compress.data.feed import Feed
from compress.distillation.step import supervised_step
from compress.logs.stage_log import StageLog, quiet_libraries
from compress.models.architectures import build
from compress.recipe.schema import Recipe
from compress.recipe.stages import Fit
from compress.run import Run, open_run
from compress.training.compilation import wait
from compress.training.device import place_
from compress.training.loop import Step, make_optimizer
from compress.training.speed import AUTOCAST, precisions
from export.images.folders import list_folder

AUGMENT = {"crop": "random_resized", "flip": True}
WARM_UP, MINIMAL_STEPS = 2, 8
TITLES = ("training", "images/s", "hand-written loop", "waiting for data, bookkeeping", "an epoch's fixed cost",
          "overhead in an epoch of DATA", "evaluation in an epoch of DATA")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One training; parts are fractions of its time without evaluations."""

    arch: str
    source: str
    image_size: int
    batch_size: int
    images_per_s: float
    minimal_images_per_s: float
    data: float  # of the time between an epoch's first batch and its last
    model: float  # of the same
    fixed_s: float  # before the first batch and after the last
    step_s: float
    evaluation_s: float  # for each image
    training_images: int  # in all of DATA
    validation_images: int

    @property
    def overhead(self) -> float:
        """The part of an epoch of all of DATA, without its evaluation, that is not the model's."""
        steps_s = self.training_images / self.batch_size * self.step_s
        return 1 - self.model * steps_s / (steps_s + self.fixed_s)

    def as_markdown(self) -> str:
        """Return a line of the table."""
        epoch_s = self.training_images / self.batch_size * self.step_s + self.fixed_s
        cells = (
            f"`{self.arch}`, {self.source}, {self.image_size} px, batch {self.batch_size}",
            f"{self.images_per_s:,.0f}",
            f"{self.minimal_images_per_s:,.0f}",
            f"{self.data:.1%}, {1 - self.data - self.model:.1%}",
            f"{self.fixed_s:.2f} s",
            f"**{self.overhead:.1%}**",
            f"{self.evaluation_s * self.validation_images / epoch_s:.1%}",
        )
        return f"| {' | '.join(cells)} |"


class Clock:
    """Adds up spans of time by name, on a GPU between points of its own stream."""

    def __init__(self, device: torch.device, seconds: Callable[[], float]) -> None:
        self.device, self.seconds_now = device, seconds
        self.clear()

    def clear(self) -> None:
        """Begin anew, now."""
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.open: dict[str, Any] = {}
        self.started = self.ended = self._now()

    def begin(self, name: str) -> None:
        """Open a span."""
        self.open[name] = self._now()

    def end(self, name: str) -> None:
        """Close it."""
        self.ended = self._now()
        if name in self.open:  # else it began before the clock did
            self.spans[name].append((self.open.pop(name), self.ended))

    def seconds(self, name: str) -> float:
        """Return the sum of a name's spans."""
        return sum(self._between(*span) for span in self.spans[name])

    def total(self) -> float:
        """Return the time from the clock's start to the last span's end."""
        return self._between(self.started, self.ended)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return self.seconds_now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start)
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def timed_run(run: Run, clock: Clock) -> Run:
    """Return the run with a clock on its batches and evaluations; the clock begins anew after the first evaluation."""
    evaluations = 0

    class Timed(Feed):
        def training(self, batch_size: int, *, epoch: int, view: int, without: Any = ()) -> Iterator[Batch]:
            clock.begin("steps")
            batches = super().training(batch_size, epoch=epoch, view=view, without=without)
            while True:
                clock.begin("data")
                batch = next(batches, None)
                clock.end("data")
                if batch is None:
                    break
                yield batch
            clock.end("steps")

        def validation(self, *, limit: int | None = None, shared: bool = False) -> Iterator[Batch]:
            nonlocal evaluations
            clock.begin("evaluation")
            yield from super().validation(limit=limit, shared=shared)
            clock.end("evaluation")
            evaluations += 1
            if evaluations == 1:
                clock.clear()

    run.__dict__["feed"] = Timed(**{field.name: getattr(run.feed, field.name) for field in fields(Feed)})
    return run


@contextmanager
def timed_optimizer(clock: Clock) -> Iterator[None]:
    """Put the clock on every optimizer's step and on the release of its gradients."""

    def zero_grad(optimizer: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        clock.begin("gradients")
        plain(optimizer, set_to_none)
        clock.end("gradients")

    plain = torch.optim.Optimizer.zero_grad
    hooks = (
        register_optimizer_step_pre_hook(lambda *_: clock.begin("optimizer")),
        register_optimizer_step_post_hook(lambda *_: clock.end("optimizer")),
    )
    torch.optim.Optimizer.zero_grad = zero_grad  # type: ignore[method-assign, assignment]
    yield
    torch.optim.Optimizer.zero_grad = plain  # type: ignore[method-assign]
    for hook in hooks:
        hook.remove()


def measure(data: Path, source: str, image_size: int, options: argparse.Namespace) -> Row:
    """Train through the product's loop, and by hand before and after it."""
    memory_bytes = 0 if source == "files" else 1 << 40
    setattr(compress.data.dataset, "MEMORY_BYTES", memory_bytes)  # noqa: B010
    recipe = recipe_for(data, image_size, options)
    seconds = time.process_time if options.cpu_time else time.perf_counter
    run = open_run(recipe, trust_code=False, verbose=False)
    clock = Clock(run.device, seconds)
    run = timed_run(run, clock)
    settings = recipe.stages[0].fit  # type: ignore[union-attr]
    assert settings is not None
    plain = supervised_step(run.task, label_smoothing=0.0)

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        clock.begin("model")
        return plain(model, batch, done)

    ready = list(itertools.islice(run.feed.training(settings.batch_size, epoch=0, view=0), 4))
    by_hand = partial(minimal_loop, run, settings, plain, ready, seconds)
    before = by_hand()
    model = build(options.arch, num_classes=len(run.dataset.classes), trust_code=False)
    with (
        tempfile.TemporaryDirectory() as folder,
        timed_optimizer(clock),
        StageLog(Path(folder), stage="source") as log,
    ):
        run.fit(model, step, settings, log=log, phase="source", after_backward=lambda _: clock.end("model"))
    after = by_hand()
    epochs, steps_s = settings.epochs - 1, clock.seconds("steps")
    steps = len(clock.spans["model"])
    train, val = whole(data)
    return Row(
        arch=options.arch.removeprefix("torchvision:"),
        source=source,
        image_size=image_size,
        batch_size=settings.batch_size,
        images_per_s=steps * settings.batch_size / steps_s,
        minimal_images_per_s=mean((before, after)),
        data=clock.seconds("data") / steps_s,
        model=sum(clock.seconds(name) for name in ("model", "optimizer", "gradients")) / steps_s,
        fixed_s=(clock.total() - steps_s - clock.seconds("evaluation")) / epochs,
        step_s=steps_s / steps,
        evaluation_s=clock.seconds("evaluation") / (epochs * len(run.dataset.val)),
        training_images=train,
        validation_images=val,
    )


def recipe_for(data: Path, image_size: int, options: argparse.Namespace) -> Recipe:
    """Return a recipe that trains the network on the folder."""
    fit = {"epochs": options.epochs, "batch_size": options.batch_size, "lr": 0.01, "compile": options.compile}
    fit |= {"precision": "auto" if torch.cuda.is_available() else "fp32"}  # the loop by hand times no precisions
    images = {"dataset": "imagefolder", "path": str(data), "image_size": image_size, "workers": options.workers}
    images |= {"limit_per_class": options.per_class, "eval_batch_size": options.batch_size, "augment": AUGMENT}
    stages = [{"stage": "source", "fit": fit}]
    return Recipe.model_validate({"name": "loop", "model": {"arch": options.arch}, "data": images, "stages": stages})


def whole(data: Path) -> tuple[int, int]:
    """Return how many training and validation images the whole folder has."""
    found = list_folder(data)
    images = len(found.train)
    return (images, len(found.val)) if found.val is not None else (round(0.8 * images), round(0.2 * images))


def minimal_loop(run: Run, settings: Fit, step: Step, ready: Sequence[Batch], seconds: Callable[[], float]) -> float:
    """Train by hand on batches that are ready; return images a second."""
    assert run.recipe.model is not None
    model = place_(build(run.recipe.model.arch, num_classes=len(run.dataset.classes), trust_code=False), run.device)
    optimizer, dtype = make_optimizer(model, settings), AUTOCAST[precisions(settings, run.device)[0]]
    called = torch.compile(model) if settings.compile else model
    model.train()
    started = 0.0
    for number in range(WARM_UP + MINIMAL_STEPS):
        if number == WARM_UP:
            wait(run.device)
            started = seconds()
        with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
            loss = step(called, ready[number % len(ready)], 0.0)["loss"]  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait(run.device)
    return MINIMAL_STEPS * settings.batch_size / (seconds() - started)


def main() -> None:
    """Measure every source and size and print the table."""
    parser = argparse.ArgumentParser(prog="python tools/loop_overhead.py", description=main.__doc__)
    parser.add_argument("data", type=Path, help="a folder of train/CLASS/* and val/CLASS/*")
    parser.add_argument("--arch", default="torchvision:resnet18", help="the network (torchvision:resnet18)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 48, 64], help="pixels (32 48 64)")
    parser.add_argument("--sources", nargs="+", choices=("memory", "files"), default=["memory", "files"])
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step (64)")
    parser.add_argument("--epochs", type=int, default=3, help="the first is a warm-up (3)")
    parser.add_argument("--per-class", type=int, help="training images of each class (all)")
    parser.add_argument("--workers", type=int, help="loader processes (one for each core)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's own seconds, on a machine busy with other things; waiting is not seen",
    )
    parser.add_argument("--compile", action="store_true", help="through torch.compile, the hand-written loop too")
    options = parser.parse_args()
    quiet_libraries(False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    say(
        f"{device}; torch {torch.__version__}; {options.epochs - 1} epochs of {options.per_class or 'all'} images a class\n"
    )
    say(f"| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}")
    for source in options.sources:
        for image_size in options.sizes:
            say(measure(options.data, source, image_size, options).as_markdown())


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
