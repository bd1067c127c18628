"""INT8 without training: every engine and method on each target's grid, then tuning until the accuracy holds.

Files are chosen on the tuning images and reported on the validation images. The network itself stays as it is.
"""

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.artifact import Metrics, read_meta
from compress.calibration import Calibration
from compress.data.batches import in_order
from compress.data.feed import as_numpy
from compress.errors import ModelError
from compress.logs.stage_log import StageLog
from compress.models.saved import ARCHITECTURE, WEIGHTS, example_images, load_float
from compress.quant import neural_compressor_ptq
from compress.quant.bias_correction import corrected, float_means, images_to_correct_with
from compress.quant.calibrate import calibrate_, collect, set_ranges_
from compress.quant.mixture import may_gain, repaired, said_faster
from compress.quant.prepare import deploy, heads, prepare
from compress.quant.rows import Engine, GroupRow, Method, MethodRow, Ptq, PtqTarget, SpeedRow, TrialRow
from compress.quant.tuning import (
    Trial,
    choose,
    fallback_trials,
    file_of,
    judge_of,
    nearest_first,
    said,
    timed,
    trial_of,
    until_one_holds,
    with_time,
)
from compress.recipe.stages import PtqStage
from compress.run import Run
from compress.scoring import (
    export_network,
    faster_than,
    metadata_of,
    runs_here,
    score_file,
    tuning_score,
    worst_first,
    write_float16,
)
from compress.training.device import place_
from export.command.files import write_json
from export.errors import BundleError
from export.names import PTQ_JSON
from export.onnx_file import ptq
from export.onnx_file.roles import PTQ, PTQ_DYNAMIC
from export.onnx_file.targets import Target
from export.onnx_file.to_onnx import to_onnx
from export.proof.audit import audit
from export.runtime.accuracy import Score, score_files, score_of
from export.runtime.latency import Ratio

Name = tuple[Engine, str]  # and method
Files = dict[Name, Path]
MIXED_BLOCKS = 24  # to time the mixed file against the one all in integers, which differ less than INT8 from float
LINEAR = 0.5  # of the multiply-accumulates in linear layers; then dynamic INT8 is measured, too
FEW_IMAGES = 512  # of the tuning images compare an engine's files; all judge the nearest
DYNAMIC = Trial("int8", "dynamic", engine="onnxruntime")


@dataclass(frozen=True)
class Student:
    """The float student, and what all targets share."""

    cfg: PtqStage
    run: Run
    src: Path
    fp32: Path
    score: float  # in torch
    reported: Score  # of `fp32` in ONNX Runtime, on the validation images
    baseline: Score  # the same on the tuning images
    log: StageLog
    calibration: Calibration

    @cached_property
    def few(self) -> Score | None:
        """The baseline on few of the tuning images; None where there are not many."""
        images = self.baseline.images
        return self.baseline.part(in_order(images, FEW_IMAGES).numpy()) if images > 2 * FEW_IMAGES else None

    @cached_property
    def correction_images(self) -> Tensor:
        """The images that correct the biases, (n, channels, h, w)."""
        return images_to_correct_with(self.calibration)

    def prepared(self, target: Target, keep_float: Sequence[str] = ()) -> torch.fx.GraphModule:
        """Return the network fake-quantized on the run's device, without ranges."""
        model = load_float(self.src, trust_code=self.run.trust_code)
        placed = place_(prepare(model, target, example_images(self.run.shape), keep_float=keep_float), self.run.device)
        assert isinstance(placed, torch.fx.GraphModule)
        return placed.eval()

    def export(self, prepared: torch.fx.GraphModule, path: Path, target: Target) -> None:
        """Write a calibrated network's INT8 file."""
        export_network(deploy(prepared), path, self.run, score=self.score, target=target)


