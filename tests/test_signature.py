"""Signatures by OpenSSF Model Signing: tampering is found and the file named."""

import sys
from pathlib import Path
from typing import Any

import pytest
from elsewhere.files import ENVIRONMENTS, SCRIPTS, is_there, run_script
from onnx_files import small_files, write_small_bundle

from export.errors import BundleError
from export.signature import sign, verify


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was said of a signed bundle after each kind of tampering."""
    if not is_there("signing"):
        pytest.skip("run `make elsewhere`")
    folder = tmp_path_factory.mktemp("signing")
    write_small_bundle(folder / "bundle", small_files(folder))
    program = ENVIRONMENTS / "signing/bin/python"
    return run_script(program, SCRIPTS / "run_signing.py", folder / "bundle", folder / "out")[1]


def test_a_signed_bundle_is_accepted(facts: dict[str, Any]) -> None:
    assert (facts["sign own"], facts["nothing"]) == ("", "")


@pytest.mark.parametrize(
    ("tampered", "named"),
    [
        ("labels.txt", "Hash mismatch for 'labels.txt'"),
        ("serving/triton/small/1/model.onnx", "Hash mismatch for 'serving/triton/small/1/model.onnx'"),
        ("SHA256SUMS", "Hash mismatch for 'SHA256SUMS'"),
        ("golden/images.npy", "Missing files in model 'copy': golden/images.npy"),
        ("1/extra.py", "Extra files found in model 'copy': serving/triton-python/small/1/extra.py"),
        (".gitignore", "Extra files found in model 'copy': .gitignore"),
        ("link", "link' because it is a symlink"),
        ("no signature", "model.sig: is missing: the bundle is not signed"),
        ("garbage", "model.sig: does not fit this bundle"),
        ("empty", "model.sig: does not fit this bundle"),
    ],
)
def test_tampering_is_found_and_the_file_named(facts: dict[str, Any], tampered: str, named: str) -> None:
    assert named in facts[tampered]
    assert "\n" not in facts[tampered]


@pytest.mark.parametrize("key", ["verify other.public", "verify rsa.public", "verify own", "verify none"])
def test_another_key_accepts_nothing(facts: dict[str, Any], key: str) -> None:
    assert facts[key]


@pytest.mark.parametrize("key", ["own.locked", "rsa", "own.public", "none"])
def test_a_key_that_cannot_sign_is_one_sentence(facts: dict[str, Any], key: str) -> None:
    assert f"{key}.pem: cannot sign (" in facts[f"sign {key}"]


@pytest.mark.parametrize("call", [sign, verify])
def test_without_the_library_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)  # as if it were not installed
    with pytest.raises(BundleError, match=r"pip install -e '\.\[sign\]'"):
        call(tmp_path, tmp_path / "key.pem")
