"""Folders that are compared: runs, bundles, and what cannot be read; the command itself."""

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx_files import small_files, write_small_bundle
from reports import build_student, compared, printed, save_report
from test_report import parse
from typer.testing import CliRunner, Result

from compress.cli import app
from compress.errors import CompressError
from compress.report.comparison.compare import compare
from compress.report.comparison.read import read_runs
from compress.report.comparison.show import render_comparison
from compress.report.shape import Report
from export.errors import BundleError

EVIL = "</style><script>alert('x')</script>"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Report, Report]:
    """A large student that answers better, and one half as large and slow."""
    return build_student(tmp_path, "large", score=0.98056), build_student(tmp_path, "small", scale=0.5, score=0.95)


@pytest.fixture
def invoke() -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(app, ["compare", *map(str, words)], catch_exceptions=False)


def test_folders_are_read_and_written_about(
    invoke: Callable[..., Result], tmp_path: Path, pair: tuple[Report, Report]
) -> None:
    folders = [save_report(report, tmp_path / "runs" / report["recipe"]["name"]) for report in pair]
    (folders[0] / "report").mkdir()
    (folders[0] / "report/index.html").write_text("")
    page, document = tmp_path / "out/page.html", tmp_path / "out/numbers.json"
    result = invoke(*folders, "--html", page, "--json", document)
    assert result.exit_code == 0
    assert "Most accurate  large" in result.output
    assert set(parse(page.read_text()).links) == {"../runs/large/report/index.html"}
    numbers = json.loads(document.read_text())
    assert [one["score"] for one in numbers["candidates"]] == [0.98056, 0.95]


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (("students/half", "students/fifth"), ("half", "fifth")),
        (("half/bundle", "fifth/bundle"), ("half", "fifth")),
        (("today/a", "yesterday/a"), ("today/a", "yesterday/a")),
    ],
)
def test_runs_of_one_recipe_go_by_their_folders(
    tmp_path: Path,
    pair: tuple[Report, Report],
    places: tuple[str, ...],
    names: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tuple(read_runs([save_report(pair[0], Path(place)) for place in places])) == names


def test_a_run_whose_student_is_its_only_network_goes_by_its_teachers(
    tmp_path: Path, pair: tuple[Report, Report]
) -> None:
    pair[0]["recipe"] |= {"model": None, "teacher": [{"network": "timm:vit"}, {"network": "timm:swin"}]}
    runs = read_runs([save_report(report, tmp_path / report["recipe"]["name"]) for report in pair])
    assert compare(runs).candidates[0].arch == "timm:vit, timm:swin"


def test_a_bundle_without_its_report_is_refused(
    invoke: Callable[..., Result], tmp_path: Path, pair: tuple[Report, Report]
) -> None:
    write_small_bundle(tmp_path / "bundle", small_files(tmp_path))
    result = invoke(tmp_path / "bundle", save_report(pair[0], tmp_path / "run"))
    said = f"{tmp_path}/bundle/report.json: is not in SHA256SUMS, but a comparison reads it: get the bundle again\n"
    assert (result.exit_code, result.output) == (2, said)


def with_report(bundle: Path, text: str) -> None:
    """Put a report.json into the bundle, under the digest that SHA256SUMS then names."""
    (bundle / "report.json").write_text(text)
    digest = subprocess.run(["sha256sum", "report.json"], cwd=bundle, capture_output=True, text=True, check=True).stdout
    with (bundle / "SHA256SUMS").open("a") as file:
        file.write(digest)


def test_a_bundle_with_its_report_tells_what_the_run_tells(tmp_path: Path, pair: tuple[Report, Report]) -> None:
    write_small_bundle(tmp_path / "bundle", small_files(tmp_path))
    with_report(tmp_path / "bundle", json.dumps(pair[0]))
    (one, _) = compare(read_runs([tmp_path / "bundle", save_report(pair[1], tmp_path / "run")])).candidates
    assert replace(one, opset=None) == compared(*pair).candidates[0]


@pytest.mark.parametrize("name", ["report.json", "bundle.json"])
def test_a_bundle_whose_facts_were_changed_is_refused(tmp_path: Path, pair: tuple[Report, Report], name: str) -> None:
    write_small_bundle(tmp_path / "bundle", small_files(tmp_path))
    with_report(tmp_path / "bundle", json.dumps(pair[0]))
    (tmp_path / "bundle" / name).write_text((tmp_path / "bundle" / name).read_text().replace("0.7", "0.9") + " ")
    with pytest.raises(BundleError, match=f"{name}: is not the file the bundle was made with"):
        read_runs([tmp_path / "bundle", save_report(pair[1], tmp_path / "run")])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is neither a finished run nor a bundle"),
        ("{", "must be JSON"),
        ("[]", "is a report of version None, this tool reads 3; run the recipe again"),
        ('{"schema_version": 1}', "is a report of version 1, this tool reads 3"),
        ('{"schema_version": 3}', "metric: field required; run the recipe again"),
        ('{"schema_version": 3, "a": NaN}', "NaN is not a finite number"),
        ('{"schema_version": 3, "a": 1e999}', "1e999 is not a finite number"),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_one_sentence(
    invoke: Callable[..., Result], tmp_path: Path, pair: tuple[Report, Report], content: str | None, sentence: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    if content is not None:
        (broken / "report.json").write_text(content)
    result = invoke(save_report(pair[0], tmp_path / "run"), broken)
    assert result.exit_code == 2
    assert sentence in result.output
    assert str(broken) in result.output
    assert result.output.count("\n") == 1


def test_one_folder_and_the_same_folder_twice_are_one_sentence(
    invoke: Callable[..., Result], tmp_path: Path, pair: tuple[Report, Report]
) -> None:
    run = save_report(pair[0], tmp_path / "run")
    assert invoke(run).output == "needs two or more runs or bundles to compare, got 1\n"
    assert invoke(run, f"{run}/.").output == "a run cannot be compared with itself: name each folder once\n"


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON document."""
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


JUNK: tuple[Any, ...] = (None, -1, 10**30, 1e300, "", EVIL, [], {}, [None], {"stage": "qat", "fit": 3})


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_report_is_read_or_refused_and_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, seed: int, damaged: list[Report]
) -> None:
    root, draw = tmp_path_factory.mktemp("damaged"), random.Random(seed)
    report: Any = copy.deepcopy(damaged[0])
    for _ in range(draw.choice((1, 1, 3))):
        *path, last = draw.choice(list(places(report)))
        node = report
        for key in path:
            node = node[key]
        node[last] = copy.deepcopy(draw.choice(JUNK))
    folders = [save_report(damaged[1], root / "whole"), save_report(report, root / "damaged")]
    try:
        comparison = compare(read_runs(folders))
    except CompressError:
        return
    assert "<script" not in render_comparison(comparison)
    assert printed(comparison)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """A report to damage, with few rows so that each part of it is hit, and one that stays whole."""
    root = tmp_path_factory.mktemp("reports")
    reports = [build_student(root, "whole"), build_student(root, "damaged", scale=0.5)]
    for report in reports:
        report["deployed"] = [row for row in report["deployed"] if row["image_size"] == 224 and row["threads"] == 1]
        report["ptq"] = report["verify"] = None
    return reports


def test_comparing_imports_no_torch(tmp_path: Path, pair: tuple[Report, Report]) -> None:
    folders = [str(save_report(report, tmp_path / report["recipe"]["name"])) for report in pair]
    words = [sys.executable, "-X", "importtime", "-m", "compress.cli", "compare", *folders]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "compress.report.comparison.compare" in imported
    assert not imported & {"torch", "torchvision", "timm"}
