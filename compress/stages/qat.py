"""Quantization-aware training on each target's grid, under the teacher's soft targets."""

import copy
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx, nn

from compress.artifact import Metrics, newest, read_meta
from compress.calibration import Calibration
from compress.distillation.teacher import distil
from compress.logs.stage_log import StageLog
from compress.models.saved import Architecture, load_float, prepare_as, read_architecture, save_network
from compress.quant.bias_correction import corrected, images_to_correct_with
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, freeze_batchnorm_, reestimate_batchnorm_, set_phase_
from compress.quant.rows import Method, Ptq, PtqTarget, faster_in_float
from compress.quant.tuning import Trial, choose, fallback_trials, judge_of, said, trial_of, until_one_holds
from compress.ranks import first_decides
from compress.recipe.arguments import qat_fit
from compress.recipe.stages import QatStage
from compress.run import Run
from compress.scoring import export_network, faster_than, runs_here, tuning_score, worst_first
from compress.training.device import place_
from export.command.files import write_json
from export.names import PTQ_JSON
from export.onnx_file.targets import Target

MAX_TRIALS = 8


def apply(cfg: QatStage, src: Path, out: Path, run: Run) -> Metrics:
    """Fake-quantize, calibrate, train and measure the student for each target; save each network in `out/<target>`."""
    costs, ptq = read_meta(src).metrics, newest(src, "ptq")
    assert ptq is not None  # the recipe's validator holds the order
    calibrated: Ptq = json.loads((ptq / PTQ_JSON).read_text())
    metrics: Metrics = {"params_m": costs["params_m"], "macs_m": costs["macs_m"], "size_mb": None}
    calibration = Calibration(run, src, cfg.calibration_images)
    with run.log(out, "qat") as log:
        for target in reversed(run.int8_targets):  # the stage's own metrics are those of the recipe's target, the last
            found = calibrated["targets"][target.name]
            method = cfg.calibration or found["calibration"]
            fast = tuple(row["layer"] for row in faster_in_float(found))
            qat = _Qat(cfg, method, fast, src, run, log, target, calibration)
            result = _skip(cfg, log, target, found) or qat.train()
            metrics |= {f"{name}_{target.name}": result[name] for name in ("score", "trained")} | result
    return metrics


def _skip(cfg: QatStage, log: StageLog, target: Target, ptq: PtqTarget) -> Metrics | None:
    """Return the calibrated file's metrics where calibration alone is good enough, None where training is needed."""
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
        "float_groups": len(trial["keep_float"]) - len(faster_in_float(ptq)),
    }


def _with_tensors(model: nn.Module, other: nn.Module) -> nn.Module:
    """Return a copy of a network with the tensors of another that it has, too: biases that were added could not be loaded."""
    found, known = copy.deepcopy(model), model.state_dict()
    found.load_state_dict(known | {name: value for name, value in other.state_dict().items() if name in known})
    return found


