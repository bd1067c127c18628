"""The chain on a small network of a person's own: what it makes, what it keeps, what it refuses."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.torch import load_file, save_file
from several import ended, start
from typer.testing import CliRunner

from compress import pipeline
from compress.artifact import finish, is_complete, read_meta
from compress.cli import app
from compress.commands.clean import leftovers
from compress.data.batches import Batch
from compress.data.feed import Feed
from compress.errors import ArtifactError, CompressError
from compress.logs.stage_log import StageLog
from compress.pipeline import plan_recipe, run_recipe, run_stage
from compress.pruning.recovery import reconstruction
from compress.quant.mixture import Border
from compress.quant.rows import PtqTarget, SpeedRow, TrialRow
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from compress.recipe.stages import QatStage
from compress.report.shape import Report
from compress.stages import prune, qat
from export.bundle.read import read_bundle
from export.check.findings import check_bundle
from export.onnx_file.graph import weight_levels
from export.onnx_file.targets import TARGETS
from export.runtime.latency import Ratio

RECIPE = """
name: small
target: cpu_avx2
data: {dataset: digits, image_size: 16, limit_per_class: 40}
model: {arch: "NETWORKS:small"}
stages:
  - {stage: source, fit: {epochs: 4, batch_size: 32, lr: 0.05}}
  - {stage: prune, keep_macs: 0.6}
  - {stage: distill, fit: {epochs: 2, batch_size: 32, lr: 0.02}}
  - {stage: ptq, calibration_images: 64, methods: [minmax]}
  - {stage: qat, fit: {epochs: 1, batch_size: 32, lr: 0.001}, calibration_images: 64}
  - {stage: export, verify_images: 64}
  - {stage: bench, seconds: 0.05, blocks: 6, batches: [1, 2], threads: [1]}
""".replace("NETWORKS", str(Path(__file__).with_name("networks.py")))
NAMES = ["source", "prune", "distill", "ptq", "qat", "export", "bench"]
FILES = ["teacher_fp32", "student_fp32", "student_fp16", "student_ptq_int8", "student_int8"]


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "small.yaml"
    path.write_text(RECIPE)
    return read_recipe(path, [f"out={folder}", *overrides])


def run(folder: Path, *overrides: str, until: str | None = None) -> int:
    return run_recipe(
        recipe(folder, *overrides), trust_code=True, until=until, verbose=False, command="compress run small.yaml"
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run's folder; its stages were rehearsed once, which takes longer than most of them."""
    monkeypatch.setattr("compress.rehearsal.rehearse", lambda *_: None)
    shutil.copytree(finished / "small", tmp_path / "small")
    return tmp_path


def report(folder: Path) -> Report:
    value: Report = json.loads((folder / "small" / "report.json").read_text())
    return value


def test_every_stage_and_every_file_is_reported(finished: Path) -> None:
    found = report(finished)
    assert [row["stage"] for row in found["stages"]] == NAMES
    assert {row["name"] for row in found["deployed"]} == set(FILES)
    assert {(row["batch"], row["threads"], row["image_size"]) for row in found["deployed"]} == {(1, 1, 16), (2, 1, 16)}
    assert all(0 <= (row["score"] or 0) <= 1 for row in found["deployed"])
    assert found["verdict"] == "pass"
    assert "<html" in (finished / "small" / "report" / "index.html").read_text()


def test_the_reported_accuracy_is_the_files_own_in_onnx_runtime(finished: Path) -> None:
    """Scored again in a session of its own."""
    import torch

    from compress.run import open_run

    run_ = open_run(recipe(finished), trust_code=True, verbose=False)
    bundle = read_bundle(finished / "small" / "bundle")
    session = onnxruntime.InferenceSession(bundle.files["student_int8"], providers=["CPUExecutionProvider"])
    right = total = 0
    for images, labels, *_ in run_.feed.validation():
        (logits,) = session.run(None, {"input": images.contiguous(memory_format=torch.contiguous_format).numpy()})
        right, total = right + int((logits.argmax(1) == labels.numpy()).sum()), total + len(labels)
    row = next(row for row in report(finished)["deployed"] if row["name"] == "student_int8")
    assert row["score"] == pytest.approx(right / total)


