import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answered import answered
from onnx_files import class_folders, classifier, colour_reader, save, small_contents, small_files, write_small_bundle

from export.bundle.write import write_bundle
from export.errors import BundleError
from export.images.read import digest
from export.onnx_file.model_file import inspect
from export.onnx_file.targets import CPU, CUDA, TARGETS, host_target
from export.runtime import measure as measure_module
from export.runtime.accuracy import accuracy, score_files, score_of
from export.runtime.environment import environment, fingerprint
from export.runtime.intervals import clopper_pearson
from export.runtime.measure import BenchPlan, bench
from export.runtime.memory import peak_memory_mb
from export.runtime.providers import PROVIDERS, Runtime, available_providers
from export.runtime.rows import AccuracyRow, BenchJson, TimingRow
from export.runtime.session import bind, open_session, resize_input
from export.tasks.classification import CLASSIFICATION, by_class, decode, further

REPOSITORY = Path(__file__).parents[1]
BRIEF = BenchPlan(batches=(1,), threads=(1,), providers=("cpu",), seconds=0.01, blocks=6)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def student(files: dict[str, Path]) -> dict[str, Path]:
    """The float student alone."""
    return {"student_fp32": files["student_fp32"]}


def noise(batch: int = 2, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)


# Sessions


def test_a_bound_run_takes_any_number_of_images_but_no_other_size(files: dict[str, Path]) -> None:
    session = open_session(files["teacher_fp32"], threads=1)
    bind(session, noise(batch=5))()
    with pytest.raises(BundleError, match=r"input \(5, 3, 20, 20\): the network cannot run on it"):
        bind(session, noise(batch=5, size=20))


def test_a_resized_network_answers_at_the_new_size_like_one_made_for_it() -> None:
    images = noise(size=40)
    resized = open_session(resize_input(classifier(size=16).SerializeToString(), (40, 40)))
    made = open_session(classifier(size=40).SerializeToString())
    np.testing.assert_array_equal(resized.run(None, {"input": images})[0], made.run(None, {"input": images})[0])


@pytest.mark.parametrize("size", [8, 24, 32])
def test_a_network_with_its_size_baked_in_cannot_be_resized(size: int) -> None:
    with pytest.raises(BundleError, match=f"image size {size}: the network's size is fixed"):
        resize_input(classifier(pooled=False).SerializeToString(), (size, size))


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x08\x09"])
def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"bad\.onnx: ONNX Runtime cannot load it"):
        open_session(tmp_path / "bad.onnx")


def test_a_provider_that_is_missing_is_never_replaced_by_another(files: dict[str, Path]) -> None:
    with pytest.raises(
        BundleError, match=r"TensorrtExecutionProvider: not available, ONNX Runtime has .*: pip install onnxruntime-gpu"
    ):
        open_session(files["student_fp32"], runs_in=Runtime(PROVIDERS["tensorrt"], "f32"))


def test_threads_are_those_asked_for(files: dict[str, Path]) -> None:
    options = open_session(files["student_fp32"], threads=3).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)


# What files say of themselves


def test_precision_is_read_from_the_graph(files: dict[str, Path]) -> None:
    assert [inspect(path).precision for path in files.values()] == ["fp32", "fp32", "fp16"]


@pytest.mark.parametrize(("place", "size"), [(1, 2), (2, 0), (3, 5000)])
def test_a_file_without_an_image_input_is_refused(tmp_path: Path, place: int, size: int) -> None:
    model = classifier()
    model.graph.input[0].type.tensor_type.shape.dim[place].dim_value = size
    with pytest.raises(BundleError, match=r"input: must be \(batch, 1, 3 or 4 channels, height, width\)"):
        inspect(save(model, tmp_path / "odd.onnx"))


# Accuracy


