"""The exported files in runtimes that this project does not use: trained networks, held-out digits, one script in each."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from elsewhere.files import Logits, agreement, is_there, run, run_here, score, write_digits
from networks import Mobile, Residual
from numpy.typing import NDArray

pytestmark = pytest.mark.slow
NETWORKS = {"residual": Residual, "mobile": Mobile}
INT8 = "int8_cpu_avx2"
FILES = ["fp16", "fp32", "int8_cpu_arm", INT8, f"{INT8}_pixels"]
IMAGES_UNDER_EMULATION = 300


@dataclass(frozen=True)
class Exported:
    """A trained network's files and inputs, the inputs' labels, and what ONNX Runtime here and torch make of them."""

    folder: Path
    labels: NDArray[np.int64]
    here: Logits  # by file
    in_torch: Logits  # by target


@pytest.fixture(scope="session", params=["mobile", pytest.param("residual", marks=pytest.mark.acceptance)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    labels, in_torch = write_digits(NETWORKS[request.param], folder, targets=("cpu_avx2", "cpu_arm"))
    return Exported(folder, labels, run_here(folder), in_torch)


def needs(runtime: str) -> None:
    if not is_there(runtime):
        pytest.skip("run `make elsewhere`")


def test_the_networks_know_the_digits_in_every_precision(exported: Exported) -> None:
    assert sorted(exported.here) == FILES
    assert {name for name, logits in exported.here.items() if score(logits, exported.labels) < 0.93} == set()


def test_bytes_give_the_same_logits_as_floats(exported: Exported) -> None:
    assert np.array_equal(exported.here[INT8], exported.here[f"{INT8}_pixels"])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "web"])
def test_every_file_gives_the_same_classes_elsewhere(exported: Exported, runtime: str) -> None:
    needs(runtime)
    found, _ = run(runtime, exported.folder)
    assert sorted(found) == FILES
    for name, here in exported.here.items():
        assert found[name].dtype == np.float32, name
        assert agreement(found[name], here) >= 0.99, name
        assert abs(score(found[name], exported.labels) - score(here, exported.labels)) <= 0.002, name


@pytest.mark.parametrize("name", [INT8, f"{INT8}_pixels"])
def test_openvino_runs_every_layer_in_integers(exported: Exported, name: str) -> None:
    needs("openvino")
    _, facts = run("openvino", exported.folder)
    layers = Counter[str](facts["files"][name]["layers"])
    nodes = onnx.load(exported.folder / "fp32.onnx").graph.node
    assert layers.total() == sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in nodes)
    assert [kernel for kernel in layers if not kernel.upper().endswith("_I8")] == []


def test_arm_processors_give_the_classes_of_the_fake_quantized_network(exported: Exported, tmp_path: Path) -> None:
    needs("arm64")
    (tmp_path / "int8.onnx").symlink_to(exported.folder / "int8_cpu_arm.onnx")
    for name in ("floats.npy", "pixels.npy"):
        np.save(tmp_path / name, np.load(exported.folder / name)[:IMAGES_UNDER_EMULATION])
    found, facts = run("arm64", tmp_path)
    assert facts["machine"] == "aarch64"
    in_torch, labels = exported.in_torch["cpu_arm"][:IMAGES_UNDER_EMULATION], exported.labels[:IMAGES_UNDER_EMULATION]
    assert agreement(found["int8"], in_torch) >= 0.99
    assert abs(score(found["int8"], labels) - score(in_torch, labels)) <= 0.0034  # one image of 300
