"""INT8 is refused where this version of ONNX Runtime is known to compute it wrongly; the processor's flags are planted."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import onnxruntime
import pytest
from gated_bundles import contents, networks
from onnx_files import save

from compress.commands import doctor
from export.bundle.write import write_bundle
from export.errors import BundleError
from export.runtime import session as session_module
from export.runtime.faults import fault_of
from export.runtime.session import open_session

FLAGS = frozenset({"avx2", "avx512_vnni", "amx_int8"})
SENTENCE = (
    "ONNX Runtime 1.24.4 computes INT8 wrongly on processors with AMX (amx_int8): pip install 'onnxruntime>=1.25'"
)
# Python imports it at the start of every process, the sandbox's included.
PLANTED = f"""
import onnxruntime
from export.onnx_file import targets
onnxruntime.__version__ = "1.24.4"
targets.host_instruction_sets = lambda: frozenset({sorted(FLAGS)})
"""


@pytest.mark.parametrize(
    ("version", "wrong"),
    [
        ("1.15.1", False), ("1.20.1", False), ("1.21.0", True), ("1.24.4", True), ("1.24.0rc1", True), ("1.25.0", False),
        ("1.32.0", False), ("2.21.0", False), ("unknown", False),
    ],
)  # fmt: skip
def test_the_versions_that_are_wrong_on_amx(version: str, wrong: bool) -> None:
    assert (fault_of(version, FLAGS) is not None) is wrong
    assert fault_of(version, FLAGS - {"amx_int8"}) is None


def test_an_int8_file_is_refused_and_a_float_file_and_an_unoptimized_one_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = networks()
    path = save(models["student_int8"], tmp_path / "student_int8.onnx")
    open_session(path)
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    monkeypatch.setattr(session_module, "host_instruction_sets", lambda: FLAGS)
    for model in (path, path.read_bytes()):
        with pytest.raises(BundleError) as caught:
            open_session(model)
        assert str(caught.value).endswith(f": {SENTENCE}")
        open_session(model, optimize=False)
    open_session(models["student_fp32"].SerializeToString())


@pytest.mark.parametrize(
    "command",
    [
        ["export.check"],
        ["export.gate", "--update-baseline", "--no-accuracy", "--no-latency"],
        ["export.verify"],
        ["export.predict"],
    ],
)
def test_commands_blame_the_runtime_and_not_the_bundle(tmp_path: Path, command: list[str]) -> None:
    write_bundle(tmp_path / "bundle", contents(tmp_path, networks()))
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(PLANTED)
    search = os.pathsep.join([str(tmp_path / "planted"), str(Path(__file__).parents[2])])
    image = [str(tmp_path / "image.png")] if command == ["export.predict"] else []
    done = subprocess.run(
        [sys.executable, "-m", command[0], str(tmp_path / "bundle"), *command[1:], *image],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"student_int8.onnx: {SENTENCE}\n"


def test_the_doctor_says_why_an_old_version_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "host_instruction_sets", lambda: FLAGS)
    (found,) = doctor.packages(["onnxruntime>=1.25"], {"onnxruntime": "1.24.4"}.get)
    assert found.value == "1.24.4, needs >=1.25; it computes INT8 wrongly on processors with AMX"


def test_the_required_version_has_no_known_fault() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    required = [
        line for line in (*project["dependencies"], *project["optional-dependencies"]["gpu"]) if "onnxruntime" in line
    ]
    assert len(required) == 2
    assert [fault_of(line.partition(">=")[2], FLAGS) for line in required] == [None, None]
