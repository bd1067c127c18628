"""Run a recipe: reuse the stages that are cached, make the others, then report.

A stage's key is a digest of its settings and of its parent's key, so unchanged stages are reused.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from compress.artifact import Meta, damage, exclusive, finish, is_complete, lineage, read_meta, turn
from compress.data.digest import FILES, changes, dataset_digest, given, unlabelled_digest
from compress.errors import ArtifactError, CompressError
from compress.logs.stage_log import Tell, say
from compress.logs.trackers import opened
from compress.models.digest import class_names, code_digest, source_digest, teachers_digest
from compress.ranks import barrier, first_decides, rank
from compress.recipe.arguments import data_settings, goal_of, providers_of, softmax_of, teachers_of
from compress.recipe.order import GIVES, TAKES
from compress.recipe.schema import Decode, Recipe
from compress.recipe.stages import StageSection
from compress.report.files import report_root, report_run, run_root
from export.command.files import key_of, write_json
from export.errors import did_you_mean
from export.onnx_file.targets import resolve_target
from export.runtime.environment import environment, fingerprint, runtime, version
from export.runtime.providers import PROVIDERS

if TYPE_CHECKING:
    from compress.run import Run

PLANNED = "stages.json"  # in the run's folder: the directory of each stage, in order
# Raised when a stage makes something else from the same settings.
VERSIONS = {"source": 5, "student": 1, "prune": 16, "distill": 12, "ptq": 15, "qat": 20, "export": 15, "bench": 6}


@dataclass(frozen=True)
class PlanLine:
    """One stage of a recipe: its artifact's directory, and whether that is complete."""

    stage: str
    key: str
    cached: bool
    reason: str
    directory: Path


def plan_recipe(recipe: Recipe, *, stages: Path | None = None) -> list[PlanLine]:
    """Return for every stage of one chain whether it would run, and why; import no torch and run no code of the recipe.

    `stages` is the folder of the artifacts (None: the run's own). Raises CompressError for missing data or weights.
    """
    lines: list[PlanLine] = []
    for index, (section, key) in enumerate(zip(recipe.stages, _keys(recipe), strict=True)):
        directory = (stages or run_root(recipe)) / f"{index:02d}-{section.stage}-{key}"
        cached = is_complete(directory) and all(line.cached for line in lines)
        reason = "unchanged" if cached else _why(recipe, index, section, directory, lines)
        lines.append(PlanLine(section.stage, key, cached, reason, directory))
    return lines


def run_recipe(
    recipe: Recipe, *, trust_code: bool, until: str | None, verbose: bool, command: str, stages: Path | None = None
) -> int:
    """Make missing stages, write the report and the bundle, print the tables; return 0, or 1 where a target is missed.

    With `until` a stage, the report of an earlier run that went further is kept. `stages` is a folder that several runs
    may share, even at the same time: they wait for a stage that one of them is making.
    """
    chains = recipe.chains()
    plans = first_decides(lambda: {student: plan_recipe(chain, stages=stages) for student, chain in chains.items()})
    if until is not None:
        plans = {student: plan[: _position(chains[student], until) + 1] for student, plan in plans.items()}
    say(f"{recipe.name}: {_outlook(plans)}")  # importing torch takes seconds
    root = run_root(recipe)
    settings = recipe.model_dump(mode="json")
    with (
        exclusive(root) if rank() == 0 else nullcontext(),
        opened(recipe.log_to if rank() == 0 else (), recipe.name, root, settings) as trackers,
    ):
        made: set[Path] = set()
        if rank() == 0 and not recipe.students:
            write_json(root / PLANNED, [str(line.directory.resolve()) for line in plans[""]])
        if not all(line.cached for plan in plans.values() for line in plan):
            made = _make_missing(recipe, plans, trust_code=trust_code, verbose=verbose, tell=trackers.epoch)
        if rank() != 0:
            return 0
        artifacts = {student: [line.directory for line in plan] for student, plan in plans.items()}
        code = report_run(recipe, artifacts, made, command=command, verbose=verbose)
        trackers.finish({student: report_root(recipe, student) for student in chains})
        return code


def _outlook(plans: Mapping[str, list[PlanLine]]) -> str:
    """Return a phrase for the stages that will run."""
    lines = {line.directory: line for plan in plans.values() for line in plan}.values()
    missing = [line.stage for line in lines if not line.cached]
    if not missing:
        return f"all {len(lines)} stages are cached"
    kept = len(lines) - len(missing)
    return f"{', '.join(missing)} will run" + (f", {kept} of {len(lines)} stages are cached" if kept else "")


