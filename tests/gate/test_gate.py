"""The gate from end to end: what each planted defect is called, and the exit code that a build sees."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from gated_bundles import contents, flip_a_byte, gated_place, networks, pixels, write_gated_bundle
from onnx import ModelProto, helper
from quantized_files import changed, constant, quantized_network

from export.bundle.read import inspect_here
from export.bundle.write import write_bundle
from export.errors import BundleError
from export.gate import run
from export.gate.baseline import Baseline, read_baseline
from export.gate.checks import Check, Limits, Verdict
from export.gate.commands import accept, judge, update
from export.gate.latency import Plan
from export.gate.outputs import as_junit
from export.gate.run import Terms
from export.gate.subject import open_subject
from export.runtime.session import Run

REPOSITORY = Path(__file__).parents[2]
NO_LATENCY = Limits(max_latency_ratio=None)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox costs a second each time; the files are our own."""
    monkeypatch.setattr("export.gate.subject.vet", inspect_here)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, images, and the bundle's baseline without times."""
    return gated_place(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def baseline(place: Path) -> Baseline:
    return read_baseline(next((place / "baselines").iterdir()))


def gated(bundle: Path, was: Baseline, limits: Limits = NO_LATENCY, data: Path | None = None) -> Verdict:
    return run.gate(bundle, was, Terms(data, limits, Plan()))


def check(verdict: Verdict, name: str) -> Check:
    return next(one for one in verdict.checks if one.name == name)


def statuses(verdict: Verdict) -> dict[str, str]:
    """The checks that did not pass."""
    return {one.name: one.status for one in verdict.checks if one.status != "pass"}


def rebuilt(folder: Path, **models: ModelProto) -> Path:
    """A bundle in which some files are others."""
    return write_gated_bundle(folder / "new" / "bundle", networks() | models)


# What passes


def test_the_accepted_bundle_passes(place: Path, baseline: Baseline) -> None:
    verdict = gated(place / "bundle", baseline)
    assert (verdict.exit_code, statuses(verdict)) == (0, {})
    assert check(verdict, "images").now == "600"
    assert check(verdict, "integer layers").now == "3 of 3"


# Planted defects that no measurement is needed for


def float_convolution(_: Path) -> dict[str, ModelProto]:
    return {"student_int8": quantized_network(63, plain=("conv2", "quantizer_conv2"))}


def saturating(_: Path) -> dict[str, ModelProto]:
    return {"student_int8": quantized_network(127)}


def newer_opset(_: Path) -> dict[str, ModelProto]:
    model = networks()["student_int8"]
    model.opset_import[0].version, model.ir_version = 19, 10
    return {"student_int8": model}


def padded(_: Path) -> dict[str, ModelProto]:
    model = networks()["student_int8"]
    helper.set_model_props(model, {"padding": "x" * 10_000})
    return {"student_int8": model}


def more_work(_: Path) -> dict[str, ModelProto]:
    """The float file does one matrix product more: by the unit matrix."""
    model = networks()["student_fp32"]
    model.graph.node[-1].output[0] = "before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32), "unit"))
    model.graph.node.append(helper.make_node("MatMul", ["before", "unit"], ["logits"]))
    return {"student_fp32": model}


@pytest.mark.parametrize(
    ("plant", "name", "words"),
    [
        (float_convolution, "integer layers", "student_int8: conv2 run in float now"),
        (float_convolution, "operators", "-1 QLinearConv"),
        (saturating, "can saturate", "student_int8: conv1, conv2, head can saturate on a CPU without VNNI now"),
        (newer_opset, "opset, IR", "is opset 19, IR 10: older servers cannot read it"),
        (padded, "size", "student_int8: was 7,"),
        (more_work, "MACs", "student_fp32: was 175,152, is 175,161"),
    ],
)
def test_a_worse_file_fails_by_name(
    plant: Callable[[Path], dict[str, ModelProto]], name: str, words: str, baseline: Baseline, tmp_path: Path
) -> None:
    limits = replace(NO_LATENCY, min_score_ratio=None, max_size_ratio=1.0 if name == "MACs" else 1.01)
    verdict = gated(rebuilt(tmp_path, **plant(tmp_path)), baseline, limits)
    assert verdict.exit_code == 1
    assert check(verdict, name).status == "fail"
    assert words in check(verdict, name).detail


def test_fewer_operators_pass(baseline: Baseline, place: Path) -> None:
    served = baseline.files["student_int8"]
    more = replace(served, operators=served.operators | {"Relu": 3})
    assert gated(place / "bundle", replace(baseline, files=baseline.files | {"student_int8": more})).exit_code == 0


def test_swapped_labels_and_another_mean_fail_by_name(baseline: Baseline, tmp_path: Path) -> None:
    made = contents(tmp_path, networks())
    write_bundle(
        tmp_path / "bundle",
        replace(made, labels=["dog", "cat", "gnu"], preprocess={**made.preprocess, "mean": [0.1, 0.0, 0.0]}),
    )
    verdict = gated(tmp_path / "bundle", baseline, replace(NO_LATENCY, min_score_ratio=None))
    assert statuses(verdict) == {"classes": "fail", "preprocessing": "fail"}
    assert check(verdict, "classes").detail == "labels.txt: line 1 was 'cat', is 'dog', line 2 was 'dog', is 'cat'"
    assert check(verdict, "preprocessing").detail == "preprocess.json: mean was [0.0, 0.0, 0.0], is [0.1, 0.0, 0.0]"


def test_a_missing_class_is_named(baseline: Baseline) -> None:
    from export.gate.hard import differing_lines

    assert differing_lines(["cat", "dog", "gnu"], ["cat", "gnu"]) == ["had 3 classes, has 2", "'dog' is gone"]


def test_a_missing_file_fails_and_stops_no_other_check(baseline: Baseline, tmp_path: Path) -> None:
    bundle = write_gated_bundle(tmp_path / "bundle", {"student_fp32": networks()["student_fp32"]})
    verdict = gated(bundle, baseline)
    assert check(verdict, "files").detail == "student_int8 is gone; student_fp32 is served in place of student_int8"
    assert verdict.exit_code == 1


def test_the_baseline_of_another_bundle_is_a_sentence(baseline: Baseline, place: Path) -> None:
    other = replace(baseline, bundle="digits", classes=tuple("0123456789"))
    with pytest.raises(
        BundleError, match=r"of another bundle, digits \(classification, 10 classes\), and this one is small \("
    ):
        gated(place / "bundle", other)
    with pytest.raises(BundleError, match=r"of another bundle, small \(detection, 3 classes\)"):
        gated(place / "bundle", replace(baseline, task="detection"))
    assert gated(place / "bundle", replace(baseline, bundle="renamed")).exit_code == 0


# Broken bundles


def link_out(bundle: Path) -> None:
    (bundle / "labels.txt").unlink()
    (bundle / "labels.txt").symlink_to("/etc/hostname")


def change_golden_outputs(bundle: Path) -> None:
    """The digests are right: whoever made the bundle made it so."""
    from export.command.files import sha256

    path = bundle / "golden" / "student_int8.npy"
    was = sha256(path)
    np.save(path, np.load(path)[::-1].copy())
    sums = (bundle / "SHA256SUMS").read_text()
    (bundle / "SHA256SUMS").write_text(sums.replace(was, sha256(path)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "student_int8.onnx: is not the file the bundle was made with"),
        (link_out, "labels.txt: must be a regular file, not a link"),
        (change_golden_outputs, "student_int8: golden outputs: 4 of 4 images have other outputs"),
    ],
)
def test_a_broken_bundle_is_3_and_says_what(
    damage: Callable[[Path], None], words: str, place: Path, baseline: Baseline, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(place / "bundle", tmp_path / "bundle"))
    damage(bundle)
    verdict = gated(bundle, baseline)
    assert verdict.exit_code == 3
    assert words in verdict.checks[0].detail
    assert ElementTree.fromstring(as_junit(verdict)).get("errors") == "1"


