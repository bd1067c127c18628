"""What the bundle gives to servers: read by Triton's own schema, run in a real Triton, replayed in other runtimes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from bundles import SERVING, digit_contents
from elsewhere.files import ENVIRONMENTS, SCRIPTS, Logits, is_there, run, run_script

from export.bundle.inside import read_sums
from export.bundle.read import Bundle, read_bundle
from export.bundle.write import write_bundle
from export.serving.protocol import dns_name


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("serving")
    write_bundle(folder / "bundle", digit_contents(folder))
    return read_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def served(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Logits, dict[str, Any]]:
    """What a Triton server that was started on the bundle answered, and said of itself."""
    if not is_there("triton"):
        pytest.skip("run `make elsewhere`")
    out = tmp_path_factory.mktemp("triton") / "out"
    return run_script(ENVIRONMENTS / "triton/bin/python", SCRIPTS / "run_triton.py", bundle.path, out)


def answer(path: Path, inputs: np.ndarray) -> np.ndarray:
    """Run a file in a session with ONNX Runtime's defaults."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": inputs})[0])


def repository(bundle: Bundle, kind: str) -> Path:
    return bundle.path / "serving" / kind / bundle.name


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_triton_gives_the_golden_answers_to_the_last_bit(
    bundle: Bundle, served: tuple[Logits, dict[str, Any]], way: str
) -> None:
    np.testing.assert_array_equal(served[0][way], bundle.golden.outputs["student_int8"])


def test_triton_gathers_single_requests_into_batches_that_answer_alike(
    bundle: Bundle, served: tuple[Logits, dict[str, Any]]
) -> None:
    logits, facts = served
    assert facts["requests"] == 64
    assert 8 <= facts["executions"] < 64  # of at most 8 images each
    assert bundle.golden.differing("student_int8", logits["whole"]) == []
    turns = np.arange(64) % len(bundle.golden.inputs)
    assert np.abs(logits["batches"] - bundle.golden.outputs["student_int8"][turns]).max() <= 1e-5


def test_triton_answers_the_bundles_request_with_the_bundles_response(
    bundle: Bundle, served: tuple[Logits, dict[str, Any]]
) -> None:
    expected = json.loads((bundle.path / "serving" / "response.json").read_text())
    found = served[1]["response"]
    assert {**found, "outputs": None} == {**expected, "outputs": None}
    ((one,), (other,)) = found["outputs"], expected["outputs"]
    assert {**one, "data": None} == {**other, "data": None}
    assert np.array_equal(np.array(one["data"], np.float32), np.array(other["data"], np.float32))


def test_triton_names_the_class_by_its_label(bundle: Bundle, served: tuple[Logits, dict[str, Any]]) -> None:
    logits = bundle.golden.outputs["student_int8"][0]
    score, index, label = served[1]["classified"][0].split(":")
    assert (int(index), label) == (logits.argmax(), bundle.labels[logits.argmax()])
    assert float(score) == pytest.approx(logits.max(), abs=1e-4)


@pytest.mark.parametrize("request_", ["wrong_shape", "too_many"])
def test_triton_refuses_a_bad_request_and_serves_on(served: tuple[Logits, dict[str, Any]], request_: str) -> None:
    assert served[1][request_].startswith("400: ")
    assert served[1]["ready_after_that"] is True


def test_every_configuration_is_legal_in_tritons_schema(bundle: Bundle, served: tuple[Logits, dict[str, Any]]) -> None:
    configs = served[1]["configs"]
    kinds = ["config", "configs/cpu", "configs/cuda", "configs/tensorrt"]
    onnx_paths = {f"serving/triton/small/{kind}.pbtxt" for kind in kinds}
    assert set(configs) == {*onnx_paths, "serving/triton-python/small/config.pbtxt"}
    for name, config in configs.items():
        folder = repository(bundle, Path(name).parts[1])
        assert config["name"] == "small"
        assert (folder / "1" / config.get("default_model_filename", "model.py")).is_file()
        assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": ["3", "8", "8"]}]
        (wanted,) = config["output"]
        assert (wanted["name"], wanted["data_type"], wanted["dims"]) == ("logits", "TYPE_FP32", ["3"])
        assert (folder / wanted["label_filename"]).read_text().splitlines() == list(bundle.labels)
        (warmup,) = config["model_warmup"]
        raw = (folder / "warmup" / warmup["inputs"]["input"]["input_data_file"]).read_bytes()
        assert raw == bundle.golden.inputs[:1].tobytes()


def test_the_configurations_say_what_was_benchmarked(served: tuple[Logits, dict[str, Any]]) -> None:
    configs = served[1]["configs"]
    for name, config in configs.items():
        assert config["max_batch_size"] == SERVING.max_batch_size
        assert config["instance_group"][0]["count"] == SERVING.instances
        on_gpu = "cuda" in name or "tensorrt" in name
        assert config["instance_group"][0]["kind"] == ("KIND_GPU" if on_gpu else "KIND_CPU")
        threads = config.get("parameters", {}).get("intra_op_thread_count")
        assert threads == (None if on_gpu else {"string_value": "2"})


def test_the_python_backends_configuration_reaches_the_server(served: tuple[Logits, dict[str, Any]]) -> None:
    """What the running server says of itself, not what the file says."""
    config = served[1]["config"]
    assert (config["backend"], config["max_batch_size"]) == ("python", 8)
    assert config["parameters"]["intra_op_thread_count"] == {"string_value": "2"}
    assert config["model_warmup"][0]["name"] == "golden"


