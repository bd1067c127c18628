"""Run several recipes in several variants and seeds, and tabulate what each measured: the command behind the numbers in docs/.

A study is a YAML file. All runs of a recipe share a folder, so stages that do not differ are made once. The first seed's teacher
teaches all seeds: the spread is that of pruning's recovery and of quantization, not of the teacher.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, ValidationError

from compress.errors import CompressError, RecipeError
from compress.recipe import strict_yaml
from compress.recipe.explain import explain
from compress.recipe.read import read_recipe
from compress.recipe.section import Name, Section
from export.onnx_file.roles import ORDER

VariantName = Annotated[str, Field(pattern=r"^[^/\x00-\x1f]{1,64}$")]


class Study(Section):
    """What is compared."""

    name: Name
    """The name of the study's folder of results, made as a run's name is."""
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Recipe files, relative to the study's own folder."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    """One run of each recipe and variant for each."""
    variants: Annotated[dict[VariantName, tuple[str, ...]], Field(min_length=1)]
    """Overrides (as --set takes them) under a name for each, which may be any text without `/`."""


@dataclass(frozen=True)
class Result:
    """What one run measured: score by name, as a fraction; a name that all variants share was made by the same artifact."""

    recipe: str
    variant: str
    seed: int
    score: Mapping[str, float]


def read_study(path: Path) -> Study:
    """Read a study's YAML.

    Raises CompressError with what is wrong.
    """
    try:
        return Study.model_validate(strict_yaml.load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CompressError(f"{path}: cannot be read ({error.strerror}); give a study's .yaml") from error
    except RecipeError as error:
        raise CompressError(f"{path}: {error}") from error
    except ValidationError as error:
        raise CompressError("\n".join(f"{path}: {line}" for line in explain(error, Study))) from error


def run_study(
    path: Path, *, data: str | None, out: str, only: Sequence[str] = (), arguments: Sequence[str] = ()
) -> str:
    """Run what is missing of the study and return its tables as Markdown.

    `only` names some recipes' stems; `arguments` go to every `compress run`.
    """
    study = read_study(path)
    results = Path(out) / study.name
    results.mkdir(parents=True, exist_ok=True)
    found: list[Result] = []
    for name in study.recipes:
        recipe = path.parent / name
        if only and recipe.stem not in only:
            continue
        for seed in study.seeds:
            for variant, overrides in study.variants.items():
                settings = [*overrides, f"seed={seed}"]
                if seed != study.seeds[0]:
                    settings.append(f"model.weights={_teacher(results, recipe, study)}")
                report = results / f"{recipe.stem}-{variant}-{seed}.json"
                _run(recipe, settings, data=data, out=out, report=report, arguments=arguments)
                found.append(Result(recipe.stem, variant, seed, measurements(json.loads(report.read_text()))))
    text = "\n".join(_tables(found))
    (results / "tables.md").write_text(text, encoding="utf-8")
    return text


def _run(
    recipe: Path, settings: Sequence[str], *, data: str | None, out: str, report: Path, arguments: Sequence[str]
) -> None:
    """Run one recipe in a process of its own and keep its report; what exists already is not made again."""
    made = Path(out) / read_recipe(recipe, settings, data=data, out=out).name / "report.json"
    made.unlink(missing_ok=True)
    command = [sys.executable, "-m", "compress.cli", "run", str(recipe), "--out", out]
    command += [word for setting in settings for word in ("--set", setting)] + (["--data", data] if data else [])
    command += arguments
    sys.stderr.write(f"{report.stem}\n")
    with report.with_suffix(".log").open("w") as log:
        code = subprocess.run(command, stdout=log, check=False).returncode
    if not made.exists():  # a missed target, exit code 1, is a result like any other
        raise CompressError(
            f"{report.stem}: the run ended with exit code {code}; its words stand above, and the same command goes on"
        )
    report.write_bytes(made.read_bytes())


def _teacher(results: Path, recipe: Path, study: Study) -> Path:
    """Return the weights of the first seed's teacher."""
    first = json.loads((results / f"{recipe.stem}-{next(iter(study.variants))}-{study.seeds[0]}.json").read_text())
    return results.parent / str(first["recipe"]["name"]) / str(first["stages"][0]["directory"]) / "weights.safetensors"


def measurements(report: Mapping[str, Any]) -> dict[str, float]:
    """Return every score of a run by name: float stages in PyTorch, files and methods where they were scored."""
    found = {
        f"{row['stage']} (PyTorch)": row["metrics"]["score"]
        for row in report["stages"]
        if row["stage"] in ("source", "prune", "distill", "qat")
    }
    files = {row["name"]: row["score"] for row in report["deployed"]}
    found |= {name: files[name] for name in (*ORDER, *files) if name in files}
    for target, ptq in ((report.get("ptq") or {}).get("targets") or {}).items():
        found |= {
            f"PTQ {row['engine']} {row['method']}, {target}"
            + (" (PyTorch)" if row["scored_in"] == "pytorch" else ""): row["score"]
            for row in ptq["methods"]
            if row["score"] is not None
        }
    return {name: float(value) for name, value in found.items() if value is not None}


def _tables(results: Sequence[Result]) -> Iterator[str]:
    """Yield one Markdown table for each recipe: mean and range over seeds; what all variants share stands once."""
    for recipe in dict.fromkeys(result.recipe for result in results):
        mine = [result for result in results if result.recipe == recipe]
        variants = list(dict.fromkeys(result.variant for result in mine))
        yield f"### {recipe}\n\n| what | score, mean | range over seeds | seeds |\n|---|---|---|---|"
        for name in dict.fromkeys(name for result in mine for name in result.score):
            values = {v: [r.score[name] for r in mine if r.variant == v and name in r.score] for v in variants}
            shared = len(variants) > 1 and all(values[v] == values[variants[0]] for v in variants)
            for variant in variants[:1] if shared else variants:
                if values[variant]:
                    yield _row(name if shared or len(variants) == 1 else f"{name}, {variant}", values[variant])
        yield ""


def _row(name: str, values: Sequence[float]) -> str:
    low, high = 100 * min(values), 100 * max(values)
    return f"| {name} | {100 * statistics.mean(values):.2f} % | {low:.2f} to {high:.2f} | {len(values)} |"
