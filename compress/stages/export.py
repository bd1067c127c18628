"""Write the ONNX files: teacher and student in FP32, student in FP16, INT8 after training alone (PTQ), INT8 from QAT."""

import json
from pathlib import Path

import onnx
import torch
from torch import nn

from compress.artifact import Metrics, key_of, lineage, read_meta, write_json
from compress.errors import CompressError
from compress.network import load_float, load_prepared
from compress.quant.prepare import deploy
from compress.recipe import ExportStage
from compress.run import Run, as_numpy, float_ancestor
from export import ptq
from export.audit import audit
from export.graph import save_model, to_float16
from export.to_onnx import to_onnx


def apply(cfg: ExportStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Export every file, then check what the optimizer makes of the integer ones."""
    assert src is not None
    teacher, student = lineage(src)[0], float_ancestor(src)
    with run.log(out, "export") as log:
        _export(load_float(teacher, trust_code=run.trust_code), teacher, out / "teacher_fp32.onnx", run)
        log.note("teacher_fp32.onnx")
        _export(load_float(student, trust_code=run.trust_code), student, out / "student_fp32.onnx", run)
        log.note("student_fp32.onnx")
        save_model(to_float16(onnx.load(out / "student_fp32.onnx")), out / "student_fp16.onnx")
        log.note("student_fp16.onnx")
        images = (batch for batch, _ in as_numpy(run.calibration(cfg.ptq_calibration_images)))
        ptq.quantize(
            out / "student_fp32.onnx", out / "student_ptq_int8.onnx", images, target=run.target, method=cfg.ptq_method
        )
        log.note("student_ptq_int8.onnx")
        smallest = "student_ptq_int8"
        if read_meta(src).kind == "fakequant":
            _export(deploy(load_prepared(src, trust_code=run.trust_code)), src, out / "student_int8.onnx", run)
            log.note("student_int8.onnx")
            smallest = "student_int8"
            _check(out / "student_int8.onnx")
        integer = audit(out / f"{smallest}.onnx")
        log.note(f"{smallest}: {len(integer.integer_layers)} integer layers, {len(integer.float_layers)} float")
    write_json(out / "preprocess.json", run.dataset.preprocess.to_json())
    (out / "labels.txt").write_text("".join(f"{name}\n" for name in run.dataset.classes), encoding="utf-8")
    return {
        "size_mb": (out / f"{smallest}.onnx").stat().st_size / 1e6,
        "integer_layers": len(integer.integer_layers),
        "float_layers": len(integer.float_layers),
    }


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


def _check(path: Path) -> None:
    """Refuse an INT8 file in which convolutions would run in float."""
    floats = [name for name in audit(path).float_layers if "conv" in name.lower()]
    if floats:
        raise CompressError(
            f"{path.name}: {len(floats)} convolutions stay float once optimized: {', '.join(floats[:5])}"
        )