def apply(cfg: PtqStage, src: Path, out: Path, run: Run) -> Metrics:
    """Measure, tune, and keep each target's best INT8 file; return the float student's metrics and the chosen trial's."""
    metrics = read_meta(src).metrics
    if run.rank != 0:
        return metrics
    for name in (ARCHITECTURE, WEIGHTS):
        shutil.copyfile(src / name, out / name)
    work, score = out / "trials", metrics["score"]
    work.mkdir(exist_ok=True)
    assert score is not None
    with run.log(out, "ptq") as log:
        fp32 = work / "float.onnx"
        log.doing("scores the float student")
        export_network(load_float(src, trust_code=run.trust_code), fp32, run, score=score, target=run.target)
        reported = score_file(fp32, run, run.feed.validation(limit=cfg.score_images), optimize=True)
        baseline = tuning_score(fp32, run, optimize=True)
        log.note(
            f"float student in ONNX Runtime: {run.task.output.metric.title} {_percent(reported.score)} "
            f"on {reported.images} validation images, {_percent(baseline.score)} on {baseline.images} tuning images"
        )
        calibration = Calibration(run, src, cfg.calibration_images)
        left_out = calibration.outliers(log)
        student = Student(cfg, run, src, fp32, score, reported, baseline, log, calibration)
        found = {target.name: _on_target(student, target) for target in run.int8_targets}
    write_json(
        out / PTQ_JSON,
        Ptq(
            images=reported.images,
            float_score=reported.score,
            tuning_images=baseline.images,
            outliers=left_out,
            targets=found,
        ),
    )
    shutil.rmtree(work)
    own = found[run.target.name]
    return {
        **metrics,
        "ptq_score": own["score"],
        "ptq_drop": reported.score - own["score"],
        "trials": len(own["trials"]),
    }


def _on_target(student: Student, target: Target) -> PtqTarget:
    """Measure and tune on one target; leave the best INT8 file as `<target>/student_ptq_int8.onnx`; return the report."""
    work, out = student.fp32.parent / target.name, student.log.out / target.name
    work.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True)
    prepared = student.prepared(target)
    student.log.doing(f"{target.name}: calibrates")
    histograms = collect(prepared, student.calibration)
    means = float_means(prepared, student.correction_images)
    files: Files = {}
    for method in student.cfg.methods:
        set_ranges_(prepared, histograms, method)
        student.log.doing(f"{target.name}: builds INT8 by {method}")
        path = files["compress", method] = work / f"compress-{method}.onnx"
        student.export(corrected(prepared, student.correction_images, means), path, target)
    files |= _by_onnxruntime(student, target, work, heads(prepared))
    others, failed = _by_neural_compressor(student, target, work)
    files |= others
    scores = _score(student, target, files)
    off_grid = {name: reason for name in others if (reason := neural_compressor_ptq.off_grid(target))}
    rows = [_row(student, target, name, path, scores[name], off_grid.get(name)) for name, path in files.items()]
    rows += failed
    for row in rows:
        student.log.note_detail(_method_line(target, row))
    judge, faster = _judge(student, target, files, work), faster_than(student.fp32, student.run, target)

    def time(trial: Trial) -> Ratio | None:
        student.log.doing(f"{target.name}: times {trial}")
        return faster(file_of(trial, work))

    candidates = {name: path for name, path in files.items() if name not in off_grid}
    own, others_judged = _judged(student, target, candidates, judge)
    results = own + others_judged
    best = _method(student.cfg, trial_of(own[choose(own)]))
    damage: tuple[GroupRow, ...] = ()
    if not any(result["met"] for result in results):
        set_ranges_(prepared, histograms, best)
        damage = worst_first(prepared, student.run, images=student.cfg.calibration_images, tell=student.log.doing)
        groups = [group["group"] for group in damage]
        results += until_one_holds(fallback_trials(best, groups, student.cfg.max_trials - len(own)), judge)
    del prepared
    results = timed(results, time)
    chosen, speed = choose(results), list[SpeedRow]()
    # Keep an INT8 file even where fp16 was chosen: the file's name says INT8, and later stages compare with it.
    int8 = [index for index, result in enumerate(results) if result["number_format"] == "int8"]
    kept = int8[choose([results[index] for index in int8])]
    if student.cfg.float_where_faster and runs_here(target) and may_gain(results[kept]):
        student.log.doing(f"{target.name}: times each layer in float and in integers")
        base = trial_of(results[kept] if results[kept]["engine"] == "compress" else own[choose(own)])
        than_kept = faster_than(file_of(trial_of(results[kept]), work), student.run, target, blocks=MIXED_BLOCKS)
        speed, mixed = repaired(base, student.fp32, work, judge)
        gain = than_kept(file_of(trial_of(mixed), work)) if mixed else None
        won = bool(mixed and gain and gain.low > 1 and (mixed["met"] or not results[kept]["met"]))
        (student.log.note if won else student.log.note_detail)(f"{target.name}: {said_faster(speed, gain, won=won)}")
        speed = [{**row, "in_float": row["in_float"] and won} for row in speed]
        if mixed and won:
            chosen = len(results) if chosen == kept or mixed["met"] else chosen
            kept, results = len(results), (*results, with_time(mixed, time(trial_of(mixed))))
    shutil.copyfile(file_of(trial_of(results[kept]), work), out / f"{PTQ}.onnx")
    student.log.note(_verdict(student.cfg, target, results, chosen))
    if runs_here(target) and ptq.linear_fraction(student.fp32) > LINEAR:  # behind the others: never chosen
        results = (*results, with_time(judge(DYNAMIC), time(DYNAMIC)))
        shutil.copyfile(file_of(DYNAMIC, work), out / f"{PTQ_DYNAMIC}.onnx")
    trial = trial_of(results[chosen])
    reported = None if trial.keep_float else scores.get((trial.engine, trial.calibration))
    if reported is None:
        images = student.run.feed.validation(limit=student.cfg.score_images)
        reported = score_file(file_of(trial, work), student.run, images, optimize=runs_here(target))
    return PtqTarget(
        methods=rows,
        sensitivity=list(damage),
        trials=list(results),
        chosen=chosen,
        kept=kept,
        speed=speed,
        calibration=best,
        score=reported.score,
    )


