"""Judge how fair a comparison is: different images, machines or teachers, each in a sentence."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from compress.report.comparison.candidate import Candidate
from compress.report.comparison.recipes import by_value
from compress.report.numbers import significant
from compress.report.shape import Json, Report
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
    recipes = {name: report["recipe"] for name, report in reports.items()}
    images = _other_images(found, reports, recipes)
    teachers = _differing(
        {one.name: _teacher(one) for one in found},
        "The teachers differ ({}): speed-ups and losses are against each run's own.",
    )
    speed_by, against_speed = _speed(found, reports, are_alike=are_alike, same_teacher=not teachers)
    # What follows the dash in a digest is of the images without labels, which no score is of.
    unlabelled = _differing(
        {name: report["data_digest"].partition("-")[2] for name, report in reports.items()},
        "The images without labels differ (data.unlabelled): the students learned from different images.",
    )
    # Held-out images are other draws of the same data: equally hard on average, but different.
    seeds = _differing(
        {name: f"seed {recipe['seed']}" for name, recipe in recipes.items()},
        "The seeds differ ({}): if validation images are held out by seed, scores are of other images of the same kind; "
        "compare their intervals.",
    )
    places = {one.name: one.scored_in for one in found if one.scored_in}
    elsewhere = _differing(places, "Scores were measured in different runtimes ({}).")
    return Fairness(
        not images, not teachers, speed_by, (*images, *unlabelled, *seeds, *elsewhere, *against_speed, *teachers)
    )


def _speed(
    found: Sequence[Candidate], reports: Mapping[str, Report], *, are_alike: bool, same_teacher: bool
) -> tuple[SpeedBy | None, list[str]]:
    """Return what speed is ranked by, and the reasons against comparing times directly."""
    timed = {one.name: one for one in found if one.p50_ms}
    if len(timed) < 2:
        return None, []
    if not are_alike:
        sizes = {
            name: f"{one.image_size and said(one.image_size)} px, target {one.target}" for name, one in timed.items()
        }
        return None, [f"The runs were timed under different settings ({_groups(sizes)}): times are not ranked."]
    if machine := _other_machines({name: reports[name]["environment"] for name in timed}):
        ranked = "the speed-up over the teacher ranks them"
        if not same_teacher:
            ranked = "the teachers differ too, so no time is ranked"
        ratios = "Times in ms of different machines or runtimes are not comparable, only ratios within one run are; "
        return ("speedup" if same_teacher else None), [*machine, f"{ratios}{ranked}."]
    teachers = {name: ms for name, one in timed.items() if (ms := one.teacher.p50_ms)}
    if not same_teacher or len(teachers) < 2 or max(teachers.values()) <= DRIFT * min(teachers.values()):
        return "latency", []
    times = _groups({name: significant(ms, "ms") for name, ms in teachers.items()})
    return "speedup", [
        f"The same teacher's times differ ({times}): the machine was busier in some runs. "
        "The speed-up over the teacher, which is timed along with each file, ranks them."
    ]


def _other_images(found: Sequence[Candidate], reports: Mapping[str, Report], recipes: Mapping[str, Json]) -> list[str]:
    """Return why scores are of different images."""
    problems = [
        problem
        for key in IMAGES
        for problem in _differing(
            {name: json.dumps(recipe["data"].get(key)) for name, recipe in recipes.items()}, f"data.{key}: {{}}"
        )
    ]
    problems += _differing({one.name: f"{one.images:,} images" for one in found if one.images}, "{}")
    # The digest also depends on these two settings, so it tells of the content only where they are equal.
    splits = {json.dumps([recipe["seed"], recipe["data"].get("limit_per_class")]) for recipe in recipes.values()}
    digests = {report["data_digest"].partition("-")[0] for report in reports.values()}
    if not problems and len(digests) > 1 and len(splits) == 1:
        problems.append("the folders' contents differ")
    return [f"Scores are of different images ({'; '.join(problems)}): they are not ranked."] if problems else []


def _other_machines(environments: Mapping[str, Json]) -> list[str]:
    """Return a sentence if the hardware differs, and one for each runtime that does."""
    keys = [key for key in HARDWARE if len({json.dumps(env.get(key)) for env in environments.values()}) > 1]
    words = {name: ", ".join(_fact(key, env.get(key)) for key in keys) for name, env in environments.items()}
    found = [f"The machines differ ({_groups(words)})."] if keys else []
    for package in RUNTIMES:
        versions = {name: str(env.get("versions", {}).get(package) or "none") for name, env in environments.items()}
        found += _differing(versions, f"{package} differs ({{}}).")
    return found


def _teacher(one: Candidate) -> str:
    """Return the teacher's network and MACs, which are equal if speed-ups are over the same teacher."""
    return ", ".join([one.teacher.arch, *([significant(one.teacher.macs_m, "M MACs")] if one.teacher.macs_m else [])])


def _fact(key: str, value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value} cores" if key == "cores" else str(value or f"no {key}")


def _differing(values: Mapping[str, str], sentence: str) -> list[str]:
    """Return the sentence, filled with who has which value, if not all have the same."""
    return [sentence.format(_groups(values))] if len(set(values.values())) > 1 else []


def _groups(values: Mapping[str, str]) -> str:
    """Return `a, b: 72 images; c: 360 images`."""
    return "; ".join(f"{of}: {value}" for value, of in by_value(list(values), list(values.values())))