def test_the_bundle_stands_alone(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished / "small" / "bundle", moved)
    bundle = read_bundle(moved)
    assert list(bundle.files) == FILES
    assert bundle.labels == tuple("0123456789")
    assert bundle.preprocess.image_size == (16, 16)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=moved, check=True)
    for path in bundle.files.values():
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert session.run(None, {"input": np.zeros((3, 3, 16, 16), np.float32)})[0].shape == (3, 10)


def test_the_bundle_keeps_its_promises(finished: Path) -> None:
    bundle, findings = check_bundle(finished / "small" / "bundle")
    assert findings == []
    assert bundle is not None


def test_files_and_bundle_name_what_made_them_and_neither_targets_nor_the_place_change_that(copied: Path) -> None:
    made_by = plan_recipe(recipe(copied))[4].key
    assert run(copied, "targets.max_size_ratio=0.9") == 0
    bundle, findings = check_bundle(copied / "small" / "bundle")
    assert bundle is not None
    assert findings == []
    for model in map(onnx.load, bundle.files.values()):
        assert {entry.key: entry.value for entry in model.metadata_props}["recipe_digest"] == made_by
    assert bundle.manifest["recipe_digest"] == made_by
    assert plan_recipe(recipe(copied, "qat.fit.epochs=2"))[4].key != made_by


def test_the_int8_file_holds_the_targets_grid_and_says_how_to_feed_it(finished: Path) -> None:
    model = onnx.load(read_bundle(finished / "small" / "bundle").files["student_int8"])
    levels = weight_levels(model)
    assert len(levels) == 7
    assert all(level.min() >= -64 and level.max() <= 63 for level in levels.values())
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["preprocess"])["image_size"] == 16
    assert json.loads(metadata["classes"]) == list("0123456789")
    assert metadata["target"] == "cpu_avx2"


def test_the_student_costs_what_the_recipe_allows(finished: Path) -> None:
    rows = {row["stage"]: row["metrics"] for row in report(finished)["stages"]}
    before, after = rows["source"]["macs_m"], rows["prune"]["macs_m"]
    assert before is not None
    assert after is not None
    assert after <= 0.6 * before


ITERATIVE = (
    "prune.steps=2",
    "prune.recover={epochs: 1, batch_size: 32, lr: 0.01}",
    "prune.reconstruct_images=64",
)


def test_pruning_that_was_killed_after_a_cut_goes_on_to_the_same_weights(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights() -> bytes:
        assert run(copied, *ITERATIVE, until="prune") == 0
        artifact = plan_recipe(recipe(copied, *ITERATIVE))[1].directory
        metrics = read_meta(artifact).metrics
        assert (metrics["score_as_cut"] or 1) < (metrics["score"] or 0)
        content = (artifact / "weights.safetensors").read_bytes()
        shutil.rmtree(artifact)
        return content

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prune, "save_network", killed)
        with pytest.raises(KeyboardInterrupt):
            run(copied, *ITERATIVE, until="prune")
    assert weights() == weights()


def test_the_seed_alone_decides_the_weights(finished: Path, tmp_path: Path) -> None:
    """The first run was made in this process too, with torch's generator wherever it stood."""
    weights = []
    for seed in (0, 1):
        assert run(tmp_path, f"seed={seed}", until="source") == 0
        weights.append(
            (plan_recipe(recipe(tmp_path, f"seed={seed}"))[0].directory / "weights.safetensors").read_bytes()
        )
    (first,) = (finished / "small").glob("00-source-*/weights.safetensors")
    assert weights[0] == first.read_bytes()
    assert weights[1] != weights[0]


def test_the_log_says_where_the_images_are(finished: Path) -> None:
    (source,) = (finished / "small").glob("00-source-*")
    assert "400 training images in memory" in (source / "log.jsonl").read_text()


def test_a_second_run_runs_nothing(copied: Path) -> None:
    assert all(line.cached for line in plan_recipe(recipe(copied)))
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("meta.json")}
    assert run(copied) == 0
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("meta.json")} == before
    assert all(row["cached"] for row in report(copied)["stages"])


def test_changed_qat_epochs_keep_prune_and_distill(copied: Path) -> None:
    plan = plan_recipe(recipe(copied, "qat.fit.epochs=2"))
    assert [line.cached for line in plan] == [True, True, True, True, False, False, False]
    assert plan[4].reason == "changed: fit.epochs 1 to 2"
    assert plan[5].reason == "qat runs"
    before = {path: path.stat().st_mtime_ns for path in (copied / "small").glob("0[0-3]-*/meta.json")}
    assert run(copied, "qat.fit.epochs=2", until="qat") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [line.cached for line in plan_recipe(recipe(copied, "qat.fit.epochs=2"))] == [True] * 5 + [False] * 2
    assert all(line.cached for line in plan_recipe(recipe(copied)))  # the first recipe's artifacts are still there
    assert [leftover.path for leftover in leftovers(copied / "small")] == [plan[4].directory]