def _judged(
    student: Student, target: Target, files: Files, judge: Callable[[Trial], TrialRow]
) -> tuple[tuple[TrialRow, ...], tuple[TrialRow, ...]]:
    """Judge this project's files and the other engines'; return both.

    Where there are many tuning images, each engine's files are compared by their KL on few of them, and only the nearest are judged on all.
    """
    cfg, few, images = student.cfg, student.few, student.baseline.images
    trials: dict[Engine, list[Trial]] = {}
    for engine, method in files:
        trials.setdefault(engine, []).append(Trial("int8", method, engine=engine))
    trials["compress"] = trials["compress"][: cfg.max_trials]
    if few is None:
        results = {engine: tuple(map(judge, tried)) for engine, tried in trials.items()}
    else:
        student.log.doing(f"{target.name}: compares {len(files)} files on {FEW_IMAGES} of {images} tuning images")
        named = {path.stem: path for path in files.values()}
        batches = as_numpy(student.run.feed.tuning(limit=FEW_IMAGES))
        found = score_files(named, batches, student.run.task.output, optimize=runs_here(target), keep_evidence=True)
        kl = {
            Trial("int8", method, engine=engine): found[path.stem].divergence(few)
            for (engine, method), path in files.items()
        }
        for trial, divergence in kl.items():
            student.log.note_detail(f"{target.name}: {trial}: KL {divergence:.3g} on {FEW_IMAGES} images")
        results = {engine: nearest_first(tried, kl, judge) for engine, tried in trials.items()}
    return results.pop("compress"), tuple(row for rows in results.values() for row in rows)


def _by_onnxruntime(student: Student, target: Target, work: Path, keep_float: Collection[str]) -> Files:
    """Build a file by each method of ONNX Runtime's own quantizer; what reads a layer in `keep_float` stays float, too."""
    batches = [images.cpu().contiguous().numpy() for images in student.calibration]
    files: Files = {}
    for method in student.cfg.methods:
        student.log.doing(f"{target.name}: builds INT8 by onnxruntime's {method}")
        path = files["onnxruntime", method] = work / f"onnxruntime-{method}.onnx"
        ptq.quantize(student.fp32, path, batches, target=target, method=method, keep_float=keep_float)
    return files


def _score(student: Student, target: Target, files: Files) -> dict[Name, Score]:
    """Score every file in ONNX Runtime on the same validation images; unoptimized where this machine is not the target."""
    images = student.run.feed.validation(limit=student.cfg.score_images)
    student.log.doing(f"{target.name}: scores {len(files)} files on the validation images")
    named = {path.stem: path for path in files.values()}
    found = score_files(named, as_numpy(images), student.run.task.output, optimize=runs_here(target))
    return {name: found[path.stem] for name, path in files.items()}


def _row(student: Student, target: Target, name: Name, path: Path, found: Score, off_grid: str | None) -> MethodRow:
    """Return the report's row of a file that was scored in ONNX Runtime; `off_grid` says why it cannot be chosen."""
    engine, method = name
    layers = audit(path) if runs_here(target) else None
    return MethodRow(
        engine=engine,
        method=method,
        scored_in="onnxruntime",
        score=found.score,
        agreement=found.agreement(student.reported),
        integer_layers=len(layers["integer_layers"]) if layers else None,
        float_layers=len(layers["float_layers"]) if layers else None,
        note=off_grid or (None if layers else "scored unoptimized: this machine is not the target"),
    )