def test_the_gpu_files_are_half_precision_and_no_onnx_to_openvino(bundle: Bundle) -> None:
    """OpenVINO Model Server takes whichever file of the version's folder ends in .onnx."""
    version = repository(bundle, "triton") / "1"
    assert [path.name for path in version.iterdir() if path.name.endswith(".onnx")] == ["model.onnx"]
    assert (version / "model.cuda").read_bytes() == bundle.files["student_fp16"].read_bytes()
    assert (version / "model.onnx").read_bytes() == bundle.files["student_int8"].read_bytes()
    found = answer(version / "model.cuda", bundle.golden.inputs)  # ONNX Runtime does not mind the name
    assert bundle.golden.differing("student_fp16", found) == []


def test_the_models_of_the_repositories_take_no_second_place_on_the_disk(bundle: Bundle) -> None:
    places = [repository(bundle, kind) / "1" / "model.onnx" for kind in ("triton", "triton-python")]
    assert all(path.samefile(bundle.files["student_int8"]) and not path.is_symlink() for path in places)


def test_where_files_cannot_be_linked_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_bundle(tmp_path / "bundle", digit_contents(tmp_path))
    copied = read_bundle(tmp_path / "bundle")
    placed = repository(copied, "triton") / "1" / "model.onnx"
    assert not placed.samefile(copied.files["student_int8"])
    assert placed.read_bytes() == copied.files["student_int8"].read_bytes()


def test_without_a_benchmark_threads_are_the_servers_choice(tmp_path: Path) -> None:
    contents = digit_contents(tmp_path)
    unknown = replace(SERVING, threads=None, max_batch_size=1)
    write_bundle(tmp_path / "bundle", replace(contents, serving=unknown))
    text = (tmp_path / "bundle" / "serving" / "triton" / "small" / "config.pbtxt").read_text()
    assert "thread_count" not in text
    assert "dynamic_batching" not in text


def test_the_symmetric_int8_file_is_tensorrts(tmp_path: Path) -> None:
    contents = digit_contents(tmp_path)
    serving = replace(SERVING, files={**SERVING.files, "tensorrt": "student_int8"}, kind="tensorrt")
    write_bundle(tmp_path / "bundle", replace(contents, serving=serving))
    model = tmp_path / "bundle" / "serving" / "triton" / "small"
    assert (model / "config.pbtxt").read_text() == (model / "configs" / "tensorrt.pbtxt").read_text()
    assert 'value: "INT8"' in (model / "config.pbtxt").read_text()
    assert "KIND_GPU" in (model / "config.pbtxt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "web"])
def test_every_served_file_gives_the_golden_answers_elsewhere(bundle: Bundle, tmp_path: Path, runtime: str) -> None:
    if not is_there(runtime):
        pytest.skip("run `make elsewhere`")
    shutil.copyfile(bundle.path / "golden" / "inputs.npy", tmp_path / "floats.npy")
    shutil.copyfile(bundle.path / "golden" / "images.npy", tmp_path / "pixels.npy")
    version = repository(bundle, "triton") / "1"
    names = {"model.onnx": "student_int8", "model.cuda": "student_fp16"}
    for file, name in names.items():
        shutil.copyfile(version / file, tmp_path / f"{name}.onnx")
    found, _ = run(runtime, tmp_path)
    assert [(name, bundle.golden.differing(name, found[name])) for name in names.values()] == [
        (name, []) for name in names.values()
    ]


def test_the_protocols_request_holds_a_golden_image_and_its_answer(bundle: Bundle) -> None:
    request, response = (
        json.loads((bundle.path / "serving" / f"{name}.json").read_text()) for name in ("request", "response")
    )
    (given,), (wanted,) = request["inputs"], response["outputs"]
    assert (given["name"], given["datatype"], given["shape"]) == ("input", "FP32", [1, 3, 8, 8])
    image = np.array(given["data"], np.float32).reshape(given["shape"])
    np.testing.assert_array_equal(image, bundle.golden.inputs[:1])
    assert (wanted["name"], wanted["datatype"], wanted["shape"]) == ("logits", "FP32", [1, 3])
    np.testing.assert_allclose(
        np.array([wanted["data"]], np.float32), answer(bundle.files["student_int8"], image), atol=1e-5
    )
    assert response["model_name"] == bundle.name


def test_kserve_starts_triton_with_the_threads_that_were_benchmarked(bundle: Bundle) -> None:
    document = yaml.safe_load((bundle.path / "serving" / "kserve.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    model = document["spec"]["predictor"]["model"]
    assert (model["modelFormat"], model["protocolVersion"]) == ({"name": "triton"}, "v2")
    assert model["resources"] == {"requests": {"cpu": "2"}, "limits": {"cpu": "2"}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet50-int8", "resnet50-int8"), ("my_net_", "my-net"), ("3d", "model-3d"), ("9" * 64, f"model-{'9' * 57}")],
)
def test_kubernetes_gets_names_that_it_allows(name: str, expected: str) -> None:
    assert dns_name(name) == expected


def test_a_server_leaves_the_bundle_as_it_was(bundle: Bundle, served: tuple[Logits, dict[str, Any]]) -> None:
    listed = read_sums(bundle.path)
    found = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert found == {*listed, "SHA256SUMS"}
    read_bundle(bundle.path)
