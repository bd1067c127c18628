"""Try ways to build a small file, cheapest first, until one keeps the accuracy; the caller brings `build` and `score`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from compress.quant.rows import Engine, TrialRow
from export.command.files import key_of, write_json
from export.errors import first
from export.runtime.accuracy import Score
from export.runtime.latency import Ratio

CLOSE = 1.25  # times the lowest KL on few images: on all images, one of these has the lowest in 97 % of draws (docs/results.md)


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
        kept = f", in float: {first(self.keep_float)}" if self.keep_float else ""
        whose = "" if self.engine == "compress" else f"{self.engine}'s "
        return f"int8 by {whose}{self.calibration}{kept}"


def trial_of(row: TrialRow) -> Trial:
    """Return how a row's file was built."""
    return Trial(row["number_format"], row["calibration"], tuple(row["keep_float"]), row["engine"])


def said(row: TrialRow) -> str:
    """Return a trial and its result in one line."""
    faster = "" if row["latency_ratio"] is None else f", {row['latency_ratio']:.2f} times as fast as FP32"
    lost = f"{100 * row['drop']:.2f} points below float"
    verdict = "holds" if row["met"] else "loses too much"
    return f"trial {trial_of(row)}: KL {row['kl']:.3g}, score {100 * row['score']:.2f} %, {lost}{faster}: {verdict}"


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
    tell: Callable[[TrialRow], None] = lambda _: None,
) -> Callable[[Trial], TrialRow]:
    """Return a function that builds a trial's file, scores it, and tells whether it loses at most `max_drop` of score.

    The file stays at `file_of(trial, folder)`; a trial whose result is there already is not built again.
    """

    def judge(trial: Trial) -> TrialRow:
        path = file_of(trial, folder)
        known = path.with_suffix(".json")
        result: TrialRow | None = json.loads(known.read_text()) if known.exists() else None
        if result is None:
            build(trial, path)
            found = score(path)
            drop = baseline.score - found.score
            row = TrialRow(
                number_format=trial.number_format,
                calibration=trial.calibration,
                keep_float=list(trial.keep_float),
                engine=trial.engine,
                score=found.score,
                drop=drop,
                agreement=found.agreement(baseline),
                kl=found.divergence(baseline),
                latency_ratio=None,
                latency_ci95=None,
                met=drop <= max_drop + 1e-9,  # differences of floats are not exact
            )
            result = with_time(row, faster(path))
            write_json(known, result)
        tell(result)
        return result

    return judge


def until_one_holds(trials: Sequence[Trial], judge: Callable[[Trial], TrialRow]) -> tuple[TrialRow, ...]:
    """Judge the trials in order up to the first that meets `max_drop`."""
    results: list[TrialRow] = []
    for trial in trials:
        results.append(judge(trial))
        if results[-1]["met"]:
            break
    return tuple(results)


def nearest_first(
    trials: Sequence[Trial], kl: Mapping[Trial, float], judge: Callable[[Trial], TrialRow]
) -> tuple[TrialRow, ...]:
    """Judge trials in the order of their KL on few images: all within CLOSE of the lowest, and if none of them meets `max_drop`, more up to one that does."""
    ranked = sorted(trials, key=kl.__getitem__)
    near = [trial for trial in ranked if kl[trial] <= CLOSE * kl[ranked[0]]]
    results = tuple(map(judge, near))
    return results if any(row["met"] for row in results) else results + until_one_holds(ranked[len(near) :], judge)


def rivals(results: Sequence[TrialRow]) -> list[int]:
    """Return the index of each engine's file with the lowest KL, of those that meet `max_drop`, or of all if none does."""
    held = [index for index, result in enumerate(results) if result["met"]] or list(range(len(results)))
    by_engine: dict[Engine, int] = {}
    for index in sorted(held, key=lambda index: results[index]["kl"]):
        by_engine.setdefault(results[index]["engine"], index)
    return list(by_engine.values())


def timed(results: Sequence[TrialRow], faster: Callable[[Trial], Ratio | None]) -> tuple[TrialRow, ...]:
    """Return the results with the times of those that `choose` compares, among all and among the INT8 files alone."""
    int8 = [index for index, result in enumerate(results) if result["number_format"] == "int8"]
    compared = {*rivals(results), *(int8[index] for index in rivals([results[index] for index in int8]))}
    return tuple(
        with_time(result, faster(trial_of(result))) if index in compared and result["latency_ratio"] is None else result
        for index, result in enumerate(results)
    )


def with_time(row: TrialRow, speed: Ratio | None) -> TrialRow:
    """Return a trial's row with its speed-up over the float file."""
    ends = [speed.low, speed.high] if speed else None
    return {**row, "latency_ratio": speed.ratio if speed else None, "latency_ci95": ends}


def choose(results: Sequence[TrialRow]) -> int:
    """Return the index of the best file among those that meet `max_drop`, or among all if none does.

    Files of one engine are equally fast, so each engine's best is the one with the lowest KL: on training images, KL predicts the score
    on other images better than score or agreement do (docs/decisions.md). Between engines the fastest wins; if intervals overlap, the
    lowest KL among the fastest. Without times this project's own file wins: a file with more float layers has a lower KL, but is slower.
    """
    best = rivals(results)
    ends = {index: interval for index in best if (interval := results[index]["latency_ci95"]) is not None}
    if len(ends) < len(best):
        return next((index for index in best if results[index]["engine"] == "compress"), best[0])
    fastest = max(low for low, _ in ends.values())
    return next(index for index, (_, high) in ends.items() if high >= fastest)


def file_of(trial: Trial, folder: Path) -> Path:
    """Return the path of a trial's file."""
    return folder / f"{key_of(asdict(trial))}.onnx"
