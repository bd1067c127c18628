"""How far a comparison is fair: other images, other machines, other teachers, each in a sentence."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from compress.report.comparison.candidate import Candidate
from compress.report.comparison.recipes import by_value
from compress.report.numbers import significant
from compress.report.shape import Report
from export.runtime.environment import HARDWARE

SpeedBy = Literal["latency", "speedup"]
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
# Settings that decide what is shown to the network when it is scored; `path` decides by its content, which the digest covers.
IMAGES = ("dataset", "image_size", "resize", "mean", "std", "val_fraction", "skip_broken")
DRIFT = 1.05  # the same teacher on the same machine: more than 5 % apart says that the machine was not equally free


class Fairness(NamedTuple):
    """What may be ranked, and a sentence for each thing that stands against it."""

    same_images: bool
    same_teacher: bool
    speed_by: SpeedBy | None
    warnings: tuple[str, ...]


def judge_fairness(found: Sequence[Candidate], reports: Mapping[str, Report], *, are_alike: bool) -> Fairness:
    """Return what may be ranked; `are_alike` says that all times were taken under the same conditions."""
    images, teachers = _other_images(found, reports), {_teacher(one) for one in found}
    timed = [one for one in found if one.p50_ms]
    speed_by, against_speed = _speed(timed, reports, are_alike=are_alike, same_teacher=len(teachers) == 1)
    warnings = [*images, *_other_split(reports), *_scored_elsewhere(found), *against_speed]
    if len(teachers) > 1:
        whose = "a speed-up and a loss are against each run's own"
        warnings.append(f"The teachers differ ({_grouped(found, _teacher)}): {whose}.")
    return Fairness(not images, len(teachers) == 1, speed_by, tuple(warnings))


def _speed(
    timed: Sequence[Candidate], reports: Mapping[str, Report], *, are_alike: bool, same_teacher: bool
) -> tuple[SpeedBy | None, list[str]]:
    """Return what speed is ranked by, and what stands against comparing the times themselves."""
    if len(timed) < 2:
        return None, []
    if not are_alike:
        return None, [f"The runs were not timed under one setting ({_grouped(timed, _setting)}): no times are ranked."]
    machine = _other_machines([one.name for one in timed], reports)
    if machine:
        ranked = (
            "the speed-up over the teacher ranks them"
            if same_teacher
            else "the teachers differ too, so no time is ranked"
        )
        within = "only the ratios that each measured within itself are comparable"
        machine.append(f"Times in ms of different machines or runtimes do not compare: {within}; {ranked}.")
        return ("speedup" if same_teacher else None), machine
    drift = _drift(timed) if same_teacher else []
    return ("speedup" if drift else "latency"), drift


def _other_images(found: Sequence[Candidate], reports: Mapping[str, Report]) -> list[str]:
    """Return why score is not of the same images."""
    problems = []
    for key in IMAGES:
        values = {name: json.dumps(report["recipe"]["data"].get(key)) for name, report in reports.items()}
        if len(set(values.values())) > 1:
            problems.append(f"data.{key}: {_groups(values)}")
    counts = {one.name: f"{one.images:,} images" for one in found if one.images}
    if len(set(counts.values())) > 1:
        problems.append(_groups(counts))
    digests = {report["data_digest"] for report in reports.values()}
    if not problems and len(digests) > 1 and len({_split(report) for report in reports.values()}) == 1:
        problems.append("the folders' content is not the same")
    return [f"Score is not of the same images ({'; '.join(problems)}): it is not ranked."] if problems else []


def _other_split(reports: Mapping[str, Report]) -> list[str]:
    """Return that the validation images may be drawn otherwise: equally hard on average, not the same."""
    seeds = {name: f"seed {report['recipe']['seed']}" for name, report in reports.items()}
    if len(set(seeds.values())) < 2:
        return []
    return [
        f"The seeds differ ({_groups(seeds)}): where validation images are held out by seed, score is of other images of the same kind; "
        "its intervals still tell."
    ]


def _split(report: Report) -> str:
    """Return what else the digest covers: it changes with the seed and the limit, the folder's content aside."""
    recipe = report["recipe"]
    return json.dumps([recipe["seed"], recipe["data"].get("limit_per_class")])


def _scored_elsewhere(found: Sequence[Candidate]) -> list[str]:
    places = {one.name: one.scored_in for one in found if one.scored_in}
    return [f"Score was measured in {_groups(places)}."] if len(set(places.values())) > 1 else []


def _other_machines(names: Sequence[str], reports: Mapping[str, Report]) -> list[str]:
    """Return a sentence for the hardware and one for the runtime, where they are not the same."""
    environments = {name: reports[name]["environment"] for name in names}
    found = []
    hardware = {name: json.dumps([env.get(key) for key in HARDWARE]) for name, env in environments.items()}
    if len(set(hardware.values())) > 1:
        differing = [key for key in HARDWARE if len({json.dumps(env.get(key)) for env in environments.values()}) > 1]
        words = {name: ", ".join(_fact(key, env.get(key)) for key in differing) for name, env in environments.items()}
        found.append(f"The machines differ ({_groups(words)}).")
    for package in RUNTIMES:
        versions = {name: str(env.get("versions", {}).get(package) or "none") for name, env in environments.items()}
        if len(set(versions.values())) > 1:
            found.append(f"{package} differs ({_groups(versions)}).")
    return found


def _drift(timed: Sequence[Candidate]) -> list[str]:
    """Return that the same teacher was not equally fast each time, where it was not."""
    known = {one.name: one.teacher.p50_ms for one in timed if one.teacher.p50_ms}
    if len(known) < 2 or max(known.values()) <= DRIFT * min(known.values()):
        return []
    times = _groups({name: significant(p50_ms, "ms") for name, p50_ms in known.items()})
    return [
        f"The same teacher was not equally fast each time ({times}): the machine was not equally free. "
        "The speed-up over the teacher, which is timed beside each file, ranks them."
    ]


def _setting(one: Candidate) -> str:
    return f"{one.image_size} px, target {one.target}"


def _teacher(one: Candidate) -> str:
    """Return the teacher's network and cost: equal where a speed-up is over the same thing."""
    return ", ".join([one.teacher.arch, *([significant(one.teacher.macs_m, "M MACs")] if one.teacher.macs_m else [])])


def _fact(key: str, value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value} cores" if key == "cores" else str(value or f"no {key}")


def _grouped(candidates: Sequence[Candidate], words: Callable[[Candidate], str]) -> str:
    return _groups({one.name: words(one) for one in candidates})


def _groups(values: Mapping[str, str]) -> str:
    """Return `a, b: 72 images; c: 360 images`."""
    return "; ".join(f"{of}: {value}" for value, of in by_value(list(values), list(values.values())))