def test_top1_and_agreement_by_hand() -> None:
    labels = np.array([0, 1, 2, 2])
    scores = {"float": answered(np.array([0, 1, 2, 0]), labels), "int8": answered(np.array([0, 2, 2, 0]), labels)}
    intervals = {right: clopper_pearson(right, 4) for right in (2, 3, 4)}  # 0/1 values are counts
    assert accuracy(scores, reference=scores["float"]) == {
        "float": AccuracyRow(
            score=0.75,
            further={"top-5": None, "balanced accuracy": 2.5 / 3},
            agreement=1.0,
            images=4,
            score_ci95=intervals[3],
            agreement_ci95=intervals[4],
        ),
        "int8": AccuracyRow(
            score=0.5,
            further={"top-5": None, "balanced accuracy": 0.5},
            agreement=0.75,
            images=4,
            score_ci95=intervals[2],
            agreement_ci95=intervals[3],
        ),
    }


def test_every_score_is_scikit_learn_s() -> None:
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

    draw = np.random.default_rng(0)
    labels = draw.integers(0, 11, 500)  # the twelfth class has no image
    logits = draw.standard_normal((500, 12)) + 2 * np.eye(12)[labels]
    found = score_of(CLASSIFICATION, [logits], [labels])
    predictions = logits.argmax(1)
    assert further(found.rows)["top-5"] == top_k_accuracy_score(labels, logits, k=5, labels=range(12))
    present = np.isin(predictions, labels)  # scikit-learn warns of answers that are no label
    assert further(found.rows[present])["balanced accuracy"] == pytest.approx(
        balanced_accuracy_score(labels[present], predictions[present])
    )
    classes = by_class({"file": found.rows}, [f"{label}" for label in range(12)], ("file",))
    assert classes is not None
    matrix = confusion_matrix(labels, predictions, labels=range(12))
    assert classes["images"] == matrix.sum(1).tolist()
    assert classes["files"]["file"]["answered"] == matrix.sum(0).tolist()
    assert classes["files"]["file"]["correct"] == matrix.diagonal().tolist()
    mistakes = {(row, column): matrix[row, column] for row, column in np.argwhere(matrix) if row != column}
    assert {(row, column): count for row, column, count in classes["files"]["file"]["mistakes"] or ()} == mistakes


def test_equal_outputs_come_as_arg_max_takes_them_and_what_is_no_number_comes_first() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 3.0, 0.0, 0.0], [0.0] * 6, [2.0, np.nan, 1.0, 0.0, 5.0, 4.0]])
    assert decode(logits).tolist() == [[1, 2, 3, 0, 4], [0, 1, 2, 3, 4], [1, 4, 5, 0, 2]]
    assert decode(logits)[:, 0].tolist() == np.argmax(logits, axis=1).tolist()


def test_five_classes_have_no_top5_and_six_do(tmp_path: Path) -> None:
    images, labels = np.zeros((2, 3, 16, 16), np.float32), np.array([0, 1])
    for classes in (5, 6):
        file = save(classifier(classes=classes), tmp_path / f"{classes}.onnx")
        (found,) = score_files({"file": file}, [(images, labels)], CLASSIFICATION).values()
        assert (further(found.rows)["top-5"] is None) == (classes == 5)


def test_scores_cover_every_batch_in_order(tmp_path: Path) -> None:
    colours = np.array([2, 0, 1, 1, 0, 2, 2])
    images = np.zeros((7, 3, 16, 16), np.float32)
    images[np.arange(7), colours] = 1
    batches = ((images[i : i + 3], colours[i : i + 3]) for i in range(0, 7, 3))
    (found,) = score_files({"r": save(colour_reader(), tmp_path / "r.onnx")}, batches, CLASSIFICATION).values()
    assert found.predictions[:, 0].tolist() == colours.tolist()
    assert (found.score, found.images) == (1.0, 7)


def test_no_images_is_an_error(files: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match="no images to score"):
        score_files(files, iter(()), CLASSIFICATION)