def run_stage(recipe: Recipe, stage: str, *, src: Path | None, out: Path, trust_code: bool, verbose: bool) -> int:
    """Run one stage of the recipe alone, from an artifact directory to a new one.

    Raises ArtifactError where `out` exists or `src` is of a kind that the stage does not take.
    """
    section = recipe.stages[_position(recipe, stage)]
    if out.exists():
        raise ArtifactError(f"{out}: exists already; name a new folder with --out")
    kind = "nothing" if src is None else read_meta(src).kind
    if kind not in TAKES[stage]:
        raise ArtifactError(
            f"--src: {stage} takes {' or '.join(sorted(TAKES[stage]))}, but {src or 'no folder'} contains {kind}"
        )
    if fault := next(filter(None, map(damage, [] if src is None else lineage(src))), None):
        raise ArtifactError(f"--src: {fault}; run its recipe again")
    out.parent.mkdir(parents=True, exist_ok=True)
    key = key_of({"section": section.model_dump(mode="json"), "src": None if src is None else read_meta(src).key})
    from compress.run import open_run

    _make(section, key, src, out, open_run(recipe, trust_code=trust_code, verbose=verbose))
    return 0


def _keys(recipe: Recipe) -> Iterator[str]:
    """Yield every stage's key, in order."""
    settings = data_settings(recipe)
    key = key_of(
        {
            "task": recipe.task,
            "seed": recipe.seed,
            "data": dataset_digest(settings, given(settings)),
            "augment": recipe.data.augment.model_dump(mode="json"),
            **({} if recipe.data.balance == "none" else {"balance": recipe.data.balance}),
            **({} if recipe.decode is None else {"decode": _decode_facts(recipe.decode)}),
            **({} if recipe.data.classes is None else {"classes": class_names(Path(recipe.data.classes))}),
            **(
                {"teacher": teachers_digest(teachers_of(recipe))}
                if recipe.model is None
                else {
                    "model": source_digest(recipe.model.arch, recipe.model.weights),
                    "reset_head": recipe.model.reset_head,
                    **({"outputs": list(recipe.model.outputs.items())} if recipe.model.outputs else {}),
                    **({"softmax": classes} if (classes := softmax_of(recipe)) else {}),
                }
            ),
        }
    )
    for section in recipe.stages:
        key = key_of(
            {
                "section": section.model_dump(mode="json"),
                "parent": key,
                "version": VERSIONS[section.stage],
                "more": _outside(recipe, section),
            }
        )
        yield key


def _decode_facts(decode: Decode) -> dict[str, object]:
    code = code_digest(decode.function, "decode") if ".py:" in decode.function else decode.function
    return {**decode.model_dump(mode="json"), "function": code}


def _outside(recipe: Recipe, section: StageSection) -> list[object]:
    """Return the inputs of a stage's key that are neither in its section nor in its parent's key."""
    found: list[object] = []
    if recipe.data.unlabelled is not None and section.stage != "source":
        found.append(unlabelled_digest(data_settings(recipe)))
    if section.stage in ("ptq", "qat", "export"):
        found += [resolve_target(recipe.target).name, *recipe.further_targets]
    if section.stage in ("distill", "qat") or (section.stage == "prune" and section.recover is not None):
        found.append(recipe.teaching.model_dump(mode="json"))
        found += [teachers_digest(teachers_of(recipe))] if recipe.teacher else []
    if section.stage == "prune" and goal_of(section).cost == "latency":  # networks are timed as they will be served
        found += [resolve_target(recipe.target).name, any(other.stage in ("ptq", "qat") for other in recipe.stages)]
    if section.stage == "student":
        found.append(source_digest(section.arch, section.weights))
    # Their measurements depend on ONNX Runtime, those of the last two also on the machine.
    if section.stage in ("ptq", "export", "bench"):
        found.append(runtime()["onnxruntime"])
    if section.stage in ("export", "bench"):
        found.append(_machine())
    if section.stage in ("ptq", "bench"):  # as are their choices on what else the machine has
        found += [f"{key} {version(PROVIDERS[key].package)}" for key in providers_of(recipe) if PROVIDERS[key].plugin]
    if section.stage == "bench" and recipe.score is not None:
        found.append(code_digest(recipe.score))
    return found


@cache
def _machine() -> str:
    return fingerprint(environment())  # takes a second, as it asks the GPU's driver


