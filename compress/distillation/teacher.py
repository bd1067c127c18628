"""Who teaches a training: the teacher itself on every batch, or what it said before about the same views, read from a cache.

The cache's folder is named after everything the answers depend on (the teacher's weights, the data, the augmentation, the seed), so that every
stage, student and search below one `out` folder shares it, and nothing else can.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compress.artifact import key_of, lineage, write_json
from compress.data.batches import Batch, Views, view_batches
from compress.distillation.logit_cache import Layout, LogitCache
from compress.distillation.step import (
    Teacher,
    TeacherAnswer,
    distillation,
    needs_features,
    needs_teacher,
    no_teacher,
    online_teacher,
)
from compress.errors import CompressError
from compress.log import StageLog
from compress.models.digest import teachers_digest
from compress.models.saved import ARCHITECTURE, WEIGHTS, example_images
from compress.ranks import barrier, first_decides
from compress.recipe.arguments import teachers_of
from compress.recipe.losses import LossTerm
from compress.recipe.stages import Fit
from compress.run import Run
from export.command.files import sha256

FORMAT = 1  # of the cached views; a change of how views are drawn must change it
PROBE_IMAGES = 32  # answered anew each time a cache is opened, and compared
# Of the probe, root mean square, in standard deviations of the logits: float16 and another GPU stay far below.
MAX_DISTANCE = 0.05
PATIENCE_S = 30.0  # of answering, above which every view is told


@dataclass(frozen=True)
class Teaching:
    """A teacher, and the number of views that it knows; None where it answers any."""

    teacher: Teacher
    views: int | None


def distil(
    run: Run,
    student: nn.Module,
    terms: Sequence[LossTerm],
    settings: Fit,
    *,
    src: Path,
    out: Path,
    log: StageLog,
    phase: str,
    before_step: Callable[[nn.Module, float], None] | None = None,
) -> nn.Module:
    """Train the student under the teacher of the artifact `src` and return it."""
    task, run = run.learned, run.with_unlabelled()
    teaching = teach(run, src, terms, settings, log)
    images = example_images(run.image_size, run.device)
    learner, step = distillation(
        terms, task, student=student, teacher=teaching.teacher, images=images, seed=run.recipe.seed
    )
    learner = run.fit(
        learner, step, settings, out=out, log=log, phase=phase, views=teaching.views, before_step=before_step
    )
    return learner.student


def teach(run: Run, src: Path, terms: Sequence[LossTerm], settings: Fit, log: StageLog) -> Teaching:
    """Return the teacher as the recipe wants it; a cached one answers all views that the training will show before it starts.

    Raises CompressError where the disk has no room for its answers.
    """
    if not needs_teacher(terms):
        return Teaching(no_teacher, None)
    asked = run.recipe.teaching
    shape = run.task.output.output_shape(len(run.dataset.classes), run.image_size)
    if asked.mode == "online" or needs_features(terms) or len(shape) > 1:  # maps and anchors would fill the disk
        return Teaching(online_teacher(run.teacher(src), terms), None)
    views = min(asked.views, settings.epochs)
    cache = _CachedTeacher.about(run, src, log).answered(views)

    def answer(batch: Batch) -> TeacherAnswer:
        return TeacherAnswer(cache.logits(_views(batch)).to(batch.images.device, non_blocking=True), {})

    return Teaching(answer, views)


def _views(batch: Batch) -> Views:
    assert batch.views is not None, "a training batch says what it shows"
    return batch.views


@dataclass(frozen=True)
class _CachedTeacher:
    """A teacher and the cache of its logits, whose missing views it is asked for: each rank its part of the images."""

    run: Run
    network: nn.Module
    cache: LogitCache
    log: StageLog

    @classmethod
    def about(cls, run: Run, src: Path, log: StageLog) -> "_CachedTeacher":
        """Open the cache of the teacher of the artifact `src`."""
        facts = first_decides(lambda: _facts(run, lineage(src)[0]))
        classes, top_k = len(run.dataset.classes), run.recipe.teaching.top_k
        layout = Layout(len(run.dataset.train), classes, top_k if top_k and top_k < classes else None)
        cache = LogitCache(Path(run.recipe.out) / "teacher-logits" / key_of(facts), layout)
        if run.rank == 0:
            cache.folder.mkdir(parents=True, exist_ok=True)
            write_json(cache.folder / "about.json", facts)
        return cls(run, run.teacher(src), cache, log)

    def answered(self, views: int) -> LogitCache:
        """Return the cache with the first `views` views in it, the missing ones answered now."""
        with self.cache.lock() if self.run.rank == 0 else nullcontext():
            missing = first_decides(lambda: self.missing(views))
            if missing:
                expected_s = self.announce(missing, views)
                tell = self.log.note if expected_s > PATIENCE_S else self.log.note_detail
                started = time.monotonic()
                for done, view in enumerate(missing, start=1):
                    self.fill(view)
                    left_s = (time.monotonic() - started) / done * (len(missing) - done)
                    tell(f"teacher: view {view + 1} of {views} answered, {left_s:,.0f} s left")
        return self.cache

    def missing(self, views: int) -> list[int]:
        """Return the views that are not there, which are all where the teacher now says something else than it did."""
        if self.cache.has(0) and not self.replays():
            self.log.note("teacher: its answers on disk are not what it says now; they are made again")
            self.cache.clear()
        return [view for view in range(views) if not self.cache.has(view)]

    def replays(self) -> bool:
        """Tell whether the teacher still says about a few images what the cache holds: the last guard against stale answers."""
        layout = self.cache.layout
        for batch in self.batches(0, torch.arange(min(PROBE_IMAGES, layout.images))):
            said = layout.unpack(layout.pack(self.ask(batch)))
            distance = (said - self.cache.logits(_views(batch))).square().mean().sqrt()
            return bool(distance <= MAX_DISTANCE * said.std())  # NaN, a hole in the file, is no answer either
        return True

    def announce(self, missing: Sequence[int], views: int) -> float:
        """Say what the answers will cost in bytes and seconds, and return the seconds; raise CompressError where there is no room."""
        layout, folder = self.cache.layout, self.cache.folder
        size, free = len(missing) * layout.bytes_per_view, shutil.disk_usage(folder).free
        if size > free:
            raise CompressError(
                f"{folder}: the teacher's answers need {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free: "
                "free some space, set teaching.top_k or fewer teaching.views, or teaching.mode: online"
            )
        batch_size = min(self.run.recipe.data.eval_batch_size, layout.images)
        batch = next(self.batches(missing[0], torch.arange(batch_size)))
        self.ask(batch)  # the first call is slower
        started = time.monotonic()
        self.ask(batch)
        speed = self.run.ranks * len(batch.targets) / (time.monotonic() - started)
        expected_s = len(missing) * layout.images / speed
        self.log.note(
            f"teacher: answers {views} views of {layout.images:,} images once for all, {len(missing)} of them now: "
            f"{size / 1e6:,.1f} MB, about {expected_s:,.0f} s"
        )
        return expected_s

    def fill(self, view: int) -> None:
        """Answer one view, each rank a part of it; it is there only when all have written theirs."""
        rank, layout = self.run.rank, self.cache.layout
        if rank == 0:
            self.cache.begin(view)
        barrier()
        part = torch.arange(layout.images).tensor_split(self.run.ranks)[rank]
        with self.cache.writing(view) as records:
            records["logits"][part.numpy()] = (
                np.nan
            )  # an image that cannot be read now must not pass for answered later
            for batch in self.batches(view, part):
                records[_views(batch).indices.numpy()] = layout.pack(self.ask(batch))
        barrier()
        if rank == 0:
            self.cache.finish(view)
        barrier()

    def batches(self, view: int, indices: torch.Tensor) -> Iterator[Batch]:
        """Yield training images by index under one view, broken ones left out."""
        data = self.run.recipe.data
        found = view_batches(
            self.run.dataset,
            torch.split(indices, data.eval_batch_size),
            augmentation=self.run.augmentation,
            seed=self.run.recipe.seed,
            view=view,
            workers=data.workers,
            device=self.run.device,
        )
        return (batch for batch in found if len(batch.targets))

    @torch.no_grad()
    def ask(self, batch: Batch) -> torch.Tensor:
        """Return the network's logits (n, classes), float32 on the CPU."""
        device = self.run.device.type
        bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits: torch.Tensor = self.network(batch.images)
        return logits.float().cpu()


def _facts(run: Run, source: Path) -> dict[str, object]:
    """Return all that the answers depend on."""
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