@dataclass(frozen=True)
class _Qat:
    """The training on one target's grid, from the ranges that a calibration method sets."""

    cfg: QatStage
    method: Method
    fast: tuple[str, ...]  # layers that are faster in float
    src: Path
    run: Run
    log: StageLog
    target: Target
    calibration: Calibration

    def train(self) -> Metrics:
        """Train, keep layers in float where the file loses too much, save the network and return its metrics."""
        cfg, run, target = self.cfg, self.run, self.target
        architecture = replace(
            read_architecture(self.src), target=target.name, ranges=cfg.ranges, keep_float=(*cfg.keep_float, *self.fast)
        )
        model: nn.Module = place_(prepare_as(architecture, self._student()), run.device)
        self.log.doing(f"{target.name}: calibrates")
        calibrate_(model, self.calibration, self.method)
        calibrated = self._corrected(model)
        before = run.evaluate(calibrated)
        self.log.note_detail(f"{target.name}: score after calibration by {self.method} alone {before['score']:.4f}")

        def before_step(training: nn.Module, done: float) -> None:
            set_phase_(training, "adapt" if done < cfg.freeze_ranges_at else "round")
            if done >= cfg.freeze_batchnorm_at:
                freeze_batchnorm_(training)

        # bf16 has 8 bits of precision, as many as the grid: levels rounded once more would train the wrong numbers.
        settings = qat_fit(cfg, run.recipe)
        settings = settings.model_copy(update={"precision": "fp32"}) if settings.precision == "auto" else settings
        start = _with_tensors(model, calibrated)
        phase = "qat" if target == run.target else f"qat-{target.name}"
        model = distil(
            run,
            model,
            cfg.loss,
            settings,
            src=self.src,
            log=self.log,
            phase=phase,
            before_step=before_step,
            start=start,
        )
        set_phase_(model, "round")
        if cfg.reestimate_batchnorm_images and model is not start:
            reestimate_batchnorm_(
                model, (batch.images for batch in run.feed.calibration(cfg.reestimate_batchnorm_images))
            )
        if cfg.max_drop is not None:
            trial = first_decides(lambda: self._best_trial(model, architecture))
            held, architecture = self._with_float(trial, model, architecture)
            model = place_(held, run.device)
        if run.rank == 0:
            folder = self.log.out / target.name
            folder.mkdir(exist_ok=True)
            save_network(model, architecture, folder)
        kept = len(architecture.keep_float) - len(self.fast)
        return {**run.evaluate(model), "score_calibrated": before["score"], "trained": 1, "float_groups": kept}

    def _corrected(self, model: nn.Module) -> nn.Module:
        """Return a calibrated network as the ptq stage would write it, its biases corrected."""
        assert isinstance(model, fx.GraphModule)
        return corrected(model, images_to_correct_with(self.calibration))

    def _student(self) -> nn.Module:
        return load_float(self.src, trust_code=self.run.trust_code)

    def _with_float(
        self, trial: Trial, model: nn.Module, architecture: Architecture
    ) -> tuple[fx.GraphModule, Architecture]:
        """Return the trained network with the trial's layers in float as well."""
        changed = replace(architecture, keep_float=(*architecture.keep_float, *trial.keep_float))
        prepared = prepare_as(changed, self._student())
        # Beside a layer in float there can be quantizers that were not trained: they keep the calibrated range.
        calibrate_(prepared, (images.cpu() for images in self.calibration), self.method)
        known = prepared.state_dict()
        trained = {name: value for name, value in model.state_dict().items() if name in known}
        prepared.load_state_dict(trained, strict=False)
        set_phase_(prepared, "round")
        return prepared.eval(), changed

    def _best_trial(self, model: nn.Module, architecture: Architecture) -> Trial:
        """Put the worst 1, 2, 4 … layers into float until the file holds `max_drop` in ONNX Runtime; return the best trial."""
        run, target, max_drop = self.run, self.target, self.cfg.max_drop
        assert max_drop is not None
        damage = worst_first(model, run, images=self.cfg.calibration_images, tell=self.log.doing)
        work = self.log.out / f"trials-{target.name}"
        work.mkdir(exist_ok=True)
        fp32 = work / "float.onnx"
        export_network(self._student(), fp32, run, score=float("nan"), target=target)
        baseline = tuning_score(fp32, run, optimize=True)

        def build(trial: Trial, path: Path) -> None:
            network, _ = self._with_float(trial, model, architecture)
            export_network(deploy(network), path, run, score=baseline.score, target=target)

        judge = judge_of(
            build,
            lambda path: tuning_score(path, run, optimize=runs_here(target)),
            baseline=baseline,
            max_drop=max_drop,
            folder=work,
            faster=faster_than(fp32, run, target),
            tell=lambda result: self.log.note_detail(f"{target.name}: {said(result)}"),
        )
        fallbacks = fallback_trials("trained", [group["group"] for group in damage], MAX_TRIALS)[:-1]
        results = until_one_holds((Trial("int8", "trained"), *fallbacks), judge)
        write_json(self.log.out / f"trials-{target.name}.json", results)
        shutil.rmtree(work)
        return trial_of(results[choose(results)])