def test_images_of_another_size_are_an_error(files: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match="teacher_fp32: cannot run on"):
        score_files(files, [(noise(size=20), np.zeros(2, np.int64))], CLASSIFICATION)


# Timing


@pytest.fixture(scope="module")
def timings(files: dict[str, Path]) -> list[TimingRow]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_module, "SLOW", 1e9)  # leaves no file out, however slow this machine's float16 is
        found = bench(files, replace(BRIEF, batches=(4, 1), threads=(0, 1), image_sizes=((24, 24),), seconds=0.02))
    assert found.warnings == []
    return found.timings


def test_every_file_has_one_row_at_every_setting(timings: list[TimingRow]) -> None:
    settings = [(row["name"], row["image_size"], row["batch"], row["threads"]) for row in timings]
    assert settings == [
        (name, size, batch, threads)
        for size in (16, 24)
        for batch in (1, 4)
        for threads in (1, 0)
        for name in ("teacher_fp32", "student_fp32", "student_fp16")
    ]


def test_a_row_is_consistent_in_itself(timings: list[TimingRow], files: dict[str, Path]) -> None:
    for row in timings:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["throughput_ips"] == pytest.approx(row["batch"] / row["p50_ms"] * 1000)
        assert row["size_mb"] == files[row["name"]].stat().st_size / 1e6
        assert len(row["block_ms"]) == 6 <= row["runs"]
        assert (row["provider"], row["provider_options"], row["file"]) == (CPU, {}, f"{row['name']}.onnx")


def test_speedups_are_against_the_files_of_the_same_setting(timings: list[TimingRow]) -> None:
    for start in range(0, len(timings), 3):
        blocks = {row["name"]: np.array(row["block_ms"]) for row in timings[start : start + 3]}
        for row in timings[start : start + 3]:
            assert row["speedup"] is not None
            assert row["speedup_vs_student_fp32"] is not None
            assert row["speedup"]["ratio"] == np.median(blocks["teacher_fp32"] / blocks[row["name"]])
            assert row["speedup_vs_student_fp32"]["ratio"] == np.median(blocks["student_fp32"] / blocks[row["name"]])


def test_without_a_reference_the_speedup_is_unknown(files: dict[str, Path]) -> None:
    found = bench({"student_fp16": files["student_fp16"]}, BRIEF)
    assert [(row["speedup"], row["speedup_vs_student_fp32"]) for row in found.timings] == [(None, None)]


def test_a_size_that_a_network_cannot_take_is_left_out_with_a_warning(tmp_path: Path) -> None:
    stiff = {"student_fp32": save(classifier(pooled=False), tmp_path / "stiff.onnx")}
    found = bench(stiff, replace(BRIEF, image_sizes=((24, 24),)))
    assert [row["image_size"] for row in found.timings] == [16]
    assert found.warnings == ["image size 24: the network's size is fixed, time it at that size; left out"]


@pytest.mark.skipif(CUDA in available_providers(), reason="CUDA is here")
def test_a_missing_provider_is_a_warning(student: dict[str, Path]) -> None:
    found = bench(student, replace(BRIEF, providers=("cpu", "cuda")))
    assert found.warnings == ["this machine has no CUDAExecutionProvider: not timed"]


def test_another_target_than_this_machine_is_a_warning(student: dict[str, Path]) -> None:
    other = next(name for name in TARGETS if name != host_target().name)
    found = bench(student, BRIEF, target=other)
    assert [warning.partition(" and ")[0] for warning in found.warnings] == [f"the INT8 files are made for {other}"]


def test_emulated_float16_is_timed_at_the_headline_settings_only(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "SLOW", 1e-9)  # whatever its speed
    found = bench(files, replace(BRIEF, batches=(1, 2), threads=(1, 2), image_sizes=((24, 24),)))
    halves = [(row["image_size"], row["batch"], row["threads"]) for row in found.timings if row["precision"] == "fp16"]
    assert halves == [(16, 1, 1), (24, 1, 1)]
    assert [warning.partition(" (")[0] for warning in found.warnings] == [
        "student_fp16: this CPU has no fast float16 kernels"
    ]


