"""Write the ONNX files; audit what the optimizer makes of each, and verify INT8 files against the trained network."""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from torch import fx

from compress.artifact import Metrics, float_ancestor, lineage, newest, read_meta
from compress.data.feed import as_numpy, as_pixels
from compress.logs.stage_log import StageLog
from compress.models.saved import example_images, load_float, load_prepared
from compress.quant.prepare import deploy, float_on_purpose, prepare
from compress.quant.reference import reference_of
from compress.quant.rows import Ptq, faster_in_float
from compress.recipe.stages import AuditLimits, ExportStage
from compress.run import Run
from compress.scoring import RANGE_IMAGES, export_network, write_float16
from export.command.files import write_json
from export.names import (
    AUDIT_JSON,
    DECODER,
    GOLDEN_NPZ,
    LABELS,
    LIMITS_JSON,
    NOTES_JSON,
    PREPROCESS,
    PTQ_JSON,
    RECIPE_KEY,
    VALIDATION,
    VERIFY_JSON,
)
from export.onnx_file.graph import save_model
from export.onnx_file.roles import FP16, FP32, PTQ, QAT, TEACHER, UINT8, deployed, files_in, is_int8, name_for
from export.onnx_file.targets import Target
from export.onnx_file.uint8_input import with_uint8_input
from export.proof.audit import Audit, audit, over_limits
from export.proof.half import is_finite
from export.proof.rows import VerifyRow
from export.proof.verify import verify


def apply(cfg: ExportStage, src: Path, out: Path, run: Run) -> Metrics:
    """Write and audit every file, verify the INT8 ones, and check those that may be served against the recipe's limits."""
    trained = _trained(src, run)
    with run.log(out, "export") as log:
        log.doing("writes the files")
        for name in _write_files(src, out, run, trained):
            _sign(out / f"{name}.onnx", read_meta(src).key)
            log.note_detail(f"{name}.onnx")
        if note := _write_float16(cfg, out, run):
            log.note(note)
        files = files_in(out)
        name = deployed(files, run.target)
        log.doing("compares the INT8 files with their networks")
        audits = {file: audit(path) for file, path in files.items()}
        parity = _verify(cfg, files, run, trained)
        bytes_in = cfg.uint8_input and run.dataset.preprocess.bits == 8
        for twin in sorted({PTQ, QAT} & files.keys() if bytes_in else ()):  # the bench says which is served
            model = with_uint8_input(onnx.load(files[twin]), run.dataset.preprocess.to_json())
            save_model(run.task.output.finish(model), out / f"{twin}{UINT8}.onnx")
            log.note_detail(f"{twin}{UINT8}.onnx")
        # ONNX Runtime's CPU optimizer leaves TensorRT's file in float, and TensorRT itself is not here.
        judged = {name, *{PTQ, QAT} & files.keys()} if run.target.name != "tensorrt" else set()
        fast = {
            file: found for target in run.int8_targets for file, found in _faster_in_float(src, run, target).items()
        }
        over = {
            file: _over(cfg.limits, file, audits[file], parity.get(file), fast=fast.get(file, {}))
            for file in sorted(judged)
        }
        _note(log, name, audits[name], parity.get(name), over.get(name, []))
    reasons = _reasons(files, trained, src, run)
    write_json(
        out / AUDIT_JSON,
        {
            file: {**found, "reasons": {**found["reasons"], **reasons.get(file, {}), **fast.get(file, {})}}
            for file, found in audits.items()
        },
    )
    write_json(out / VERIFY_JSON, parity)
    write_json(out / LIMITS_JSON, over)
    write_json(out / NOTES_JSON, [note] if note else [])
    write_json(out / PREPROCESS, run.dataset.preprocess.to_json())
    _write_golden_images(out / GOLDEN_NPZ, run, limit=cfg.golden_images)
    (out / VALIDATION).write_text("".join(f"{digest}\n" for digest in run.dataset.validation_digests()))
    if run.dataset.decoder is not None:
        (out / DECODER).write_bytes(run.dataset.decoder.content)
    (out / LABELS).write_text("".join(f"{label}\n" for label in run.dataset.classes), encoding="utf-8")
    return {
        "size_mb": files[name].stat().st_size / 1e6,
        "integer_layers": len(audits[name]["integer_layers"]),
        "float_layers": len(audits[name]["float_layers"]),
    }


def _write_golden_images(path: Path, run: Run, *, limit: int) -> None:
    """Write validation images, spread over the set: `images`, uint8 or uint16 (n, height, width, channels) as decoded, and `truths`."""
    images, truths = zip(*as_numpy(run.feed.validation(limit=limit)), strict=True)
    np.savez(path, images=as_pixels(np.concatenate(images), run.dataset.preprocess), truths=np.concatenate(truths))


def _trained(src: Path, run: Run) -> dict[str, fx.GraphModule]:
    """Return the fake-quantized networks by file name; empty where quantization-aware training did not run."""
    qat = newest(src, "qat")
    folders = {name_for(QAT, target, run.target): qat / target.name for target in run.int8_targets if qat is not None}
    return {
        name: load_prepared(folder, trust_code=run.trust_code) for name, folder in folders.items() if folder.exists()
    }


