"""Accuracy and latency of every file, in ONNX Runtime."""

from pathlib import Path

from compress.artifact import Metrics, read_meta, write_json
from compress.recipe.stages import BenchStage
from compress.run import Run, as_numpy, newest
from export.bench import bench
from export.onnx_file.roles import TEACHER, deployed, files_in, is_int8
from export.runtime.accuracy import accuracy, score_files
from export.runtime.environment import environment
from export.runtime.rows import metric_json


def apply(cfg: BenchStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Score all files on the whole validation set, then time them against each other."""
    assert src is not None
    exported = newest(src, "export")
    assert exported is not None
    files = files_in(exported)
    name, task = deployed(files, run.target), run.task.output
    with run.log(out, "bench") as log:
        answers = score_files(files, as_numpy(run.validation()), task)
        scores = accuracy(answers, reference="student_fp32")
        measured = bench(
            files,
            batches=cfg.batches,
            threads=cfg.threads,
            image_sizes=cfg.image_sizes,
            providers=cfg.providers,
            seconds=cfg.seconds,
            blocks=cfg.blocks,
            seed=run.recipe.seed,
            target=run.target.name,
            progress=log.note_detail,
        )
    floats = read_meta(exported).metrics["float_layers"]
    notes = (
        [f"{name}: {floats} layers run in float once optimized; the export stage's log names them"]
        if is_int8(name) and floats
        else []
    )
    if broken := sorted(run.dataset.val.broken):
        notes.append(f"validation images that cannot be read are in no score: {len(broken):,}, {broken[0]} first")
    write_json(
        out / "bench.json",
        {
            "metric": metric_json(task.metric),
            "accuracy": scores,
            "classes": task.by_class(
                {file: found.rows for file, found in answers.items()}, run.dataset.classes, (TEACHER, name)
            ),
            "timings": measured.timings,
            "warnings": [*notes, *measured.warnings],
            "environment": environment(),
        },
    )
    return {
        "score": scores[name]["score"],
        "agreement": scores[name]["agreement"],
        "size_mb": files[name].stat().st_size / 1e6,
    }