def test_model_files_are_looked_at_by_the_guarded_process_first(
    place: Path, baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def crashes(paths: Sequence[Path]) -> list[BundleError]:
        seen.extend(path.name for path in paths)
        return [BundleError("it ended the process")] * len(paths)

    monkeypatch.setattr("export.gate.subject.vet", crashes)
    verdict = gated(place / "bundle", baseline)
    assert (verdict.exit_code, verdict.checks[0].detail) == (3, "it ended the process")
    assert seen == ["student_fp32.onnx", "student_int8.onnx"]


# Accuracy


def test_lost_accuracy_fails(baseline: Baseline, tmp_path: Path) -> None:
    int8 = networks()["student_int8"]
    levels, step = constant(int8, "head.bias"), constant(int8, "head.bias_scale")
    moved = changed(int8, {"head.bias": (levels + np.array([0, 0.05, 0]) / step).astype(np.int32)})
    verdict = gated(rebuilt(tmp_path, student_int8=moved), baseline)
    assert statuses(verdict)["top-1"] == "fail"
    assert verdict.exit_code == 1


def test_the_same_file_that_answers_better_is_not_believed(place: Path, baseline: Baseline) -> None:
    assert baseline.predictions is not None
    rows = baseline.predictions.rows
    some = sorted(digest for digest, (_, (label, answer)) in rows.items() if label == answer)[:20]
    worse = {digest: (rows[digest][0], (rows[digest][1][0], 1 - rows[digest][1][0])) for digest in some}
    was = replace(baseline, predictions=replace(baseline.predictions, rows=rows | worse))
    verdict = gated(place / "bundle", was)
    assert (statuses(verdict), verdict.exit_code) == ({"top-1": "unexplained"}, 2)


def test_images_of_another_set_leave_no_verdict(place: Path, baseline: Baseline, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", images=pixels(10, seed=9), labels=np.zeros(10, np.int64))
    verdict = gated(place / "bundle", baseline, data=tmp_path / "other.npz")
    assert (statuses(verdict), verdict.exit_code) == ({"images": "inconclusive"}, 2)


def test_an_image_that_is_there_twice_counts_once(place: Path, tmp_path: Path) -> None:
    images = pixels(5)
    np.savez(tmp_path / "twice.npz", images=np.concatenate([images, images]), labels=np.zeros(10, np.int64))
    accepted = accept(open_subject(place / "bundle"), Terms(tmp_path / "twice.npz", NO_LATENCY, Plan()))
    assert accepted.predictions is not None
    assert len(accepted.predictions.rows) == 5


@pytest.mark.parametrize("limits", [Limits(max_latency_ratio=None), Limits(min_score_ratio=None)])
def test_what_should_be_judged_and_cannot_be_is_no_pass(limits: Limits, place: Path, baseline: Baseline) -> None:
    verdict = gated(place / "bundle", replace(baseline, predictions=None), limits)
    assert (len(statuses(verdict)), verdict.exit_code) == (1, 2)


# Latency


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], Plan]:
    """The seconds that files take on a machine without noise, by name or by bundle folder/name; `opened later` multiplies."""
    now, opened = 0.0, 0
    seconds: dict[str, float] = {"opened later": 1.0}

    def opener(path: Path, preprocess: object, plan: Plan) -> Callable[[], Run]:
        def open_() -> Run:
            nonlocal opened
            opened += 1
            duration = seconds.get(f"{path.parent.name}/{path.stem}", seconds[path.stem])
            duration *= seconds["opened later"] ** opened

            def session() -> None:
                nonlocal now
                now += duration

            return session

        return open_

    for module in ("run", "commands"):
        monkeypatch.setattr(f"export.gate.{module}.opener", opener)
    return seconds, Plan(seconds=0.1, blocks=6, looks=2, clock=lambda: now)


