"""Try ways to build a small file, cheapest first, until one keeps the accuracy; the caller brings `build` and `score`."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from export.command.files import key_of, write_json
from export.runtime.accuracy import Score
from export.runtime.latency import Ratio

Engine = Literal["compress", "onnxruntime", "neural-compressor"]  # which library quantizes


@dataclass(frozen=True)
class Trial:
    """One way to build a file; for fp16, `calibration` is "none"."""

    number_format: Literal["int8", "fp16"]
    calibration: str
    keep_float: tuple[str, ...] = ()
    engine: Engine = "compress"

    def __str__(self) -> str:
        if self.number_format == "fp16":
            return "fp16"
        kept = f", in float: {', '.join(self.keep_float)}" if self.keep_float else ""
        whose = "" if self.engine == "compress" else f"{self.engine}'s "
        return f"int8 by {whose}{self.calibration}{kept}"


@dataclass(frozen=True)
class TrialResult:
    """A trial's file compared with the float network on the same images; `kl` is the mean over images, in nats."""

    trial: Trial
    score: float
    drop: float
    agreement: float
    kl: float
    latency_ratio: float | None  # the float file's time over this file's
    latency_ci95: tuple[float, float] | None  # of latency_ratio
    met: bool

    def __str__(self) -> str:
        faster = "" if self.latency_ratio is None else f", {self.latency_ratio:.2f} times as fast as FP32"
        lost = f"{100 * self.drop:.2f} points below float"
        verdict = "holds" if self.met else "loses too much"
        return f"trial {self.trial}: KL {self.kl:.3g}, score {100 * self.score:.2f} %, {lost}{faster}: {verdict}"

    def to_json(self) -> dict[str, Any]:
        """Return one flat object, the trial's fields first."""
        fields = asdict(self)
        trial: dict[str, Any] = fields.pop("trial")
        return trial | fields


def fallback_trials(method: str, worst_first: Sequence[str], max_trials: int) -> tuple[Trial, ...]:
    """Return int8 trials with the worst 1, 2, 4, 8 … groups in float, then fp16, which is last even when trials are few."""
    if max_trials < 1:
        return ()
    counts = [2**power for power in range(len(worst_first)) if 2**power < len(worst_first)]
    kept = [Trial("int8", method, tuple(worst_first[:count])) for count in counts]
    return (*kept[: max_trials - 1], Trial("fp16", "none"))


def judge_of(
    build: Callable[[Trial, Path], None],
    score: Callable[[Path], Score],
    *,
    baseline: Score,
    max_drop: float,
    folder: Path,
    faster: Callable[[Path], Ratio | None] = lambda _: None,
    tell: Callable[[TrialResult], None] = lambda _: None,
) -> Callable[[Trial], TrialResult]:
    """Return a function that builds a trial's file, scores it, and tells whether it loses at most `max_drop` of score.

    The file stays at `file_of(trial, folder)`; a trial whose result is there already is not built again.
    """

    def judge(trial: Trial) -> TrialResult:
        path = file_of(trial, folder)
        result = _read(path.with_suffix(".json"))
        if result is None:
            build(trial, path)
            found = score(path)
            drop, speed = baseline.score - found.score, faster(path)
            result = TrialResult(
                trial,
                score=found.score,
                drop=drop,
                agreement=found.agreement(baseline),
                kl=found.divergence(baseline),
                latency_ratio=speed.ratio if speed else None,
                latency_ci95=(speed.low, speed.high) if speed else None,
                met=drop <= max_drop + 1e-9,  # differences of floats are not exact
            )
            write_json(path.with_suffix(".json"), result.to_json())
        tell(result)
        return result

    return judge


def until_one_holds(trials: Sequence[Trial], judge: Callable[[Trial], TrialResult]) -> tuple[TrialResult, ...]:
    """Judge the trials in order up to the first that meets `max_drop`."""
    results: list[TrialResult] = []
    for trial in trials:
        results.append(judge(trial))
        if results[-1].met:
            break
    return tuple(results)


def choose(results: Sequence[TrialResult]) -> int:
    """Return the index of the best file among those that meet `max_drop`, or among all if none does.

    Files of one engine are equally fast, so each engine's best is the one with the lowest KL: on training images, KL predicts the score
    on other images better than score or agreement do (docs/decisions.md). Between engines the fastest wins; if intervals overlap, the
    lowest KL among the fastest. Without times this project's own file wins: a file with more float layers has a lower KL, but is slower.
    """
    held = [index for index, result in enumerate(results) if result.met] or list(range(len(results)))
    by_engine: dict[Engine, int] = {}
    for index in sorted(held, key=lambda index: results[index].kl):
        by_engine.setdefault(results[index].trial.engine, index)
    ends = {index: results[index].latency_ci95 for index in by_engine.values()}
    timed = {index: interval for index, interval in ends.items() if interval is not None}
    if len(timed) < len(ends):
        return by_engine.get("compress", next(iter(ends)))
    fastest = max(low for low, _ in timed.values())
    return next(index for index, (_, high) in timed.items() if high >= fastest)


def file_of(trial: Trial, folder: Path) -> Path:
    """Return the path of a trial's file."""
    return folder / f"{key_of(asdict(trial))}.onnx"


def _read(path: Path) -> TrialResult | None:
    if not path.exists():
        return None
    fields = json.loads(path.read_text())
    trial = {field.name: fields.pop(field.name) for field in dataclasses.fields(Trial)}
    interval = fields.pop("latency_ci95")
    return TrialResult(
        Trial(**trial | {"keep_float": tuple(trial["keep_float"])}),
        latency_ci95=interval and tuple(interval),
        **fields,
    )