def _by_neural_compressor(student: Student, target: Target, work: Path) -> tuple[Files, list[MethodRow]]:
    """Build neural-compressor's files; also return the report's rows of those that cannot be written, scored in PyTorch."""
    files: Files = {}
    failed: list[MethodRow] = []
    metadata = metadata_of(student.run, score=student.score, target=target)
    for algorithm in neural_compressor_ptq.ALGORITHMS if student.cfg.neural_compressor else ():
        row = MethodRow(
            engine="neural-compressor",
            method=algorithm,
            scored_in="pytorch",
            score=None,
            agreement=None,
            integer_layers=None,
            float_layers=None,
            note=None,
        )
        model = load_float(student.src, trust_code=student.run.trust_code)
        path = work / f"neural-compressor-{algorithm}.onnx"
        try:
            images = (batch.cpu() for batch in student.calibration)
            quantized = neural_compressor_ptq.quantize(model, images, target=target, algorithm=algorithm)
        except ModelError as error:
            failed.append({**row, "note": str(error)})
            continue
        try:
            with neural_compressor_ptq.quiet():
                to_onnx(quantized, path, shape=student.run.shape, metadata=metadata)
            files["neural-compressor", algorithm] = path
        except BundleError as error:
            found = _score_in_torch(quantized, student.cfg, student.run)
            failed.append(
                {**row, "score": found.score, "agreement": found.agreement(student.reported), "note": str(error)}
            )
    return files, failed


def _judge(student: Student, target: Target, files: Files, work: Path) -> Callable[[Trial], TrialRow]:
    """Return a function that judges a trial on the tuning images, with a file from `files` or one it builds."""
    cfg, run = student.cfg, student.run

    def build(trial: Trial, path: Path) -> None:
        student.log.doing(f"{target.name}: tries {trial}")
        if trial.number_format == "fp16":
            write_float16(student.fp32, path, run)
        elif trial == DYNAMIC:
            ptq.quantize_dynamically(student.fp32, path)
        elif not trial.keep_float:
            shutil.copyfile(files[trial.engine, trial.calibration], path)
        else:
            prepared = student.prepared(target, trial.keep_float)
            calibrate_(prepared, student.calibration, _method(cfg, trial))
            student.export(corrected(prepared, student.correction_images), path, target)

    return judge_of(
        build,
        lambda path: tuning_score(path, run, optimize=runs_here(target)),
        baseline=student.baseline,
        max_drop=cfg.max_drop,
        folder=work,
        tell=lambda result: student.log.note_detail(f"{target.name}: {said(result)}"),
    )


def _method(cfg: PtqStage, trial: Trial) -> Method:
    return next(method for method in cfg.methods if method == trial.calibration)


@torch.no_grad()
def _score_in_torch(model: nn.Module, cfg: PtqStage, run: Run) -> Score:
    """Score a network on validation images on the CPU."""
    batches = [
        (model(batch.images.cpu()).float().numpy(), batch.targets.cpu().numpy())
        for batch in run.feed.validation(limit=cfg.score_images)
    ]
    return score_of(run.task.output, *zip(*batches, strict=True))


def _method_line(target: Target, row: MethodRow) -> str:
    name = f"{target.name}: {row['engine']}, {row['method']}"
    if row["score"] is None or row["agreement"] is None:
        return f"{name}: {row['note']}"
    layers = "" if row["integer_layers"] is None else f", {row['integer_layers']} layers in integers"
    note = f" ({row['note']})" if row["note"] else ""
    return f"{name}: score {_percent(row['score'])}, agreement {_percent(row['agreement'])}{layers}{note}"


def _verdict(cfg: PtqStage, target: Target, results: Sequence[TrialRow], chosen: int) -> str:
    best, allowed = results[chosen], f"{_points(cfg.max_drop)} points"
    if best["met"]:
        return f"{target.name}: {trial_of(best)} loses at most {allowed}; {len(results)} trials made"
    return (
        f"{target.name}: all {len(results)} trials lose more than {allowed}; "
        f"the best, {trial_of(best)}, loses {_points(best['drop'])}"
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _points(drop: float) -> str:
    return f"{100 * drop:.2f}"
