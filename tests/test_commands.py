"""What the commands on a bundle say where something is missing or cannot be; nothing is started."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from onnx_files import small_files, write_small_bundle

from export import audit, bench, serve, verify


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    write_small_bundle(folder / "bundle", small_files(folder))
    return folder / "bundle"


def test_without_kserve_one_sentence_says_what_to_install(
    called: Callable[..., int], bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert called(serve.main, bundle) == 2
    assert "pip install kserve" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["predict", "serve", "bench", "bundle.sandbox"])
def test_what_serves_a_bundle_needs_numpy_onnx_and_onnxruntime_alone(module: str) -> None:
    """Neither onnx_ir, which takes half a second to import, nor torch."""
    code = f"import sys; sys.modules.update(onnx_ir=None, torch=None); import export.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        (bench, ["--seconds", "0"]),
        (bench, ["--batches", "1,0"]),
        (bench, ["--threads", "-1"]),
        (verify, ["--images", "0"]),
        (verify, ["--tensor-images", "-1"]),
        (audit, ["--max-float-layers", "-1"]),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_name(
    bundle: Path,
    command: ModuleType,
    wrong: list[str],
    called: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        called(command.main, bundle, *wrong)
    assert f"argument {wrong[0]}: must be a" in capsys.readouterr().err
