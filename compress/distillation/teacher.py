"""The teacher of a training: the network itself on every batch, or its cached logits for the same augmented views.

The cache's folder is named by a key over everything that the logits depend on (the teacher's weights, the data, the
augmentation, the seed), so all stages, students and searches of one `out` folder share it.
"""

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from compress.artifact import lineage, read_meta
from compress.data.batches import Batch, Views
from compress.distillation.judge import judge, judging_images, settle_
from compress.distillation.logit_cache import Layout, LogitCache
from compress.distillation.step import (
    Learner,
    Teacher,
    TeacherOutput,
    distillation,
    needs_features,
    needs_teacher,
    no_teacher,
    online_teacher,
)
from compress.distillation.taps import tap
from compress.errors import CompressError
from compress.logs.stage_log import StageLog
from compress.models.digest import teachers_digest
from compress.models.saved import ARCHITECTURE, WEIGHTS, example_images
from compress.ranks import barrier, first_decides
from compress.recipe.arguments import teachers_of
from compress.recipe.losses import LossTerm
from compress.recipe.stages import Fit, StudentStage
from compress.run import Run
from compress.tasks import Task
from compress.tasks.predictions import LOGITS
from compress.training.held import Held
from compress.training.modes import train_as_it_runs_
from export.command.files import key_of, sha256, write_json

FORMAT = 1  # of the cached views; raise it when views are drawn in another way
PROBE_IMAGES = 32  # whose logits are computed again and compared each time a cache is opened
# Largest RMS difference of the probe, in standard deviations of the logits: float16 and another GPU stay far below.
MAX_DISTANCE = 0.05
PATIENCE_S = 30.0  # where a cache is expected to take longer, each view is printed, else only logged


@dataclass(frozen=True)
class Teaching:
    """A teacher, and the number of views that it has logits for; None if it takes any image."""

    teacher: Teacher
    views: int | None
    network: nn.Module | None = None


def distil(
    run: Run,
    student: nn.Module,
    terms: Sequence[LossTerm],
    settings: Fit,
    *,
    src: Path,
    log: StageLog,
    phase: str,
    before_step: Callable[[nn.Module, float], None] | None = None,
    start: nn.Module | None = None,
    views: Tensor | None = None,
) -> nn.Module:
    """Train the student with the teacher of the artifact `src` and return it, or `start` if the training did not help.

    `start` is the student as it is given, unless it says otherwise; where that was never trained, the last epoch is returned.
    After each epoch of the second half batch-norms take their statistics from `views` (n, channels, height, width), if that helps.
    """
    task, images = run.learned, run.dataset.with_unlabelled
    run = replace(run, opened=lambda: images)
    teaching = teach(run, src, terms, settings, log)
    held = _held(run, task, src, terms, copy.deepcopy(student) if start is None else start, teaching, views, log)
    shown = example_images(run.shape, run.device)
    plain = not isinstance(student, fx.GraphModule)  # which is a graph of the eval mode already
    values = not (task.output.has_classes and task.supervised)  # its outputs themselves are learned
    if plain and (how := train_as_it_runs_(student, shown, values=values)):
        log.note(f"{phase}: the student {how}" if phase != log.stage else f"the student {how}")
    learner, step = distillation(
        terms, task, student=student, teacher=teaching.teacher, images=shown, seed=run.recipe.seed
    )
    return run.fit(
        learner, step, settings, log=log, phase=phase, views=teaching.views, before_step=before_step, held=held
    ).student


def _held(
    run: Run,
    task: Task,
    src: Path,
    terms: Sequence[LossTerm],
    start: nn.Module,
    teaching: Teaching,
    views: Tensor | None,
    log: StageLog,
) -> Held | None:
    """Return what judges the training; None for a student with random weights, which any training helps."""
    meta = read_meta(src)
    if meta.stage == "student" and not StudentStage.model_validate(meta.section).is_trained:
        return None
    images, held_out = judging_images(len(run.dataset.train), seed=run.recipe.seed)
    how = "held out" if held_out else "too few to hold out, so they are trained on as well"
    log.note_detail(f"judged on {len(images):,} training images, {how}")
    loss = judge(run, task, terms, lambda: teaching.network or run.teacher(src), images)
    settle = None if views is None else partial(settle_, loss=loss, images=views)
    return Held(Learner(start, tap(start, ()), (), ()), images if held_out else (), loss, settle)


def teach(run: Run, src: Path, terms: Sequence[LossTerm], settings: Fit, log: StageLog) -> Teaching:
    """Return the recipe's teacher; compute a cached one's logits for all views of the training first.

    Raises CompressError where the disk has no room for the logits.
    """
    if not needs_teacher(terms):
        return Teaching(no_teacher, None)
    asked = run.recipe.teaching
    fills_disk = max([len(run.output_shape), *(len(one.shape) for one in run.dataset.outputs)]) > 1  # maps and anchors
    if asked.mode == "online" or needs_features(terms) or fills_disk:
        network = run.teacher(src)
        return Teaching(online_teacher(network, terms), None, network)
    views = min(asked.views, settings.epochs)
    cached = _CachedTeacher.about(run, src, log)
    cache = cached.filled(views)

    def answer(batch: Batch) -> TeacherOutput:
        return TeacherOutput(cache.logits(_views(batch)).to(batch.images.device, non_blocking=True), {})

    return Teaching(answer, views, cached.network)