Speeds = tuple[dict[str, float], Plan]


def timed(place: Path, baseline: Baseline, speeds: Speeds, now: dict[str, float]) -> Verdict:
    """Accept the bundle at INT8 in 2 ms beside FP32 in 4 ms, then judge it at other speeds."""
    seconds, plan = speeds
    seconds |= {"student_int8": 0.002, "student_fp32": 0.004}
    limits = Limits(min_score_ratio=None)
    was = accept(open_subject(place / "bundle"), Terms(None, limits, plan))
    seconds |= now
    return run.gate(place / "bundle", replace(was, environment=baseline.environment), Terms(None, limits, plan))


def test_a_machine_that_is_slower_today_changes_nothing(place: Path, baseline: Baseline, speeds: Speeds) -> None:
    verdict = timed(place, baseline, speeds, {"student_int8": 0.003, "student_fp32": 0.006})
    assert (verdict.exit_code, check(verdict, "latency").was) == (0, "0.500 of student_fp32")


def test_a_slower_served_file_fails(place: Path, baseline: Baseline, speeds: Speeds) -> None:
    verdict = timed(place, baseline, speeds, {"student_int8": 0.0022})
    assert (statuses(verdict), verdict.exit_code) == ({"latency": "fail"}, 1)
    assert "1.100 [1.100, 1.100] times the baseline's" in check(verdict, "latency").detail


