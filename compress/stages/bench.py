"""Score and time every file in ONNX Runtime."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.artifact import Metrics, newest
from compress.data.feed import as_numpy, as_pixels
from compress.data.images import FileImages, Lazy
from compress.recipe.arguments import providers_of
from compress.recipe.stages import BenchStage
from compress.run import Run
from export.command.files import write_json
from export.images.decode import BrokenImage
from export.images.size import size_of
from export.names import ANSWERS, AUDIT_JSON, BENCH_JSON, EXAMPLES_NPZ, GOLDEN_NPZ
from export.onnx_file.roles import FP32, PTQ, SERVED, TEACHER, deployed, files_in, is_int8
from export.proof.audit import float_times
from export.runtime.accuracy import accuracy, accuracy_elsewhere, predictions_of, score_elsewhere, score_files
from export.runtime.end_to_end import EndToEnd, end_to_end
from export.runtime.environment import environment
from export.runtime.measure import BenchPlan, bench
from export.runtime.providers import PLAIN
from export.runtime.rows import file_in, metric_json
from export.tasks.task import Array

DRAWN = 4  # images that the report shows with their predictions
WHOLE = 8  # images that are timed from their bytes to the prediction


def apply(cfg: BenchStage, src: Path, out: Path, run: Run) -> Metrics:
    """Score all files on the whole validation set, then time them in turns."""
    exported = newest(src, "export")
    assert exported is not None
    files = files_in(exported)
    name, task = deployed(files, run.target), run.task.output
    with run.log(out, "bench") as log:
        log.doing(f"scores {len(files)} files on the validation images")
        own, paths = run.own_metric, run.paths() if run.own_metric else []
        scored = score_files(files, as_numpy(run.feed.validation()), task, own=own, paths=paths)
        folders = _folders(run.dataset.held_out)
        scores = accuracy(scored, reference=scored[FP32], folders=folders)
        providers = providers_of(run.recipe)
        others = score_elsewhere(files, lambda: as_numpy(run.feed.validation()), task, providers=providers)
        elsewhere = dict(others)
        # Their times and scores decide in the report which of the INT8 files is served.
        rivals = [path for file, path in files.items() if file in (TEACHER, name, PTQ)]
        _write_examples(out / EXAMPLES_NPZ, rivals, scored[name].rows, exported, run)
        log.doing("times the files")
        whole = _end_to_end(rivals, run, seconds=cfg.seconds)
        sizes = [size_of(size) for size in cfg.image_sizes]
        plan = BenchPlan(cfg.batches, cfg.threads, sizes, providers, cfg.seconds, cfg.blocks, run.recipe.seed)
        measured = bench(files, plan, target=run.target.name, progress=log.note_detail)
    every = {PLAIN: scored, **elsewhere}
    found = json.loads((exported / AUDIT_JSON).read_text())[name]
    floats = {layer: found["reasons"].get(layer, "for no known reason") for layer in found["float_layers"]}
    notes = seen_without_label(run)
    if is_int8(name) and floats:
        reasons = ", ".join(sorted(set(floats.values())))
        notes.append(f"{name}: {len(floats)} layers run in float once optimized: {reasons}")
    if broken := sorted(run.dataset.val.broken):
        notes.append(f"validation images that cannot be read count in no score: {len(broken):,}, first {broken[0]}")
    write_json(
        out / BENCH_JSON,
        {
            "metric": metric_json(task.metric),
            "accuracy": scores,
            "accuracy_elsewhere": accuracy_elsewhere(elsewhere, reference=scored[FP32], folders=folders),
            "classes": task.by_class(
                {file_in(file, at): one.rows for at, found in every.items() for file, one in found.items()},
                run.dataset.classes,
                (TEACHER, name, PTQ, *(file_in(file, at) for at in elsewhere for file in SERVED)),
            ),
            "timings": measured.timings,
            "end_to_end": whole,
            "float_times": {file: float_times(path) for file, path in files.items() if is_int8(file)},
            "warnings": [*notes, *measured.warnings],
            "environment": environment(),
        },
    )
    return {
        "score": scores[name]["score"],
        "agreement": scores[name]["agreement"],
        "size_mb": files[name].stat().st_size / 1e6,
    }


def seen_without_label(run: Run) -> list[str]:
    """Return a sentence on the images of `data.unlabelled`, for the report; none without them."""
    more = len(run.dataset.with_unlabelled.train) - len(run.dataset.train)
    said = f"data.unlabelled: training with the teacher and calibration also saw {more:,} images without a label, no validation image among them"
    return [said] if more else []


def _folders(images: Lazy) -> list[str]:
    """Return the name of each image's folder; empty where the images are no files, or not all can be read."""
    if not isinstance(images, FileImages) or images.broken:
        return []
    return [Path(images.name(index)).parent.name for index in range(len(images))]


def _write_examples(path: Path, files: Sequence[Path], rows: Array, exported: Path, run: Run) -> None:
    """Write what the report draws: the worst images by a file's `rows`, or some golden ones, their truths, and each file's predictions."""
    task = run.task.output
    if task.draw is None:
        return
    if task.worst is not None and len(rows) == len(
        run.dataset.val
    ):  # fewer if some cannot be read, so that numbers differ
        worst = np.argsort(-task.worst(rows), kind="stable")[:DRAWN]
        ((batch, truths),) = as_numpy(iter([run.feed.chosen(torch.from_numpy(worst))]))
        images = as_pixels(batch, run.dataset.preprocess)
    else:
        with np.load(exported / GOLDEN_NPZ) as golden:
            images, truths = golden["images"][:DRAWN], golden["truths"][:DRAWN]
        batch = run.dataset.preprocess.normalize(images)
    drawn = task.drawn(np.stack([predictions_of(file, task)(batch) for file in files]))
    if drawn:
        answers: dict[str, Any] = {f"{ANSWERS}{name}": one for name, one in drawn.items()}
        np.savez(path, images=images, truths=truths, files=np.array([file.stem for file in files]), **answers)


def _end_to_end(files: Sequence[Path], run: Run, *, seconds: float) -> dict[str, EndToEnd]:
    """Time the files on validation images of their original sizes, decoding included."""
    images, task = run.dataset.held_out, run.task.output
    with tempfile.TemporaryDirectory() as folder:
        paths = list[Path]()
        for index in range(len(images)):
            try:
                images.whole(index)
            except BrokenImage:
                continue
            paths.append(Path(folder, f"{index}{images.suffix(index)}"))
            paths[-1].write_bytes(images.content(index))
            if len(paths) == WHOLE:
                break
        return {
            file.stem: end_to_end(file, paths, run.dataset.preprocess, task, seconds=seconds / len(files))
            for file in files
        }
