"""Which orders of stages are allowed: what each takes and gives, and which stages it needs before or behind it."""

from collections.abc import Sequence
from typing import Literal

from compress.recipe.stages import (
    AuditLimits,
    DistillStage,
    ExportStage,
    QatStage,
    SourceStage,
    StageSection,
    StudentStage,
)

Kind = Literal["nothing", "float", "fakequant", "onnx"]
Mistake = tuple[int, str]  # index of the stage in its chain, and the message

# What each stage takes and gives; these tables alone decide the order of stages.
TAKES: dict[str, frozenset[Kind]] = {
    "source": frozenset({"nothing"}),
    "student": frozenset({"float"}),
    "prune": frozenset({"float"}),
    "distill": frozenset({"float"}),
    "ptq": frozenset({"float"}),
    "qat": frozenset({"float"}),
    "export": frozenset({"float", "fakequant"}),
    "bench": frozenset({"onnx"}),
}
GIVES: dict[str, Kind] = {
    "source": "float",
    "student": "float",
    "prune": "float",
    "distill": "float",
    "ptq": "float",
    "qat": "fakequant",
    "export": "onnx",
    "bench": "onnx",
}


def _out_of_order(stages: Sequence[StageSection]) -> Mistake | None:
    kind: Kind = "nothing"
    for index, section in enumerate(stages):
        if kind not in TAKES[section.stage]:
            wanted = " or ".join(sorted(TAKES[section.stage]))
            before = f"{stages[index - 1].stage} gives {kind}" if index else "the first stage starts from nothing"
            return index, (
                f": {section.stage} takes {wanted}, but {before}; "
                "the usual order is source, prune, distill, ptq, qat, export, bench"
            )
        kind = GIVES[section.stage]
    return None


def _qat_unjustified(stages: Sequence[StageSection]) -> Mistake | None:
    names = [section.stage for section in stages]
    if "qat" in names and "ptq" not in names[: names.index("qat")]:
        return names.index("qat"), ": qat needs a ptq stage before it, to be compared with: add `- stage: ptq`"
    return None


def _qat_of_unknown_length(stages: Sequence[StageSection]) -> Mistake | None:
    trained = any(isinstance(section, SourceStage | DistillStage) and section.fit for section in stages)
    for index, section in enumerate(stages):
        if isinstance(section, QatStage) and section.fit is None and not trained:
            return index, ".fit: missing, and no float training to derive it from: set it, or add a distill stage"
    return None


def _student_untaught(stages: Sequence[StageSection]) -> Mistake | None:
    names = [section.stage for section in stages]
    for index, section in enumerate(stages):
        if not isinstance(section, StudentStage):
            continue
        if index != 1:
            return (
                index,
                f": student starts another network, which discards the work of {names[index - 1]}: move it behind source",
            )
        if not section.is_trained and "distill" not in names[index:]:
            return index, ": its classifier starts untrained: add a distill stage behind it, or give weights"
    return None


def _limits_of_nothing(stages: Sequence[StageSection]) -> Mistake | None:
    if {"ptq", "qat"}.isdisjoint(section.stage for section in stages):
        for index, section in enumerate(stages):
            if isinstance(section, ExportStage) and section.limits != AuditLimits():
                return index, ".limits: limits an INT8 file, and there is none: add `- stage: ptq`, or leave it out"
    return None


def first_mistake(stages: Sequence[StageSection]) -> Mistake | None:
    """Return the first mistake in a chain of stages, None where there is none."""
    judges = (_out_of_order, _qat_unjustified, _qat_of_unknown_length, _student_untaught, _limits_of_nothing)
    return next(filter(None, (judge(stages) for judge in judges)), None)