def test_a_faster_file_that_does_the_same_is_not_believed(place: Path, baseline: Baseline, speeds: Speeds) -> None:
    verdict = timed(place, baseline, speeds, {"student_int8": 0.0015})
    assert (statuses(verdict), verdict.exit_code) == ({"latency": "unexplained"}, 2)


def test_on_another_machine_only_the_ratio_counts_and_may_fall(place: Path, baseline: Baseline, speeds: Speeds) -> None:
    elsewhere = replace(baseline, environment=baseline.environment | {"cpu": "Another CPU"})
    verdict = timed(place, elsewhere, speeds, {"student_int8": 0.0015})
    assert verdict.exit_code == 0
    assert statuses(verdict) == {"operators": "skipped"}
    assert "this is another machine" in check(verdict, "latency").detail
    assert "Another CPU" in verdict.notes[0]


def test_a_changed_float_file_cannot_be_divided_by(
    place: Path, baseline: Baseline, speeds: Speeds, tmp_path: Path
) -> None:
    seconds, plan = speeds
    seconds |= {"student_int8": 0.002, "student_fp32": 0.004}
    limits = Limits(min_score_ratio=None)
    was = accept(open_subject(place / "bundle"), Terms(None, limits, plan))
    verdict = run.gate(rebuilt(tmp_path, **more_work(tmp_path)), was, Terms(None, limits, plan))
    assert check(verdict, "latency").status == "inconclusive"
    assert "give --against OLD_BUNDLE" in check(verdict, "latency").detail


def test_beside_the_old_bundle_times_compare_directly(place: Path, speeds: Speeds, tmp_path: Path) -> None:
    seconds, plan = speeds
    old = Path(shutil.copytree(place / "bundle", tmp_path / "old"))
    seconds |= {"student_int8": 0.0025, "old/student_int8": 0.002}
    verdict = judge(place / "bundle", None, Terms(None, Limits(), plan), against=old)
    assert check(verdict, "latency").status == "fail"
    assert (check(verdict, "latency").was, check(verdict, "latency").now) == ("2.000 ms", "2.500 ms")


def test_an_old_bundle_that_is_not_the_baselines_is_refused(place: Path, tmp_path: Path) -> None:
    old = rebuilt(tmp_path, **padded(tmp_path))
    with pytest.raises(BundleError, match="its student_int8 is not the baseline's"):
        judge(place / "bundle", place / "baselines", Terms(None, NO_LATENCY, Plan()), against=old)


def test_nothing_is_recorded_on_an_unfit_machine(place: Path, speeds: Speeds, tmp_path: Path) -> None:
    seconds, plan = speeds
    seconds |= {"student_int8": 0.002, "student_fp32": 0.004, "opened later": 1.2}
    with pytest.raises(BundleError, match=r"machine: unfit for timing.*no baseline was written"):
        update(place / "bundle", tmp_path / "b", Terms(None, Limits(min_score_ratio=None), plan))
    assert not (tmp_path / "b").exists()
