"""Quantization-aware training on each target's grid, under the teacher's soft targets."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from compress.artifact import Metrics, read_meta, write_json
from compress.distillation.teacher import distil
from compress.log import StageLog
from compress.models.saved import Architecture, load_float, prepare_as, read_architecture, save_network
from compress.quant.calibrate import Method, calibrate_
from compress.quant.prepare import deploy, freeze_batchnorm_, reestimate_batchnorm_, set_phase_
from compress.quant.tuning import Trial, choose, fallback_trials, judge_of, until_one_holds
from compress.ranks import first_decides
from compress.recipe.arguments import qat_fit
from compress.recipe.stages import QatStage
from compress.run import Run, newest
from compress.scoring import export_network, faster_than, runs_here, tuning_score, worst_first
from compress.training.loop import place_
from export.onnx_file.targets import Target

MAX_TRIALS = 8


def apply(cfg: QatStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Fake-quantize, calibrate, train and measure the student once for each target; `out/<target>` holds each network."""
    assert src is not None
    costs = read_meta(src).metrics
    metrics: Metrics = {"params_m": costs["params_m"], "macs_m": costs["macs_m"], "size_mb": None}
    with run.log(out, "qat") as log:
        for target in reversed(run.int8_targets):  # the recipe's own last: its numbers are the stage's
            ptq = _ptq(src, target)
            method = cfg.calibration or ptq["calibration"]
            result = _skip(cfg, log, target, ptq) or _train(cfg, method, src, out, run, log, target)
            metrics |= {f"{name}_{target.name}": result[name] for name in ("score", "trained")} | result
    return metrics


def _ptq(src: Path, target: Target) -> dict[str, Any]:
    """Return what the ptq stage found out for a target."""
    stage = newest(src, "ptq")
    assert stage is not None  # the recipe's validator holds the order
    found: dict[str, Any] = json.loads((stage / "ptq.json").read_text())["targets"][target.name]
    return found


def _skip(cfg: QatStage, log: StageLog, target: Target, ptq: dict[str, Any]) -> Metrics | None:
    """Return the calibrated file's metrics where calibration alone is good enough; None where training must go on."""
    trial, enough = ptq["trials"][ptq["chosen"]], cfg.skip_if_ptq_drop_below
    if enough is None or trial["number_format"] != "int8" or trial["drop"] >= enough:
        return None
    log.note(
        f"{target.name}: not trained: calibration alone loses {100 * trial['drop']:.2f} points, "
        f"less than skip_if_ptq_drop_below ({100 * enough:.2f})"
    )
    return {
        "score": ptq["score"],
        "score_calibrated": ptq["score"],
        "trained": 0,
        "float_groups": len(trial["keep_float"]),
    }


def _train(cfg: QatStage, method: Method, src: Path, out: Path, run: Run, log: StageLog, target: Target) -> Metrics:
    """Train on one target's grid, from the ranges that a calibration method sets, and save the network."""
    architecture = replace(read_architecture(src), target=target.name, ranges=cfg.ranges, keep_float=cfg.keep_float)
    model = _calibrated(cfg, method, src, architecture, run)
    before = run.evaluate(model)
    log.note(f"{target.name}: score after calibration by {method} alone {before['score']:.4f}")

    def before_step(training: nn.Module, done: float) -> None:
        set_phase_(training, "adapt" if done < cfg.freeze_ranges_at else "round")
        if done >= cfg.freeze_batchnorm_at:
            freeze_batchnorm_(training)

    # bf16 has eight bits of precision, no more than the grid itself: rounding levels again would train the wrong numbers.
    settings = qat_fit(cfg, run.recipe)
    settings = settings.model_copy(update={"precision": "fp32"}) if settings.precision == "auto" else settings
    phase = "qat" if target == run.target else f"qat-{target.name}"
    model = distil(run, model, cfg.loss, settings, src=src, out=out, log=log, phase=phase, before_step=before_step)
    set_phase_(model, "round")
    if cfg.reestimate_batchnorm_images:
        reestimate_batchnorm_(model, (batch.images for batch in run.calibration(cfg.reestimate_batchnorm_images)))
    if cfg.max_drop is not None:
        model, architecture = _hold(cfg, method, cfg.max_drop, src, model, architecture, out, run, log, target)
    _save(model, architecture, out, run)
    measured = run.evaluate(model)
    return {**measured, "score_calibrated": before["score"], "trained": 1, "float_groups": len(architecture.keep_float)}


def _hold(
    cfg: QatStage,
    method: Method,
    max_drop: float,
    src: Path,
    model: nn.Module,
    architecture: Architecture,
    out: Path,
    run: Run,
    log: StageLog,
    target: Target,
) -> tuple[nn.Module, Architecture]:
    """Put the trained network's worst layers back to float until its file holds the accuracy in ONNX Runtime."""
    student, trained = load_float(src, trust_code=run.trust_code), model.state_dict()

    def kept(trial: Trial) -> tuple[fx.GraphModule, Architecture]:
        changed = replace(architecture, keep_float=(*architecture.keep_float, *trial.keep_float))
        prepared = prepare_as(changed, student)
        # A layer in float can give its neighbours quantizers that training did not know: those keep the calibrated range.
        calibrate_(prepared, (batch.images.cpu() for batch in run.calibration(cfg.calibration_images)), method)
        prepared.load_state_dict(
            {name: trained[name] for name in prepared.state_dict() if name in trained}, strict=False
        )
        set_phase_(prepared, "round")
        return prepared.eval(), changed

    def least_float() -> Trial:
        damage = worst_first(model, run, images=cfg.calibration_images)
        work = out / f"trials-{target.name}"
        work.mkdir(exist_ok=True)
        fp32 = work / "float.onnx"
        export_network(student, fp32, run, score=float("nan"), target=target)
        baseline = tuning_score(fp32, run, optimize=True)

        def build(trial: Trial, path: Path) -> None:
            export_network(deploy(kept(trial)[0]), path, run, score=baseline.score, target=target)

        judge = judge_of(
            build,
            lambda path: tuning_score(path, run, optimize=runs_here(target)),
            baseline=baseline,
            max_drop=max_drop,
            folder=work,
            faster=faster_than(fp32, run, target),
            tell=lambda result: log.note(f"{target.name}: {result}"),
        )
        fallbacks = fallback_trials("trained", [group.group for group in damage], MAX_TRIALS)[:-1]
        results = until_one_holds((Trial("int8", "trained"), *fallbacks), judge)
        write_json(out / f"trials-{target.name}.json", [result.to_json() for result in results])
        shutil.rmtree(work)
        return results[choose(results)].trial

    held, architecture = kept(first_decides(least_float))
    return place_(held, run.device), architecture


def _calibrated(cfg: QatStage, method: Method, src: Path, architecture: Architecture, run: Run) -> nn.Module:
    """Return the float student fake-quantized, with the activations' first ranges, on the run's device."""
    student = load_float(src, trust_code=run.trust_code)
    model = place_(prepare_as(architecture, student), run.device)
    calibrate_(model, (batch.images for batch in run.calibration(cfg.calibration_images)), method)
    return model


def _save(model: nn.Module, architecture: Architecture, out: Path, run: Run) -> None:
    if run.rank == 0:
        folder = out / str(architecture.target)
        folder.mkdir(exist_ok=True)
        save_network(model, architecture, folder)
