"""Who teaches a training: the teacher itself on every batch, or what it said before about the same views, read from a cache.

The cache's folder is named after everything the answers depend on (the teacher's weights, the data, the augmentation, the seed), so that every
stage, student and study below one `out` folder shares it, and nothing else can.
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
from compress.data.batches import Batch, view_batches
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
from compress.models.saved import ARCHITECTURE, WEIGHTS, example_images
from compress.ranks import barrier, first_decides
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
    teaching = teach(run, src, terms, settings, log)
    images = example_images(run.image_size, run.device)
    learner, step = distillation(
        terms, run.task, student=student, teacher=teaching.teacher, images=images, seed=run.recipe.seed
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
    if asked.mode == "online" or needs_features(terms):
        return Teaching(online_teacher(run.teacher(src), terms), None)
    views = min(asked.views, settings.epochs)
    found = _answered(run, src, views, log)

    def answer(batch: Batch) -> TeacherAnswer:
        assert batch.views is not None
        return TeacherAnswer(found.logits(batch.views).to(batch.images.device, non_blocking=True), {})

    return Teaching(answer, views)


def _answered(run: Run, src: Path, views: int, log: StageLog) -> LogitCache:
    """Return the cache with so many views in it, the missing ones answered now: each rank its part of the images."""
    source = lineage(src)[0]
    facts = first_decides(lambda: _facts(run, source))
    classes, images = len(run.dataset.classes), len(run.dataset.train)
    asked = run.recipe.teaching.top_k
    cache = LogitCache(_folder(run, facts), Layout(images, classes, asked if asked and asked < classes else None))
    if run.rank == 0:
        cache.folder.mkdir(parents=True, exist_ok=True)
        write_json(cache.folder / "about.json", facts)
    with cache.lock() if run.rank == 0 else nullcontext():
        network = run.teacher(src)
        missing = first_decides(lambda: _missing(run, network, cache, views, log))
        if missing:
            expected_s = _announce(run, network, cache, missing, views, log)
            tell, started = log.note if expected_s > PATIENCE_S else log.note_detail, time.monotonic()
            for done, view in enumerate(missing, start=1):
                _fill(run, network, cache, view)
                left_s = (time.monotonic() - started) / done * (len(missing) - done)
                tell(f"teacher: view {view + 1} of {views} answered, {left_s:,.0f} s left")
    return cache


def _missing(run: Run, network: nn.Module, cache: LogitCache, views: int, log: StageLog) -> list[int]:
    """Return the views that are not there, which are all where the teacher now says something else than it did."""
    if cache.has(0) and not _replays(run, network, cache):
        log.note("teacher: its answers on disk are not what it says now; they are made again")
        cache.clear()
    return [view for view in range(views) if not cache.has(view)]


def _facts(run: Run, source: Path) -> dict[str, object]:
    """Return all that the answers depend on."""
    return {
        "format": FORMAT,
        "teacher": {name: sha256(source / name) for name in (ARCHITECTURE, WEIGHTS)},
        "data": run.dataset.digest,
        "images": len(run.dataset.train),
        "augment": run.recipe.data.augment.model_dump(mode="json"),
        "seed": run.recipe.seed,
        "device": run.device.type,
        "top_k": run.recipe.teaching.top_k,
    }


def _folder(run: Run, facts: dict[str, object]) -> Path:
    return Path(run.recipe.out) / "teacher-logits" / key_of(facts)


def _batches(run: Run, view: int, indices: torch.Tensor) -> Iterator[Batch]:
    """Yield training images by index under one view."""
    return view_batches(
        run.dataset,
        torch.split(indices, run.recipe.data.eval_batch_size),
        augmentation=run.augmentation,
        seed=run.recipe.seed,
        view=view,
        workers=run.recipe.data.workers,
        device=run.device,
    )


@torch.no_grad()
def _ask(run: Run, network: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the network's logits (n, classes), float32 on the CPU."""
    bf16 = run.device.type == "cuda" and torch.cuda.is_bf16_supported()
    with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
        logits: torch.Tensor = network(batch.images)
    return logits.float().cpu()


def _replays(run: Run, network: nn.Module, cache: LogitCache) -> bool:
    """Tell whether the teacher still says about a few images what the cache holds: the last guard against stale answers."""
    indices = torch.arange(min(PROBE_IMAGES, len(run.dataset.train)))
    for batch in _batches(run, 0, indices):
        if len(batch.targets):
            assert batch.views is not None
            said = cache.layout.unpack(cache.layout.pack(_ask(run, network, batch)))
            distance = (said - cache.logits(batch.views)).square().mean().sqrt()
            return bool(distance <= MAX_DISTANCE * said.std())  # NaN, a hole in the file, is no answer either
    return True


def _announce(
    run: Run, network: nn.Module, cache: LogitCache, missing: Sequence[int], views: int, log: StageLog
) -> float:
    """Say what the answers will cost in bytes and seconds, and return the seconds; raise CompressError where there is no room."""
    size = len(missing) * cache.layout.bytes_per_view
    free = shutil.disk_usage(cache.folder).free
    if size > free:
        raise CompressError(
            f"{cache.folder}: the teacher's answers need {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free: "
            "free some space, set teaching.top_k or fewer teaching.views, or teaching.mode: online"
        )
    batch_size = min(run.recipe.data.eval_batch_size, len(run.dataset.train))
    batch = next(_batches(run, missing[0], torch.arange(batch_size)))
    _ask(run, network, batch)  # the first call is slower
    started = time.monotonic()
    _ask(run, network, batch)
    speed = run.ranks * len(batch.targets) / (time.monotonic() - started)
    expected_s = len(missing) * cache.layout.images / speed
    log.note(
        f"teacher: answers {views} views of {cache.layout.images:,} images once for all, {len(missing)} of them now: "
        f"{size / 1e6:,.1f} MB, about {expected_s:,.0f} s"
    )
    return expected_s


def _fill(run: Run, network: nn.Module, cache: LogitCache, view: int) -> None:
    """Answer one view, each rank a part of it; it is there only when all have written theirs."""
    if run.rank == 0:
        cache.begin(view)
    barrier()
    part = torch.arange(cache.layout.images).tensor_split(run.ranks)[run.rank]
    with cache.writing(view) as records:
        records["logits"][part.numpy()] = np.nan  # an image that cannot be read now must not pass for answered later
        for batch in _batches(run, view, part):
            if len(batch.targets):
                assert batch.views is not None
                records[batch.views.indices.numpy()] = cache.layout.pack(_ask(run, network, batch))
    barrier()
    if run.rank == 0:
        cache.finish(view)
    barrier()
