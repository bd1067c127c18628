"""Accuracy and latency of every file, in ONNX Runtime."""

from pathlib import Path

from compress.artifact import Metrics, read_meta, write_json
from compress.recipe.stages import BenchStage
from compress.run import Run, as_numpy, newest
from export.bench import bench
from export.onnx_file.roles import deployed, files_in, is_int8
from export.runtime.accuracy import accuracy, score
from export.runtime.environment import environment


def apply(cfg: BenchStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Score all files on the whole validation set, then time them against each other."""
    assert src is not None
    exported = newest(src, "export")
    assert exported is not None
    files = files_in(exported)
    with run.log(out, "bench") as log:
        scores = accuracy(score(files, as_numpy(run.validation())), reference="student_fp32")
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
    name = deployed(files, run.target)
    floats = read_meta(exported).metrics["float_layers"]
    notes = (
        [f"{name}: {floats} layers run in float once optimized; the export stage's log names them"]
        if is_int8(name) and floats
        else []
    )
    write_json(
        out / "bench.json",
        {
            "accuracy": scores,
            "timings": measured.timings,
            "warnings": [*notes, *measured.warnings],
            "environment": environment(),
        },
    )
    return {
        "top1": scores[name]["top1"],
        "agreement": scores[name]["agreement"],
        "size_mb": files[name].stat().st_size / 1e6,
    }