def test_files_of_different_sizes_are_not_compared(tmp_path: Path) -> None:
    files = {"a": save(classifier(size=16), tmp_path / "a.onnx"), "b": save(classifier(size=24), tmp_path / "b.onnx")}
    with pytest.raises(BundleError, match=r"must be the same in all files, got \[\(3, 16, 16\), \(3, 24, 24\)\]"):
        bench(files, BRIEF)


def test_peak_memory_grows_with_the_weights(tmp_path: Path) -> None:
    small, large = (save(classifier(width, pooled=False, classes=500), tmp_path / f"{width}.onnx") for width in (1, 80))
    less, more = (peak_memory_mb(path, batch=1, shape=(3, 16, 16)) for path in (small, large))
    assert less is not None
    assert more is not None
    assert large.stat().st_size / 1e6 == pytest.approx(41, abs=1)
    assert more - less > 40


def test_peak_memory_of_a_file_that_cannot_run_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"garbage")
    assert peak_memory_mb(tmp_path / "bad.onnx", batch=1, shape=(3, 16, 16)) is None


# Environment


def test_the_fingerprint_is_the_hardware_alone() -> None:
    here = environment()
    assert fingerprint(here) == fingerprint(here | {"versions": {}, "python": "4.0", "os": "other"})
    assert fingerprint(here) != fingerprint(here | {"cores": 1024})


def test_the_environment_is_json() -> None:
    assert json.loads(json.dumps(environment())) == environment()


# The command


def run_bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m export.bench` where importing torch or anything of compress fails."""
    block = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'compress']))\n"
        "runpy.run_module('export.bench', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-W", "error", "-c", block, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=dict(os.environ))


QUICK = ("--seconds", "0.01", "--blocks", "6", "--batches", "1", "--threads", "1")


def test_the_command_needs_no_torch_and_scores_and_times(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", ["cat", "dog", "gnu"])
    known = [digest((tmp_path / "data" / name / "0.png").read_bytes()) for name in ("cat", "gnu")]
    write_bundle(tmp_path / "bundle", replace(small_contents(small_files(tmp_path)), validation=known))
    done = run_bench(tmp_path / "bundle", *QUICK, "--data", tmp_path / "data", "--json", tmp_path / "out.json")
    assert (done.returncode, done.stderr) == (0, "")
    found: BenchJson = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"metric", "accuracy", "accuracy_elsewhere", "timings", "environment", "warnings"}
    assert found["accuracy"]["student_fp32"]["images"] == 2
    assert "2 of 6 images are the network's validation images; the other 4 are left out" in done.stdout
    assert [row["name"] for row in found["timings"]] == ["teacher_fp32", "student_fp32", "student_fp16"]
    assert "CPU, 1 thread, batch 1, 16 px" in done.stdout


def test_the_commands_table_is_aligned(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "bundle", small_files(tmp_path))
    lines = run_bench(tmp_path / "bundle", *QUICK).stdout.splitlines()[1:5]
    assert lines[0].startswith("file          p50 ms")
    assert len({len(line) for line in lines}) == 1


def test_a_broken_bundle_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "bundle", small_files(tmp_path))
    (tmp_path / "bundle" / "labels.txt").write_text("dog\ncat\ngnu\n")
    done = run_bench(tmp_path / "bundle")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "labels.txt: is not the file the bundle was made with (SHA-256 differs): get the bundle again\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--threads", "-1"), "argument --threads: must be a whole number >= 0, got '-1'"),
        (("--blocks", "1"), "argument --blocks: must be a whole number >= 6, got '1'"),
    ],
)
def test_a_wrong_argument_is_exit_code_2(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    done = run_bench(tmp_path, *words)
    assert done.returncode == 2
    assert sentence in done.stderr
