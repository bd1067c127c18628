"""Providers are rows: which are here, what they are told, and what they compute."""

import json
from pathlib import Path

import numpy as np
import pytest
from altered import plant
from onnx_files import classifier, save

from export.errors import BundleError
from export.onnx_file.targets import CPU
from export.runtime import accuracy as accuracy_module
from export.runtime import measure as measure_module
from export.runtime import providers as providers_module
from export.runtime.accuracy import accuracy_elsewhere, score_elsewhere, score_files
from export.runtime.measure import BenchPlan, bench
from export.runtime.providers import PLAIN, PROVIDERS, Arithmetic, Provider, Runtime, missing, present, runtimes
from export.runtime.session import open_session
from export.tasks.classification import CLASSIFICATION

OPENVINO = PROVIDERS["openvino"]
BRIEF = BenchPlan(batches=(1,), threads=(1,), seconds=0.01, blocks=6)
needs_openvino = pytest.mark.skipif(missing(OPENVINO) is not None, reason=str(missing(OPENVINO)))


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Provider:
    """A row beside the CPU provider's that computes in bf16 too, and wrongly in both."""

    def shifted(outputs: np.ndarray, runs_in: Runtime) -> np.ndarray:
        return np.roll(outputs, {"f32": 1, "bf16": 2}[runs_in.arithmetic], axis=1)

    return plant(monkeypatch, (accuracy_module, measure_module), shifted, name=CPU)


@pytest.fixture
def file(tmp_path: Path) -> dict[str, Path]:
    return {"student_fp32": save(classifier(), tmp_path / "student_fp32.onnx")}


def test_a_row_s_key_is_the_word_that_recipes_and_commands_take() -> None:
    from compress.recipe.stages import BenchStage

    assert [row.key for row in PROVIDERS.values()] == list(PROVIDERS)
    stage = BenchStage(stage="bench", providers=tuple(PROVIDERS))
    assert stage.providers == tuple(PROVIDERS)


def test_openvino_is_told_threads_and_arithmetic_in_the_only_option_that_it_heeds() -> None:
    assert OPENVINO.options is not None
    (option,) = OPENVINO.options(2, "bf16").items()
    assert option[0] == "load_config"
    assert json.loads(option[1]) == {
        "CPU": {"INFERENCE_NUM_THREADS": "2", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "bf16"}
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512_vnni"}, ("f32",)),
        ({"avx512_bf16"}, ("f32", "bf16")),
        ({"amx_bf16"}, ("f32", "bf16")),
    ],
)
def test_bf16_is_for_processors_that_have_it(
    flags: set[str], expected: tuple[Arithmetic, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers_module, "host_instruction_sets", lambda: frozenset(flags))
    assert OPENVINO.arithmetics == expected
    assert PROVIDERS["cpu"].arithmetics == ("f32",)


def test_a_plugin_that_is_not_installed_is_a_sentence_with_the_command(
    file: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers_module, "find_spec", lambda _: None)
    with pytest.raises(BundleError, match="not installed: pip install onnxruntime-ep-openvino"):
        open_session(file["student_fp32"], runs_in=Runtime(OPENVINO, "f32"))
    assert "openvino" not in present("auto")
    found = bench(file, BenchPlan(batches=(1,), threads=(1,), providers=("cpu", "openvino"), seconds=0.01, blocks=6))
    assert found.warnings == [
        "not timed: OpenVINOExecutionProvider: not installed: pip install onnxruntime-ep-openvino"
    ]


def test_a_plugin_that_offers_nothing_on_this_processor_is_a_sentence(
    file: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers_module, "find_spec", lambda _: object())
    monkeypatch.setattr(providers_module, "plugin_devices", lambda _: [])
    with pytest.raises(BundleError, match="is installed, and offers nothing on this processor"):
        open_session(file["student_fp32"], runs_in=Runtime(OPENVINO, "f32"))


def test_bf16_on_a_processor_without_it_is_a_sentence(file: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match="CPU does not compute in bf16 here"):
        open_session(file["student_fp32"], runs_in=Runtime(PROVIDERS["cpu"], "bf16"))


def test_a_provider_that_computes_wrongly_is_caught_by_its_own_score(wrong: Provider, file: dict[str, Path]) -> None:
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 16), dtype=np.float32)
    (logits,) = open_session(file["student_fp32"]).run(None, {"input": images})
    batch = (images, logits.argmax(axis=1))
    reference = score_files(file, [batch], CLASSIFICATION)["student_fp32"]
    assert reference.score == 1.0
    others = dict(score_elsewhere(file, lambda: [batch], CLASSIFICATION, providers=["cpu", "other"]))
    found = accuracy_elsewhere(others, reference=reference)
    scores = {(other["provider"], other["arithmetic"]): other["files"]["student_fp32"] for other in found}
    assert scores[CPU, "f32"]["score"] == scores[CPU, "bf16"]["score"] == 0.0
    assert scores[CPU, "f32"]["agreement"] == 0.0


