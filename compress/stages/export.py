"""Write the ONNX files: teacher and student in FP32, student in FP16, INT8 after training alone (PTQ), INT8 from QAT."""

import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn

from compress.artifact import Metrics, key_of, lineage, read_meta, write_json
from compress.network import load_float, load_prepared
from compress.quant.prepare import deploy
from compress.recipe import FILES, ExportStage
from compress.run import Run, as_numpy, float_ancestor
from export import ptq
from export.audit import audit
from export.graph import save_model, to_float16
from export.to_onnx import to_onnx


def apply(cfg: ExportStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Export every file, then count what the optimizer makes of the deployed one."""
    assert src is not None
    with run.log(out, "export") as log:
        for name in _write_files(cfg, src, out, run):
            log.note(f"{name}.onnx")
        found = audit(out / f"{name}.onnx")
        log.note(f"{name}: {len(found.integer_layers)} layers run in integers, {len(found.float_layers)} in float")
        if found.float_layers:
            log.note(f"in float once optimized: {', '.join(found.float_layers)}")
    write_json(out / "preprocess.json", run.dataset.preprocess.to_json())
    (out / "labels.txt").write_text("".join(f"{label}\n" for label in run.dataset.classes), encoding="utf-8")
    return {
        "size_mb": (out / f"{name}.onnx").stat().st_size / 1e6,
        "integer_layers": len(found.integer_layers),
        "float_layers": len(found.float_layers),
    }


def _write_files(cfg: ExportStage, src: Path, out: Path, run: Run) -> Iterator[str]:
    """Write the files and yield the name of each once it is there; the last is the one to deploy."""
    files = {name: out / f"{name}.onnx" for name in FILES}
    for name, artifact in (("teacher_fp32", lineage(src)[0]), ("student_fp32", float_ancestor(src))):
        _export(load_float(artifact, trust_code=run.trust_code), artifact, files[name], run)
        yield name
    save_model(to_float16(onnx.load(files["student_fp32"])), files["student_fp16"])
    yield "student_fp16"
    images = (batch for batch, _ in as_numpy(run.calibration(cfg.ptq_calibration_images)))
    ptq.quantize(files["student_fp32"], files["student_ptq_int8"], images, target=run.target, method=cfg.ptq_method)
    yield "student_ptq_int8"
    if read_meta(src).kind == "fakequant":
        _export(deploy(load_prepared(src, trust_code=run.trust_code)), src, files["student_int8"], run)
        yield "student_int8"


def _export(model: nn.Module, artifact: Path, path: Path, run: Run) -> None:
    """Write one network with all that a server must know about it."""
    recipe = run.recipe.model_dump(mode="json")
    metadata = {
        "task": run.recipe.task,
        "classes": json.dumps(run.dataset.classes),
        "preprocess": json.dumps(run.dataset.preprocess.to_json()),
        "recipe": run.recipe.name,
        "recipe_digest": key_of(recipe),
        "top1_torch": f"{read_meta(artifact).metrics['top1']:.4f}",
        "target": run.target.name,
    }
    to_onnx(model.eval().to(memory_format=torch.contiguous_format), path, image_size=run.image_size, metadata=metadata)