def _why(recipe: Recipe, index: int, section: StageSection, directory: Path, before: list[PlanLine]) -> str:
    """Return why a stage must run: what changed since the newest artifact of the same stage."""
    if index and not before[index - 1].cached:
        return f"{before[index - 1].stage} runs"
    if directory.exists():
        return damage(directory) or ""
    if (directory.parent / f".{directory.name}.partial").exists():
        return "was interrupted; continues"
    others = directory.parent.glob(f"{index:02d}-{section.stage}-*")
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(ArtifactError):
            found = [
                *_differences("", read_meta(path).section, section.model_dump(mode="json")),
                *_other_files(path, recipe),
            ]
            return (
                f"changed: {', '.join(found)}"
                if found
                else "the data's settings, the model, the seed, the machine or the tool changed"
            )
    return "not made yet"


def _other_files(source: Path, recipe: Recipe) -> Iterator[str]:
    """Yield a phrase for the images that changed since a source stage was made; nothing for other stages."""
    if (source / FILES).is_file():
        before = json.loads((source / FILES).read_text(encoding="utf-8"))
        if found := changes(before, given(data_settings(recipe)).digests):
            yield found


def _differences(path: str, old: object, new: object) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(f"{path}.{name}" if path else name, old.get(name), new.get(name))
    elif old != new:
        yield f"{path} {old} to {new}"


def _position(recipe: Recipe, stage: str) -> int:
    names = [section.stage for section in recipe.stages]
    if stage not in names:
        near = did_you_mean(stage, names)
        raise CompressError(f"stage {stage}: this recipe has {', '.join(names)}{near and f'; {near}'}")
    return names.index(stage)


def _make_missing(
    recipe: Recipe, plans: Mapping[str, list[PlanLine]], *, trust_code: bool, verbose: bool, tell: Tell
) -> set[Path]:
    """Make every chain's missing stages and return them; stages that students share are made once, by the recipe's run."""
    from compress.rehearsal import rehearse
    from compress.run import open_run

    made: set[Path] = set()
    run = replace(open_run(recipe, trust_code=trust_code, verbose=verbose), tell=tell)
    missing = {student: [not line.cached for line in plan] for student, plan in plans.items()}
    if not run.task.output.labelled and any(map(any, missing.values())):
        _ = run.dataset  # all ranks label it together: the rehearsal is rank 0's alone
    first_decides(partial(rehearse, run, missing))
    for student, chain in recipe.chains().items():
        parent: Path | None = None
        for index, (line, section) in enumerate(zip(plans[student], chain.stages, strict=False)):
            # Checked again now: if an ancestor was made again to the same bits, its descendants are still valid.
            with turn(line.directory) if run.rank == 0 else nullcontext():
                if (fault := first_decides(partial(damage, line.directory))) is not None:
                    if run.rank == 0 and line.directory.exists():
                        sys.stderr.write(f"{fault}; {line.stage} runs again\n")
                    own = run if index < len(recipe.stages) else run.of(chain)
                    _make(section, line.key, parent, line.directory, own)
                    made.add(line.directory)
            parent = line.directory
    return made


def _make(section: StageSection, key: str, parent: Path | None, directory: Path, run: "Run") -> None:
    """Run one stage in a hidden directory beside its final one, then rename it."""
    from compress.stages import STAGES

    work = directory.parent / f".{directory.name}.partial"
    parent_digest = None if parent is None else read_meta(parent).digest
    started = time.monotonic()
    if run.rank == 0:
        _open(work, parent_digest)
    barrier()
    if not work.is_dir():
        raise ArtifactError(f"{directory.parent}: is not rank 0's folder; give one that all machines share with --out")
    metrics = {}
    if run.rank == 0 or GIVES[section.stage] != "onnx":
        metrics = STAGES[section.stage](section, parent, work, run)
    if run.rank == 0:
        for leftover in (*work.glob("checkpoint-*"), *work.glob(".*")):
            leftover.unlink()
        meta = Meta(
            stage=section.stage,
            key=key,
            parent=None if parent is None else os.path.relpath(parent, directory.parent),
            parent_digest=parent_digest,
            kind=GIVES[section.stage],
            section=section.model_dump(mode="json"),
            version=VERSIONS[section.stage],
            seconds=time.monotonic() - started,
            metrics=metrics,
            files={},
        )
        finish(work, directory, meta)
    barrier()


def _open(work: Path, parent_digest: str | None) -> None:
    """Make the working directory, or keep an interrupted run's if it has the same parent."""
    origin = work / ".parent"
    if origin.exists() and origin.read_text() != str(parent_digest):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    origin.write_text(str(parent_digest))
