"""The doctor names what is missing and how to repair it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from compress.commands import doctor
from compress.commands.doctor import Finding
from export.onnx_file.targets import TARGETS


def test_a_package_is_judged_by_the_distributions_own_requirement() -> None:
    requirements = ["here>=2", "old>=2", "absent[pt]>=3.6", 'pytest>=8; extra == "dev"']
    found = list(doctor.packages(requirements, {"here": "2.1", "old": "1.9"}.get))
    assert found == [
        Finding("here", "ok", "2.1"),
        Finding("old", "missing", "1.9, needs >=2", "pip install 'old>=2', or make setup"),
        Finding("absent", "missing", "not installed", "pip install 'absent[pt]>=3.6', or make setup"),
    ]


def test_onnxruntime_gpu_stands_for_onnxruntime() -> None:
    (found,) = doctor.packages(["onnxruntime>=1.22"], {"onnxruntime-gpu": "1.31.1"}.get)
    assert found == Finding("onnxruntime", "ok", "1.31.1")


def test_a_local_build_of_torch_satisfies_its_requirement() -> None:
    (found,) = doctor.packages(["torch>=2.11"], {"torch": "2.11.0+cu130"}.get)
    assert found.status == "ok"


@pytest.mark.parametrize(
    ("target", "flags", "status", "words"),
    [
        ("cpu_vnni", {"avx2", "avx512_vnni"}, "ok", "VNNI: INT8 up to about 4x"),
        ("cpu_avx2", {"avx2"}, "ok", "about 1.9x the arithmetic of FP32, 7-bit weights"),
        ("cpu_avx2", {"sse4_2"}, "warn", "no AVX2"),
        ("cpu_arm", {"asimd", "asimddp"}, "ok", "dot product: INT8 up to about 4x"),
        ("cpu_arm", {"asimd"}, "warn", "no dot product"),
    ],
)
def test_the_processor_says_what_int8_can_gain(target: str, flags: set[str], status: str, words: str) -> None:
    found = doctor.cpu("A CPU", TARGETS[target], flags)
    assert found.status == status
    assert f"A CPU: target {target}" in found.value
    assert words in found.value


@pytest.mark.parametrize(
    ("card", "cuda_build", "usable", "status"),
    [
        (None, None, False, "ok"),
        (None, "13.0", False, "ok"),
        ("H100", "13.0", True, "ok"),
        ("H100", None, False, "warn"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_a_warning(
    card: str | None, cuda_build: str | None, usable: bool, status: str
) -> None:
    assert doctor.accelerator(card, cuda_build, usable).status == status


@pytest.mark.parametrize(
    ("names", "card", "status"),
    [
        (["CPUExecutionProvider"], None, "ok"),
        (["CPUExecutionProvider"], "H100", "warn"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "H100", "ok"),
    ],
)
def test_a_gpu_without_its_provider_is_a_warning(names: list[str], card: str | None, status: str) -> None:
    assert doctor.providers(names, card).status == status


@pytest.mark.parametrize(("version", "status"), [((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "warn")])
def test_an_untested_python_is_a_warning(version: tuple[int, int], status: str) -> None:
    assert doctor.python(version).status == status


@pytest.mark.parametrize(("total_gb", "status"), [(None, "warn"), (2.0, "warn"), (16.0, "ok")])
def test_little_memory_is_a_warning(total_gb: float | None, status: str) -> None:
    assert doctor.memory(total_gb).status == status


def test_the_disk_is_judged_at_the_nearest_parent_that_exists(tmp_path: Path) -> None:
    assert doctor.disk(tmp_path / "runs" / "later").value.endswith(f"free at {tmp_path}")


def test_a_file_in_the_place_of_the_runs_is_missing_ground(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert doctor.disk(tmp_path / "runs" / "tiny").status == "missing"


def test_every_finding_that_is_not_ok_has_a_repair(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    found = [
        *doctor.packages(["absent"], lambda _: None),
        doctor.python((3, 13)),
        doctor.memory(None),
        doctor.disk(tmp_path / "runs"),
        doctor.cpu("A CPU", TARGETS["cpu_avx2"], ()),
        doctor.accelerator("H100", None, usable=False),
        doctor.providers([], "H100"),
    ]
    assert [finding for finding in found if finding.status == "ok" or not finding.repair] == []


def test_the_examination_ends_with_2_only_where_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "machine", lambda out: [Finding("disk", "warn", str(out), "free some")])
    monkeypatch.setattr(doctor, "own_distribution", lambda: SimpleNamespace(requires=["numpy"]))
    assert doctor.examine(tmp_path) == 0
    monkeypatch.setattr(doctor, "own_distribution", lambda: SimpleNamespace(requires=["numpy", "no-such-package"]))
    assert doctor.examine(tmp_path) == 2
    assert "pip install 'no-such-package'" in capsys.readouterr().out