def _write_files(src: Path, out: Path, run: Run, trained: Mapping[str, fx.GraphModule]) -> Iterator[str]:
    """Write each file and yield its name."""
    student = float_ancestor(src)
    for name, artifact, model in (
        (TEACHER, lineage(src)[0], run.load_source(src)),
        (FP32, student, load_float(student, trust_code=run.trust_code)),
    ):
        export_network(model, out / f"{name}.onnx", run, score=_metric(artifact, "score"), target=run.target)
        yield name
    ptq, qat = newest(src, "ptq"), newest(src, "qat")
    for target in run.int8_targets:
        if ptq is not None:
            name = name_for(PTQ, target, run.target)
            shutil.copyfile(ptq / target.name / f"{PTQ}.onnx", out / f"{name}.onnx")
            yield name
        if qat is not None and (name := name_for(QAT, target, run.target)) in trained:
            score = _metric(qat, f"score_{target.name}")
            export_network(deploy(trained[name]), out / f"{name}.onnx", run, score=score, target=target)
            yield name


def _reasons(
    files: Mapping[str, Path], trained: Mapping[str, fx.GraphModule], src: Path, run: Run
) -> dict[str, dict[str, str]]:
    """Return for each INT8 file why some operations stay in float on purpose, as its fake-quantized network knows."""
    found = {}
    for target in run.int8_targets:
        names = [name for kind in (PTQ, QAT) if (name := name_for(kind, target, run.target)) in files]
        network = trained.get(name_for(QAT, target, run.target))
        if names and network is None:
            network = prepare(
                load_float(float_ancestor(src), trust_code=run.trust_code), target, example_images(run.shape)
            )
        found.update({name: float_on_purpose(network) for name in names if network is not None})
    return found


def _faster_in_float(src: Path, run: Run, target: Target) -> dict[str, dict[str, str]]:
    """Return for each INT8 file of a target why layers stay in float for speed, by layer."""
    ptq = newest(src, "ptq")
    if ptq is None:
        return {}
    calibrated: Ptq = json.loads((ptq / PTQ_JSON).read_text())
    reasons = {row["layer"]: "it is faster in float" for row in faster_in_float(calibrated["targets"][target.name])}
    return {name_for(kind, target, run.target): reasons for kind in (PTQ, QAT)}


def _write_float16(cfg: ExportStage, out: Path, run: Run) -> str:
    """Write the FP16 file unless its outputs are not finite; return a note, empty where everything is in float16."""
    path = out / f"{FP16}.onnx"
    kept = write_float16(out / f"{FP32}.onnx", path, run)
    seen = itertools.chain(run.feed.calibration(RANGE_IMAGES), run.feed.validation(limit=cfg.golden_images))
    if not is_finite(path, (images for images, _ in as_numpy(seen))):
        path.unlink()
        return f"{FP16} is left out: its outputs are not finite, although {len(kept)} modules stay in float32"
    return f"{FP16}: in float32, as their values exceed half precision: {', '.join(kept)}" if kept else ""


def _sign(path: Path, key: str) -> None:
    """Add the last network's artifact key, which covers settings, data and earlier stages, to the file's metadata."""
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, metadata | {RECIPE_KEY: key})
    save_model(model, path)


def _metric(artifact: Path, name: str) -> float:
    value = read_meta(artifact).metrics[name]
    assert value is not None
    return value


def _verify(
    cfg: ExportStage, files: Mapping[str, Path], run: Run, trained: Mapping[str, fx.GraphModule]
) -> dict[str, VerifyRow]:
    """Compare each trained INT8 file with its fake-quantized network, each calibrated one with itself unoptimized."""
    names = [name_for(kind, target, run.target) for target in run.int8_targets for kind in (QAT, PTQ)]
    return {
        name: verify(
            files[name],
            as_numpy(run.feed.validation(limit=cfg.verify_images)),
            reference_of(trained[name]) if name in trained else None,
            task=run.task.output,
        )
        for name in names
        if name in files
    }


def _over(
    limits: AuditLimits, name: str, found: Audit, parity: VerifyRow | None, *, fast: Mapping[str, str]
) -> list[str]:
    """Return a sentence for each limit that a file exceeds; layers that are float for speed, `fast`, and their borders do not count."""
    over = over_limits(
        {**found, "float_layers": [layer for layer in found["float_layers"] if layer not in fast]},
        max_float_layers=limits.max_float_layers,
        max_float_fraction=limits.max_float_fraction if is_int8(name) and not fast else None,
        max_leftover_qdq=None if fast else limits.max_leftover_qdq,
    )
    if limits.min_agreement is not None and parity is not None and parity["agreement"] < limits.min_agreement:
        over.append(
            f"min_agreement: wanted at least {limits.min_agreement:.2%}, measured {parity['agreement']:.2%} on {parity['images']} images; "
            f"the first quantized tensor that diverges: {parity['first_divergence'] or 'none'}"
        )
    return [f"{name}: {sentence}" for sentence in over]


def _note(log: StageLog, name: str, found: Audit, parity: VerifyRow | None, over: list[str]) -> None:
    if is_int8(name):
        log.note(
            f"{name}: {len(found['integer_layers'])} layers run in integers, {len(found['float_layers'])} in float"
        )
    if is_int8(name) and found["float_layers"]:
        log.note(f"in float once optimized: {', '.join(found['float_layers'])}")
    if parity is not None:
        low, high = parity["agreement_ci95"]
        log.note_detail(
            f"agrees with {'the trained network' if name == QAT else 'itself unoptimized'} on {parity['agreement']:.2%} "
            f"of {parity['images']} images (95 % interval {low:.2%} to {high:.2%})"
        )
        for layer in parity["saturation"]:
            log.note(f"{layer['layer']}: saturates on this machine")
    for sentence in over:
        log.note(sentence)
