"""Try one way to a small file after the other until the accuracy holds; neural-compressor's `autotune` says when that is.

A trial is built by our own exporter and scored in ONNX Runtime: `build` and `score` are the caller's.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from compress.artifact import key_of, write_json
from compress.quant.neural_compressor_ptq import quiet
from export.runtime.accuracy import Score

ALGORITHM = "compress"  # the name of our exporter in neural-compressor's table of algorithms


@dataclass(frozen=True)
class Trial:
    """One way to build a file; fp16 is calibrated by "none"."""

    number_format: Literal["int8", "fp16"]
    calibration: str
    keep_float: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.number_format == "fp16":
            return "fp16"
        kept = f", in float: {', '.join(self.keep_float)}" if self.keep_float else ""
        return f"int8 by {self.calibration}{kept}"


@dataclass(frozen=True)
class TrialResult:
    """What a trial's file reached against the float network, on the same images."""

    trial: Trial
    top1: float
    top1_drop: float
    agreement: float
    latency_ratio: float | None  # the float file's time / its time
    met: bool

    def __str__(self) -> str:
        faster = "" if self.latency_ratio is None else f", {self.latency_ratio:.2f} times as fast as FP32"
        lost = f"{100 * self.top1_drop:.2f} points below float"
        return f"trial {self.trial}: top-1 {100 * self.top1:.2f} %, {lost}{faster}: {'holds' if self.met else 'loses too much'}"

    def to_json(self) -> dict[str, Any]:
        """Return one flat object, the trial's fields first."""
        fields = asdict(self)
        trial: dict[str, Any] = fields.pop("trial")
        return trial | fields


def calibration_trials(methods: Sequence[str], max_trials: int) -> tuple[Trial, ...]:
    """Return int8 by each method."""
    return tuple(Trial("int8", method) for method in methods[:max_trials])


def fallback_trials(method: str, worst_first: Sequence[str], max_trials: int) -> tuple[Trial, ...]:
    """Return int8 with the worst 1, 2, 4, 8 … groups in float, then fp16, which keeps its place when trials are few."""
    if max_trials < 1:
        return ()
    counts = [2**power for power in range(len(worst_first)) if 2**power < len(worst_first)]
    kept = [Trial("int8", method, tuple(worst_first[:count])) for count in counts]
    return (*kept[: max_trials - 1], Trial("fp16", "none"))


def tune(
    trials: Sequence[Trial],
    build: Callable[[Trial, Path], None],
    score: Callable[[Path], Score],
    *,
    baseline: Score,
    max_top1_drop: float,
    folder: Path,
    latency_ratio: Callable[[Path], float | None] = lambda _: None,
    tell: Callable[[TrialResult], None] = lambda _: None,
) -> tuple[tuple[TrialResult, ...], int]:
    """Run the trials in order until one loses at most `max_top1_drop` of the baseline's top-1; return the results and the chosen index.

    `build` writes a trial's file, which stays at `file_of(trial, folder)`; one whose result is already there is not built again.
    """
    results: list[TrialResult] = []

    def attempt(trial: Trial) -> float:
        path = file_of(trial, folder)
        result = _read(path.with_suffix(".json"))
        if result is None:
            build(trial, path)
            result = _judge(trial, path, score(path), baseline, max_top1_drop, latency_ratio)
            write_json(path.with_suffix(".json"), result.to_json())
        results.append(result)
        tell(result)
        return 1 - result.top1_drop

    folder.mkdir(parents=True, exist_ok=True)
    _autotune(trials, attempt, max_top1_drop)
    return tuple(results), choose(results)


def choose(results: Sequence[TrialResult]) -> int:
    """Return the first trial that holds, else the most accurate one."""
    return max(range(len(results)), key=lambda index: (results[index].met, results[index].top1, -index))


def file_of(trial: Trial, folder: Path) -> Path:
    """Return where `tune` leaves a trial's file."""
    return folder / f"{key_of(asdict(trial))}.onnx"


def _judge(
    trial: Trial,
    path: Path,
    found: Score,
    baseline: Score,
    max_top1_drop: float,
    latency_ratio: Callable[[Path], float | None],
) -> TrialResult:
    drop = baseline.top1 - found.top1
    return TrialResult(
        trial,
        top1=found.top1,
        top1_drop=drop,
        agreement=found.agreement(baseline),
        latency_ratio=latency_ratio(path),
        met=1 - drop >= 1 - max_top1_drop,  # to the bit what `autotune` compares
    )


def _read(path: Path) -> TrialResult | None:
    if not path.exists():
        return None
    fields = json.loads(path.read_text())
    kept = tuple(fields.pop("keep_float"))
    return TrialResult(Trial(fields.pop("number_format"), fields.pop("calibration"), kept), **fields)


class _Candidate(nn.Module):
    """What `autotune` passes around in place of a network: the trial that it stands for, None for the float network."""

    trial: Trial | None = None


def _autotune(trials: Sequence[Trial], attempt: Callable[[Trial], float], tolerable_loss: float) -> None:
    """Let neural-compressor attempt the trials, where `attempt` returns the score and the float network's is 1.

    With that baseline its relative loss is the absolute one.
    """
    with quiet():
        from neural_compressor.common.base_config import BaseConfig
        from neural_compressor.torch.quantization import TuningConfig, autotune
        from neural_compressor.torch.utils.utility import algos_mapping, register_algo

        class TrialConfig(BaseConfig):  # type: ignore[misc]
            """A trial, as neural-compressor's loop wants its configurations."""

            name = ALGORITHM
            params_list = ("trial",)

            def __init__(self, trial: Trial) -> None:
                super().__init__()
                self.trial = trial

            def expand(self) -> list["TrialConfig"]:
                return [self]

            def get_model_info(self, **_: object) -> list[object]:
                return []

            def to_config_mapping(self, **_: object) -> dict[str, "TrialConfig"]:
                return {"network": self}

            @classmethod
            def get_config_set_for_tuning(cls) -> list["TrialConfig"]:
                return [cls(trial) for trial in trials]

            @classmethod
            def register_supported_configs(cls) -> list[object]:
                return []

        @register_algo(ALGORITHM)  # type: ignore[untyped-decorator]
        def mark(candidate: _Candidate, configs: dict[str, TrialConfig], **_: object) -> _Candidate:
            candidate.trial = configs["network"].trial
            return candidate

        def evaluate(candidate: _Candidate) -> float:
            return 1.0 if candidate.trial is None else attempt(candidate.trial)

        settings = TuningConfig(
            config_set=TrialConfig.get_config_set_for_tuning(), tolerable_loss=tolerable_loss, max_trials=len(trials)
        )
        try:
            autotune(_Candidate(), settings, eval_fn=evaluate)
        finally:
            del algos_mapping[ALGORITHM]