def test_part_of_a_finished_run_leaves_its_report_its_bundle_and_its_recipe(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def contents() -> dict[Path, bytes]:
        names = ("report.json", "recipe.yaml", "report/index.html", "bundle/SHA256SUMS")
        return {path: path.read_bytes() for path in (copied / "small" / name for name in names)}

    before = contents()
    assert run(copied, "seed=1", "source.fit.epochs=1", "targets.max_size_ratio=0.0001", until="source") == 0
    said = capsys.readouterr()
    assert "PARTIAL stopped after source, so the targets were not judged" in said.out
    assert "its report and bundle come from a run with more stages and were not replaced" in said.err
    assert contents() == before


def test_part_of_a_recipe_is_reported_as_such_and_not_judged(tmp_path: Path) -> None:
    changes = ("source.fit.epochs=1", "targets.max_size_ratio=0.0001")
    assert run(tmp_path, *changes, until="source") == 0
    assert report(tmp_path)["verdict"] == "partial"
    assert run(tmp_path, *changes, until="prune") == 0
    assert [row["stage"] for row in report(tmp_path)["stages"]] == ["source", "prune"]
    assert read_recipe(tmp_path / "small" / "recipe.yaml") == recipe(tmp_path, *changes)


def test_a_recipe_that_is_run_until_its_last_stage_is_judged(copied: Path) -> None:
    assert run(copied, "targets.max_size_ratio=0.0001", until="bench") == 1
    assert report(copied)["verdict"] == "fail"


def test_a_refused_run_leaves_the_recipe_of_the_last_report(copied: Path) -> None:
    before = (copied / "small" / "recipe.yaml").read_bytes()
    with pytest.raises(CompressError, match="cannot be reached"):
        run(copied, "prune.keep_macs=0.001")
    with pytest.raises(CompressError, match="add --trust-code"):
        run_recipe(recipe(copied, "seed=1"), trust_code=False, until=None, verbose=False, command="")
    assert (copied / "small" / "recipe.yaml").read_bytes() == before


def zero_weights(path: Path) -> None:
    """Zero four int8 weight tensors of a file; its size and its time stay."""
    model, before = onnx.load(path), path.stat()
    for tensor in [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8][:4]:
        tensor.raw_data = bytes(len(tensor.raw_data))
    path.write_bytes(model.SerializeToString())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def negate_head(path: Path) -> None:
    """Negate the classifier of saved weights; their size and time stay."""
    tensors, before = load_file(path), path.stat()
    save_file({name: -tensor if name.startswith("head.") else tensor for name, tensor in tensors.items()}, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def as_if_made_so(artifact: Path) -> None:
    """Write meta.json anew, as a stage would have that made these files and measured others."""
    meta = read_meta(artifact)
    (artifact / "meta.json").unlink()
    (artifact / ".digests.json").unlink(missing_ok=True)
    finish(artifact, artifact.with_name("moved"), meta)
    artifact.with_name("moved").rename(artifact)


def scores(folder: Path) -> dict[str, float | None]:
    return {row["name"]: row["score"] for row in report(folder)["deployed"]}


def test_an_exported_file_that_was_changed_is_made_again(
    copied: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = plan_recipe(recipe(copied))[5].directory
    good = (export / "student_int8.onnx").read_bytes()
    zero_weights(export / "student_int8.onnx")
    plan = plan_recipe(recipe(copied))
    assert [line.cached for line in plan] == [True] * 5 + [False] * 2
    assert plan[5].reason == f"{export / 'student_int8.onnx'}: was changed after its stage wrote it"
    assert run(copied) == 0
    assert f"{plan[5].reason}; export runs again" in capsys.readouterr().err
    assert (export / "student_int8.onnx").read_bytes() == good
    assert (copied / "small" / "bundle" / "student_int8.onnx").read_bytes() == good
    assert scores(copied) == scores(finished)


def test_a_changed_teacher_is_made_again_and_what_was_made_from_the_same_bits_stands(
    copied: Path, finished: Path
) -> None:
    source = plan_recipe(recipe(copied))[0].directory
    good = (source / "weights.safetensors").read_bytes()
    negate_head(source / "weights.safetensors")
    assert run(copied) == 0
    assert (source / "weights.safetensors").read_bytes() == good
    assert [row["cached"] for row in report(copied)["stages"]] == [False] + [True] * 6
    assert scores(copied) == scores(finished)


def test_files_that_score_otherwise_than_their_stage_measured_fail_the_run(copied: Path) -> None:
    """An exporter at fault, whose files are whole: nothing but their score tells."""
    export = plan_recipe(recipe(copied))[5].directory
    zero_weights(export / "student_int8.onnx")
    as_if_made_so(export)
    assert run(copied) == 1
    (sentence,) = report(copied)["failures"]
    assert sentence.startswith("student_int8: score is ")
    assert "its stage (qat) measured" in sentence


@pytest.mark.slow
def test_a_teacher_that_scores_otherwise_than_it_did_fails_the_run(copied: Path) -> None:
    source = plan_recipe(recipe(copied))[0].directory
    negate_head(source / "weights.safetensors")
    as_if_made_so(source)
    sections = [line.removeprefix("  - ") for line in RECIPE.splitlines() if line.startswith("  - ")]
    brief = f"stages=[{', '.join(sections[:2] + sections[-2:])}]"  # without INT8, of which this is not
    assert run(copied, brief, "targets.max_drop=0.5") == 1
    assert [row["cached"] for row in report(copied)["stages"]] == [True] + [False] * 3  # all descend from it
    assert report(copied)["failures"][0].startswith("teacher_fp32: score is ")


@pytest.mark.parametrize("same", [True, False])
def test_an_interrupted_stage_goes_on_only_from_the_parent_that_it_began_with(tmp_path: Path, same: bool) -> None:
    pipeline._open(tmp_path / "work", "parent")
    (tmp_path / "work" / "checkpoint-distill.pt").write_bytes(b"half")
    pipeline._open(tmp_path / "work", "parent" if same else "another")
    assert (tmp_path / "work" / "checkpoint-distill.pt").exists() == same


@pytest.mark.parametrize("change", ["seed=1", "data.image_size=24", "data.augment.flip=true"])
def test_other_data_or_another_seed_runs_everything(copied: Path, change: str) -> None:
    assert not any(line.cached for line in plan_recipe(recipe(copied, change)))


def test_a_cut_to_a_latency_is_of_its_target_one_to_macs_of_any(tmp_path: Path) -> None:
    keys = {}
    for goal in ("keep_macs", "keep_latency"):
        stages = [{"stage": "source", "fit": {"epochs": 1}}, {"stage": "prune", goal: 0.5}, {"stage": "ptq"}]
        facts = {"name": "a", "out": str(tmp_path), "model": {"arch": "torchvision:resnet18"}, "stages": stages}
        for target in ("cpu_avx2", "cpu_vnni"):
            keys[goal, target] = list(pipeline._keys(Recipe.model_validate(facts | {"target": target})))[1]
    assert keys["keep_macs", "cpu_avx2"] == keys["keep_macs", "cpu_vnni"]
    assert keys["keep_latency", "cpu_avx2"] != keys["keep_latency", "cpu_vnni"]


def test_another_onnx_runtime_measures_everything_anew_and_another_machine_what_is_the_machine_s(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "99.1")
        plan = plan_recipe(recipe(copied))
        assert [line.stage for line in plan if not line.cached] == ["ptq", "qat", "export", "bench"]
    monkeypatch.setattr(pipeline, "_machine", lambda: "another")
    assert [line.stage for line in plan_recipe(recipe(copied)) if not line.cached] == ["export", "bench"]


def test_a_run_killed_in_a_stage_goes_on_from_the_last_finished_one(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.stages import STAGES

    for directory in (copied / "small").glob("0[456]-*"):
        shutil.rmtree(directory)
    real = STAGES["qat"]

    def killed(cfg: object, src: Path, out: Path, run: object) -> None:
        (out / "cpu_avx2").mkdir()
        (out / "cpu_avx2" / "weights.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(STAGES, "qat", killed)
    with pytest.raises(KeyboardInterrupt):
        run(copied)
    plan = plan_recipe(recipe(copied))
    assert [line.cached for line in plan] == [True, True, True, True, False, False, False]
    assert plan[4].reason == "was interrupted; continues"
    monkeypatch.setitem(STAGES, "qat", real)
    assert run(copied, until="qat") == 0
    assert is_complete(plan[4].directory)
    assert (plan[4].directory / "cpu_avx2" / "weights.safetensors").read_bytes() != b"half"


def test_a_missed_target_is_exit_1_and_the_report_names_it(copied: Path) -> None:
    assert run(copied, "targets.max_size_ratio=0.0001") == 1
    found = report(copied)
    assert found["verdict"] == "fail"
    assert "max_size_ratio" in str(found["failures"])


def test_a_stage_runs_alone_from_any_artifact(finished: Path, tmp_path: Path) -> None:
    source = next((finished / "small").glob("02-distill-*"))
    out = tmp_path / "narrower"
    narrower = recipe(tmp_path, "prune.keep_macs=0.8")
    assert run_stage(narrower, "prune", src=source, out=out, trust_code=True, verbose=False) == 0
    assert read_meta(out).metrics["macs_m"] < read_meta(source).metrics["macs_m"]  # type: ignore[operator]


def test_files_that_are_float_on_purpose_are_no_warning(finished: Path, tmp_path: Path) -> None:
    exported, timed = tmp_path / "export", tmp_path / "bench"
    for stage, src, out in (
        ("export", next((finished / "small").glob("02-distill-*")), exported),
        ("bench", exported, timed),
    ):
        assert run_stage(recipe(tmp_path), stage, src=src, out=out, trust_code=True, verbose=False) == 0
    said = (exported / "log.jsonl").read_text() + str(json.loads((timed / "bench.json").read_text())["warnings"])
    assert "float" not in said
    assert "Inserted" not in (exported / "audit.json").read_text()


def test_a_stage_refuses_what_it_cannot_take(finished: Path, tmp_path: Path) -> None:
    source = next((finished / "small").glob("04-qat-*"))
    with pytest.raises(ArtifactError, match=r"prune takes float, but .* contains fakequant"):
        run_stage(recipe(tmp_path), "prune", src=source, out=tmp_path / "out", trust_code=True, verbose=False)
    with pytest.raises(ArtifactError, match="exists already"):
        run_stage(recipe(tmp_path), "prune", src=source, out=tmp_path, trust_code=True, verbose=False)


def test_an_unreachable_keep_macs_is_one_sentence_and_leaves_nothing_to_trust(copied: Path) -> None:
    with pytest.raises(CompressError, match=r"keep_macs: .* cannot be reached, the narrowest network has"):
        run(copied, "prune.keep_macs=0.001", until="prune")
    assert not plan_recipe(recipe(copied, "prune.keep_macs=0.001"))[1].cached


@pytest.mark.parametrize(
    "criterion",
    [
        "taylor",
        *(pytest.param(one, marks=pytest.mark.acceptance) for one in ("l1", "fpgm", "random", "obs")),
    ],
)
def test_every_criterion_reaches_its_budget(copied: Path, criterion: str) -> None:
    assert run(copied, f"prune.criterion={criterion}", "prune.scope=isomorphic", until="prune") == 0


def test_large_images_are_not_all_loaded_to_be_reconstructed_from(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    calibration = Feed.calibration

    def counted(feed: Feed, images: int, *, labelled: bool = False) -> Iterator[Batch]:
        loaded.append(images)
        return calibration(feed, images, labelled=labelled)

    monkeypatch.setattr(Feed, "calibration", counted)
    monkeypatch.setattr(reconstruction, "MAX_BYTES", 1)
    assert run(copied, "prune.criterion=l2", until="prune") == 0
    assert loaded[-1] == reconstruction.JUDGED


def test_sparsity_learning_and_an_iterative_plan_with_recovery(copied: Path) -> None:
    overrides = [
        "prune.steps=2",
        "prune.keep_macs=0.35",
        "prune.recover={epochs: 1, batch_size: 32, lr: 0.01}",
        "prune.sparsity={fit: {epochs: 1, batch_size: 32, lr: 0.01}, strength: 0.001}",
    ]
    assert run(copied, *overrides, until="distill") == 0
    pruned = plan_recipe(recipe(copied, *overrides))[1].directory
    plan = json.loads((pruned / "plan.json").read_text())
    assert len(plan["cuts"]) == 2
    assert all(plan["cuts"])
    lines = [json.loads(line) for line in (pruned / "log.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines if "epoch" in line] == ["sparsity", "recover-1"]


def test_good_calibration_saves_the_training_and_the_report_says_so(copied: Path) -> None:
    assert run(copied, "qat.skip_if_ptq_drop_below=0.5") == 0
    found = report(copied)
    assert "student_int8" not in {row["name"] for row in found["deployed"]}
    qat = next(row for row in found["stages"] if row["stage"] == "qat")
    assert qat["metrics"]["trained"] == 0
    notes = (plan_recipe(recipe(copied, "qat.skip_if_ptq_drop_below=0.5"))[4].directory / "log.jsonl").read_text()
    assert "less than skip_if_ptq_drop_below" in notes


@pytest.mark.parametrize(("drop", "enough", "skipped"), [(0.01, 0.02, True), (0.02, 0.02, False), (-0.01, 0.0, True)])
def test_training_is_skipped_only_where_calibration_loses_less(
    tmp_path: Path, drop: float, enough: float, skipped: bool
) -> None:
    trial = TrialRow(
        number_format="int8",
        calibration="minmax",
        keep_float=[],
        score=0.5,
        drop=drop,
        agreement=1.0,
        kl=0.0,
        latency_ratio=None,
        met=True,
    )
    ptq = PtqTarget(methods=[], sensitivity=[], trials=[trial], chosen=0, calibration="minmax", score=0.5)
    section = QatStage(stage="qat", skip_if_ptq_drop_below=enough)
    with StageLog(tmp_path, stage="qat") as log:
        found = qat._skip(section, log, TARGETS["cpu_avx2"], ptq)
    assert (found is not None) == skipped


def test_every_target_gets_files_on_its_own_grid(copied: Path) -> None:
    assert run(copied, "further_targets=[tensorrt, cpu_vnni]", until="export") == 0
    folder = next(
        path for path in (copied / "small").glob("05-export-*") if (path / "student_int8_tensorrt.onnx").exists()
    )
    names = {path.stem for path in folder.glob("student_*int8*.onnx")}
    assert names == {
        *("student_int8", "student_int8_tensorrt", "student_int8_cpu_vnni", "student_int8_uint8"),
        *("student_ptq_int8", "student_ptq_int8_tensorrt", "student_ptq_int8_cpu_vnni", "student_ptq_int8_uint8"),
    }
    for name in names:
        target = next((TARGETS[end] for end in ("tensorrt", "cpu_vnni") if name.endswith(end)), TARGETS["cpu_avx2"])
        levels = weight_levels(onnx.load(folder / f"{name}.onnx")).values()
        lowest, highest = min(int(level.min()) for level in levels), max(int(level.max()) for level in levels)
        assert target.weight_min <= lowest, name
        assert highest <= target.weight_max, name
        assert max(-lowest, highest) == target.weight_scale_divisor, name  # all of its own grid


def test_trained_layers_go_back_to_float_until_the_accuracy_holds(copied: Path) -> None:
    """No loss at all is hard to hold after a bad training; whatever is chosen must be what the artifact holds."""
    assert run(copied, "qat.max_drop=0.0", "qat.fit.lr=0.3", "qat.loss=[{name: cross_entropy}]", until="qat") == 0
    folder = plan_recipe(recipe(copied, "qat.max_drop=0.0", "qat.fit.lr=0.3", "qat.loss=[{name: cross_entropy}]"))[
        4
    ].directory
    trials = json.loads((folder / "trials-cpu_avx2.json").read_text())
    assert trials[0]["keep_float"] == []
    kept = json.loads((folder / "cpu_avx2" / "architecture.json").read_text())["keep_float"]
    best = min(trials, key=lambda trial: (not trial["met"], trial["kl"]))
    assert len(kept) == len(best["keep_float"]) == read_meta(folder).metrics["float_groups"]
    assert not (folder / "trials-cpu_avx2").exists()


def test_ranges_can_be_learned_and_layers_kept_in_float(copied: Path) -> None:
    changes = [
        "qat.ranges=lsq",
        "qat.keep_float=[stem.*]",
        "qat.reestimate_batchnorm_images=64",
        "qat.calibration=percentile",
        "export.limits.max_float_fraction=1",
    ]
    assert run(copied, *changes, until="export") == 0
    audits = json.loads((plan_recipe(recipe(copied, *changes))[5].directory / "audit.json").read_text())
    assert audits["student_int8"]["float_layers"] == ["stem.0"]


def test_an_export_limit_that_is_exceeded_fails_the_run_and_names_the_layer(copied: Path) -> None:
    changes = ["qat.keep_float=[stem.*]", "export.limits={max_float_layers: 0, max_float_fraction: 1}"]
    assert run(copied, *changes) == 1
    (sentence,) = report(copied)["failures"]
    assert "stem.0" in sentence


def test_other_ways_to_train(copied: Path) -> None:
    overrides = [
        "data.augment={crop: random_resized, flip: true, mixup: 0.2, cutmix: 1.0}",
        "source.label_smoothing=0.1",
        "source.fit={epochs: 1, batch_size: 32, optimizer: adamw, lr: 0.001, ema_decay: 0.9, clip_norm: 1.0, precision: bf16}",
        "distill.fit.epochs=1",
        "distill.loss=[{name: cross_entropy, weight: 0.3}, {name: kd, temperature: 4.0, weight: 0.7}]",
        "qat.loss=[{name: kd}, {name: pkt, layers: [block1, block2], weight: 10}]",
    ]
    assert run(copied, *overrides, until="qat") == 0


def test_a_full_disk_is_one_sentence_and_leaves_nothing_to_trust(copied: Path) -> None:
    """A file-size limit makes the kernel refuse the write in its middle, as a full disk does."""
    changes, limits = ("seed=5", "source.fit.epochs=1"), resource.getrlimit(resource.RLIMIT_FSIZE)
    planned = plan_recipe(recipe(copied, *changes))[0]
    words = ["run", str(copied / "small.yaml"), f"--out={copied}", "--trust-code", "--until=source"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        done = CliRunner().invoke(app, [*words, *(f"--set={change}" for change in changes)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 2, done.output
    assert done.stderr.splitlines()[-1].endswith("(ulimit -f); the same command then continues")
    assert not is_complete(planned.directory)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    words = ["compress", "run", str(tmp_path / "small.yaml"), f"--out={tmp_path}", "--trust-code", "--until=qat"]
    (tmp_path / "small.yaml").write_text(RECIPE)
    brief = ["--set=source.fit.epochs=2", "--set=distill.fit.epochs=1"]
    said = ended(start(f"import sys\nfrom compress import cli\nsys.argv = {words + brief}\ncli.main()"), within_s=300)
    assert [code for code, _ in said] == [0, 0], said
    plan = plan_recipe(recipe(tmp_path, "source.fit.epochs=2", "distill.fit.epochs=1"))
    assert [line.cached for line in plan] == [True, True, True, True, True, False, False]
    assert float(read_meta(plan[4].directory).metrics["score"] or 0) > 0.3


def test_the_plan_command_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    code = (
        "import sys; from pathlib import Path; from compress.pipeline import plan_recipe; from compress.recipe.read import read_recipe\n"
        "print(len(plan_recipe(read_recipe(Path(sys.argv[1]))))); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small.yaml")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


@pytest.mark.slow
def test_a_layer_that_is_faster_in_float_stays_so_in_both_int8_files(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(
        float_file: onnx.ModelProto, integer_file: onnx.ModelProto, **_: object
    ) -> tuple[list[SpeedRow], list[Border], float]:
        names = [name.removesuffix("/Conv") for node in float_file.graph.node if (name := node.name).endswith("/Conv")]
        slow = [SpeedRow(layer=name, float_ms=1, integer_ms=0.5, in_float=False) for name in names]
        slow[1]["integer_ms"] = 4.0
        return slow, [], 0.1

    monkeypatch.setattr("compress.quant.mixture.times_of_layers", times)
    monkeypatch.setattr("compress.stages.ptq.faster_than", lambda *_, **__: lambda _: Ratio(1.2, 1.1, 1.3))
    assert run(copied, "stages.3.calibration_images=63", "stages.5.limits.max_float_layers=0") == 0
    found = report(copied)
    assert found["ptq"] is not None
    assert found["audit"] is not None
    (layer,) = (row["layer"] for row in found["ptq"]["targets"]["cpu_avx2"]["speed"] if row["in_float"])
    for name in ("student_ptq_int8", "student_int8"):
        assert found["audit"][name]["float_layers"] == [layer]
        assert found["audit"][name]["reasons"][layer] == "it is faster in float"
    assert "1 stay in float" in (copied / "small" / "report" / "index.html").read_text()