def test_an_arithmetic_whose_outputs_are_not_those_of_f32_is_left_out_and_named(
    wrong: Provider, file: dict[str, Path]
) -> None:
    found = bench(file, BenchPlan(batches=(1,), threads=(1,), providers=("other",), seconds=0.01, blocks=6))
    assert [row.get("arithmetic") for row in found.timings] == ["f32"]
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("student_fp32: Other bf16 computes it wrongly on this machine")


def test_the_cpu_provider_s_rows_are_the_first_and_say_where_they_ran(file: dict[str, Path]) -> None:
    (row,) = bench(file, BenchPlan(batches=(1,), threads=(1,), providers=("cpu",), seconds=0.01, blocks=6)).timings
    assert (row["provider"], row.get("arithmetic"), row.get("left_to_others")) == (CPU, "f32", [])
    assert (row.get("open_ms") or 0) > 0


@needs_openvino
def test_openvino_computes_as_the_cpu_provider_and_is_timed_beside_it(file: dict[str, Path]) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16), dtype=np.float32)
    here, there = (
        open_session(file["student_fp32"], runs_in=one, threads=1).run(None, {"input": images})[0]
        for one in (PLAIN, Runtime(OPENVINO, "f32"))
    )
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4)
    found = bench(file, BenchPlan(batches=(1,), threads=(1,), providers=("cpu", "openvino"), seconds=0.01, blocks=6))
    rows = [(row["provider"], row.get("arithmetic")) for row in found.timings]
    assert rows == [(one.provider.name, one.arithmetic) for one in runtimes(["cpu", "openvino"])]
    assert all(row["speedup_vs_student_fp32"] for row in found.timings)
    assert all(row.get("left_to_others") == [] and row["peak_memory_mb"] for row in found.timings)


def test_the_cpu_provider_is_first_and_beside_its_plugins_whatever_the_order_asked_for() -> None:
    assert present(["openvino", "cpu"]) == present(["openvino"]) == ["cpu", "openvino"]
    assert present(["cuda"]) == ["cuda"]


@pytest.mark.filterwarnings("ignore:Specified provider")  # it is not listed here
def test_all_that_this_machine_has_leaves_out_what_is_listed_and_does_not_start(
    file: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As onnxruntime-gpu lists TensorRT's, whose libraries are no part of the package.
    providers_module.starts.cache_clear()
    monkeypatch.setattr(providers_module, "available_providers", lambda: (CPU, PROVIDERS["tensorrt"].name))
    assert missing(PROVIDERS["tensorrt"]) is None
    assert "tensorrt" not in present("auto")
    assert "cpu" in present("auto")
    providers_module.starts.cache_clear()


def test_a_plugin_whose_library_does_not_load_is_a_sentence_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> list[object]:
        raise BundleError("OpenVINOExecutionProvider: its library does not load (x): pip install -U it")

    monkeypatch.setattr(providers_module, "find_spec", lambda _: object())
    monkeypatch.setattr(providers_module, "plugin_devices", broken)
    assert "does not load" in str(missing(OPENVINO))
    assert "openvino" not in present("auto")
