"""Golden outputs and baselines in a provider of its own: one that computes wrongly is caught, one that rounds more coarsely is not."""

import json
from pathlib import Path

import numpy as np
import pytest
from altered import plant
from bundles import digit_contents
from gated_bundles import gated_place

from export.bundle import golden as golden_module
from export.bundle.golden import tolerance_of
from export.bundle.read import inspect_here, read_bundle
from export.bundle.write import write_bundle
from export.check.findings import check_bundle
from export.errors import BundleError
from export.gate import commands
from export.gate import latency as latency_module
from export.gate.baseline import find_baseline, read_baseline
from export.gate.checks import Limits
from export.gate.commands import judge, update
from export.gate.latency import Plan
from export.gate.run import Terms
from export.runtime import accuracy as accuracy_module
from export.runtime.providers import PROVIDERS, Runtime

MODULES = (golden_module, latency_module, accuracy_module)
NO_LATENCY = Limits(max_latency_ratio=None)


def right(outputs: np.ndarray, _: Runtime) -> np.ndarray:
    return outputs


def wrong(outputs: np.ndarray, _: Runtime) -> np.ndarray:
    return np.roll(outputs, 1, axis=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gated_place(tmp_path_factory.mktemp("gate"))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox costs a second each time; the files are our own."""
    for module in ("gate.subject", "check.findings"):
        monkeypatch.setattr(f"export.{module}.vet", inspect_here)


def recorded(place: Path, out: Path, plan: Plan, file: str | None = None) -> Path:
    return update(place / "bundle", out, Terms(place / "images.npz", NO_LATENCY, plan, file=file))[0]


def test_a_provider_has_a_baseline_of_its_own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_in = Runtime(plant(monkeypatch, MODULES, right), "bf16")
    path = recorded(place, tmp_path, Plan(runs_in=runs_in), file="student_fp32")
    assert path.name.endswith(".other-bf16.json")
    was = read_baseline(path)
    assert (was.runs_in, was.served) == (runs_in, "student_fp32")
    verdict = judge(
        place / "bundle", tmp_path, Terms(None, NO_LATENCY, Plan(runs_in=runs_in), file="student_fp32")
    )  # fmt: skip
    assert verdict.exit_code == 0
    with pytest.raises(BundleError, match="has no baseline: record one with --update-baseline"):
        find_baseline(tmp_path, "any")
    with pytest.raises(BundleError, match="has no baseline in Other: record one"):
        find_baseline(tmp_path, "any", Runtime(PROVIDERS["other"], "f32"))
    with pytest.raises(
        BundleError,
        match="recorded in Other bf16, and this run is in CPU: give --provider other --arithmetic bf16, or record",
    ):
        judge(place / "bundle", path, Terms(None, NO_LATENCY, Plan()))


def test_an_older_baseline_is_the_cpu_provider_s(place: Path, tmp_path: Path) -> None:
    (path,) = (place / "baselines").iterdir()
    document = json.loads(path.read_text())
    assert (document.pop("provider"), document.pop("arithmetic")) == ("CPUExecutionProvider", "f32")
    (tmp_path / "old.json").write_text(json.dumps(document))
    assert read_baseline(tmp_path / "old.json") == read_baseline(path)


def test_a_provider_that_computes_wrongly_is_a_broken_bundle_there(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(runs_in=Runtime(plant(monkeypatch, MODULES, wrong), "f32"))
    verdict = judge(place / "bundle", None, Terms(None, NO_LATENCY, Plan()), against=place / "bundle")
    assert verdict.exit_code != 3
    with pytest.raises(BundleError, match="4 of 4 images have other outputs in Other than where"):
        judge(place / "bundle", None, Terms(None, NO_LATENCY, plan), against=place / "bundle")


@pytest.mark.parametrize("content", ['{"a": 1}', "not json"])
def test_a_file_that_is_no_baseline_is_not_written_over(content: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(BundleError, match=r"report\.json: is (another file, no|not a) baseline"):
        recorded(place, tmp_path / "report.json", Plan())
    assert (tmp_path / "report.json").read_text() == content


def test_no_latency_is_named_before_the_bundle_is_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(commands, "open_subject", lambda *_: pytest.fail(said[0]))
    with pytest.raises(pytest.fail.Exception, match="on a busy one, leave it out with --no-latency"):
        update(place / "bundle", place / "none", Terms(place, Limits(), Plan()), notice=said.append)


def test_check_runs_the_golden_inputs_in_a_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "bundle", digit_contents(tmp_path))
    row = plant(monkeypatch, MODULES, wrong)
    assert check_bundle(tmp_path / "bundle")[1] == []
    findings = check_bundle(tmp_path / "bundle", Runtime(row, "f32"))[1]
    assert [finding.defect for finding in findings] == ["golden_differs"] * 3
    assert "golden inputs differ in Other from golden/student_fp32.npy" in findings[0].sentence


def test_bf16_has_a_wider_tolerance_measured_where_the_bundle_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    row = plant(monkeypatch, MODULES, right)
    write_bundle(tmp_path / "here", replace(digit_contents(tmp_path), providers=("cpu", "other")))
    write_bundle(tmp_path / "elsewhere", digit_contents(tmp_path))
    bf16, name = Runtime(row, "bf16"), "student_fp32"
    bundle = read_bundle(tmp_path / "here")
    stated, golden = bundle.golden.elsewhere, bundle.golden
    assert stated.keys() == {"OtherExecutionProvider f32", "OtherExecutionProvider bf16"}
    assert stated["OtherExecutionProvider f32"] == golden.tolerance, "nothing is further away there"
    noise = tolerance_of(bundle.files[name], "fp32", golden.inputs, golden.outputs[name], bundle.preprocess, (), bf16)
    assert golden.tolerance[name][""] < stated[bf16.key][name][""] <= noise[""] * 1.01
    for made in ("here", "elsewhere"):  # where nothing was measured, the file's own noise decides
        assert check_bundle(tmp_path / made, bf16)[1] == []
    assert read_bundle(tmp_path / "elsewhere").golden.elsewhere == {}
