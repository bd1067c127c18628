"""Judge how fair a comparison is: different images, machines or teachers, each in a sentence."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from compress.report.comparison.candidate import Candidate
from compress.report.comparison.recipes import by_value
from compress.report.numbers import significant
from compress.report.shape import Report
from export.images.size import said
from export.runtime.environment import HARDWARE

SpeedBy = Literal["latency", "speedup"]
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
# Settings that decide which images are scored, and how they look; the digest covers the content of `path`.
IMAGES = ("dataset", "image_size", "resize", "mean", "std", "val_fraction", "skip_broken")
DRIFT = 1.05  # if the same teacher's times on one machine differ by more, the machine was busier in one run


class Fairness(NamedTuple):
    """What may be ranked, and a sentence for each reason against ranking."""

    same_images: bool
    same_teacher: bool
    speed_by: SpeedBy | None
    warnings: tuple[str, ...]


def judge_fairness(found: Sequence[Candidate], reports: Mapping[str, Report], *, are_alike: bool) -> Fairness:
    """Return what may be ranked; `are_alike` tells whether all times share their conditions."""
    images, teachers = _other_images(found, reports), {_teacher(one) for one in found}
    timed = [one for one in found if one.p50_ms]
    speed_by, against_speed = _speed(timed, reports, are_alike=are_alike, same_teacher=len(teachers) == 1)
    warnings = [*images, *_other_unlabelled(reports), *_other_split(reports), *_scored_elsewhere(found), *against_speed]
    if len(teachers) > 1:
        whose = "speed-ups and losses are against each run's own"
        warnings.append(f"The teachers differ ({_grouped(found, _teacher)}): {whose}.")
    return Fairness(not images, len(teachers) == 1, speed_by, tuple(warnings))


def _speed(
    timed: Sequence[Candidate], reports: Mapping[str, Report], *, are_alike: bool, same_teacher: bool
) -> tuple[SpeedBy | None, list[str]]:
    """Return what speed is ranked by, and the reasons against comparing times directly."""
    if len(timed) < 2:
        return None, []
    if not are_alike:
        return None, [f"The runs were timed under different settings ({_settings(timed)}): times are not ranked."]
    machine = _other_machines([one.name for one in timed], reports)
    if machine:
        ranked = (
            "the speed-up over the teacher ranks them"
            if same_teacher
            else "the teachers differ too, so no time is ranked"
        )
        machine.append(
            f"Times in ms of different machines or runtimes are not comparable, only ratios within one run are; {ranked}."
        )
        return ("speedup" if same_teacher else None), machine
    drift = _drift(timed) if same_teacher else []
    return ("speedup" if drift else "latency"), drift


def _other_images(found: Sequence[Candidate], reports: Mapping[str, Report]) -> list[str]:
    """Return why scores are of different images."""
    problems = []
    for key in IMAGES:
        values = {name: json.dumps(report["recipe"]["data"].get(key)) for name, report in reports.items()}
        if len(set(values.values())) > 1:
            problems.append(f"data.{key}: {_groups(values)}")
    counts = {one.name: f"{one.images:,} images" for one in found if one.images}
    if len(set(counts.values())) > 1:
        problems.append(_groups(counts))
    digests = {report["data_digest"].partition("-")[0] for report in reports.values()}
    if not problems and len(digests) > 1 and len({_split(report) for report in reports.values()}) == 1:
        problems.append("the folders' contents differ")
    return [f"Scores are of different images ({'; '.join(problems)}): they are not ranked."] if problems else []


def _other_unlabelled(reports: Mapping[str, Report]) -> list[str]:
    """Return a sentence if the runs learned from different images without labels, which no score is of."""
    if len({report["data_digest"].partition("-")[2] for report in reports.values()}) < 2:
        return []
    return ["The images without labels differ (data.unlabelled): the students learned from different images."]


def _other_split(reports: Mapping[str, Report]) -> list[str]:
    """Return a sentence if validation images may be other draws of the same data: equally hard on average, but different."""
    seeds = {name: f"seed {report['recipe']['seed']}" for name, report in reports.items()}
    if len(set(seeds.values())) < 2:
        return []
    return [
        f"The seeds differ ({_groups(seeds)}): if validation images are held out by seed, scores are of other images of the same kind; "
        "compare their intervals."
    ]


def _split(report: Report) -> str:
    """Return the settings that the digest depends on beside the folder's content."""
    recipe = report["recipe"]
    return json.dumps([recipe["seed"], recipe["data"].get("limit_per_class")])


def _scored_elsewhere(found: Sequence[Candidate]) -> list[str]:
    places = {one.name: one.scored_in for one in found if one.scored_in}
    return [f"Scores were measured in different runtimes ({_groups(places)})."] if len(set(places.values())) > 1 else []


def _other_machines(names: Sequence[str], reports: Mapping[str, Report]) -> list[str]:
    """Return a sentence if the hardware differs, and one for each runtime that does."""
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
    """Return a sentence if the same teacher's times differ."""
    known = {one.name: one.teacher.p50_ms for one in timed if one.teacher.p50_ms}
    if len(known) < 2 or max(known.values()) <= DRIFT * min(known.values()):
        return []
    times = _groups({name: significant(p50_ms, "ms") for name, p50_ms in known.items()})
    return [
        f"The same teacher's times differ ({times}): the machine was busier in some runs. "
        "The speed-up over the teacher, which is timed along with each file, ranks them."
    ]


def _settings(timed: Sequence[Candidate]) -> str:
    return _grouped(timed, lambda one: f"{one.image_size and said(one.image_size)} px, target {one.target}")


def _teacher(one: Candidate) -> str:
    """Return the teacher's network and MACs, which are equal if speed-ups are over the same teacher."""
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