def _views(batch: Batch) -> Views:
    assert batch.views is not None, "a training batch names its views"
    return batch.views


@dataclass(frozen=True)
class _CachedTeacher:
    """A teacher and the cache of its logits; each rank computes a part of the missing ones."""

    run: Run
    network: nn.Module
    cache: LogitCache
    log: StageLog

    @classmethod
    def about(cls, run: Run, src: Path, log: StageLog) -> "_CachedTeacher":
        """Open the cache of the teacher of the artifact `src`."""
        facts = first_decides(lambda: _facts(run, lineage(src)[0]))
        classes, top_k = run.num_classes or run.output_shape[0], run.recipe.teaching.top_k
        assert classes is not None, "an output that is cached has a fixed size"
        layout = Layout(len(run.dataset.train), classes, top_k if top_k and top_k < classes else None)
        cache = LogitCache(Path(run.recipe.out) / LOGITS / key_of(facts), layout)
        if run.rank == 0:
            cache.folder.mkdir(parents=True, exist_ok=True)
            write_json(cache.folder / "about.json", facts)
        return cls(run, run.teacher(src), cache, log)

    def filled(self, views: int) -> LogitCache:
        """Compute what is missing of the first `views` views and return the cache."""
        with self.cache.lock() if self.run.rank == 0 else nullcontext():
            missing = first_decides(lambda: self.missing(views))
            if missing:
                expected_s = self.announce(missing, views)
                tell = self.log.note if expected_s > PATIENCE_S else self.log.note_detail
                started = time.monotonic()
                for done, view in enumerate(missing, start=1):
                    self.fill(view)
                    left_s = (time.monotonic() - started) / done * (len(missing) - done)
                    tell(f"teacher: logits of view {view + 1} of {views} done, {left_s:,.0f} s left")
        return self.cache

    def missing(self, views: int) -> list[int]:
        """Return the missing views; all of them if the cached logits are not the teacher's."""
        if self.cache.has(0) and not self.replays():
            self.log.note("teacher: the cached logits are not what the network computes now; they are made again")
            self.cache.clear()
        return [view for view in range(views) if not self.cache.has(view)]

    def replays(self) -> bool:
        """Tell whether the teacher computes the cached logits again for a few images: a last guard against stale ones."""
        layout = self.cache.layout
        for batch in self.batches(0, torch.arange(min(PROBE_IMAGES, layout.images))):
            logits = layout.unpack(layout.pack(self.logits(batch)))
            distance = (logits - self.cache.logits(_views(batch))).square().mean().sqrt()
            return bool(distance <= MAX_DISTANCE * logits.std())  # False also for NaN, an image that was never read
        return True

    def announce(self, missing: Sequence[int], views: int) -> float:
        """Log the logits' expected bytes and seconds, return the seconds; raise CompressError where there is no room."""
        layout, folder = self.cache.layout, self.cache.folder
        size, free = len(missing) * layout.bytes_per_view, shutil.disk_usage(folder).free
        if size > free:
            raise CompressError(
                f"{folder}: the teacher's logits need {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free: "
                "free some space, set teaching.top_k or fewer teaching.views, or teaching.mode: online"
            )
        batch_size = min(self.run.recipe.data.eval_batch_size, layout.images)
        batch = next(self.batches(missing[0], torch.arange(batch_size)))
        self.logits(batch)  # the first call is slower
        started = time.monotonic()
        self.logits(batch)
        speed = self.run.ranks * len(batch.targets) / (time.monotonic() - started)
        expected_s = len(missing) * layout.images / speed
        self.log.note(
            f"teacher: logits for {views} views of {layout.images:,} images, computed once; {len(missing)} views missing: "
            f"{size / 1e6:,.1f} MB, about {expected_s:,.0f} s"
        )
        return expected_s

    def fill(self, view: int) -> None:
        """Compute one view's logits, a part on each rank; rank 0 gives it its name when all parts are written."""
        rank, layout = self.run.rank, self.cache.layout
        if rank == 0:
            self.cache.begin(view)
        barrier()
        part = torch.arange(layout.images).tensor_split(self.run.ranks)[rank]
        with self.cache.writing(view) as records:
            records["logits"][part.numpy()] = np.nan  # marks images that cannot be read now
            for batch in self.batches(view, part):
                records[_views(batch).indices.numpy()] = layout.pack(self.logits(batch))
        barrier()
        if rank == 0:
            self.cache.finish(view)
        barrier()

    def batches(self, view: int, indices: torch.Tensor) -> Iterator[Batch]:
        """Yield one view's training images by index, without broken ones."""
        return self.run.feed.view(view, indices.split(self.run.recipe.data.eval_batch_size))

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Run the network; return logits (n, classes), float32 on the CPU."""
        device = self.run.device.type
        bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits: torch.Tensor = self.network(batch.images)
        return logits.float().cpu()


def _facts(run: Run, source: Path) -> dict[str, object]:
    """Return everything that the cached logits depend on: their cache key."""
    return {
        "format": FORMAT,
        "teacher": teachers_digest(teachers_of(run.recipe))
        if run.recipe.teacher
        else {name: sha256(source / name) for name in (ARCHITECTURE, WEIGHTS)},
        "data": run.dataset.digest,
        "images": len(run.dataset.train),
        "augment": run.recipe.data.augment.model_dump(mode="json"),
        "seed": run.recipe.seed,
        "device": run.device.type,
        "top_k": run.recipe.teaching.top_k,
    }
