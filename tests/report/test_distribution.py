"""The distribution has a name of its own, and nothing tells a person to install another's."""

import re
import tomllib
from pathlib import Path

import pytest

from compress.report.distribution import own_distribution

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")]
SOURCES = [path for folder in ("compress", "export") for path in (ROOT / folder).rglob("*.py")]
INSTALLS = re.compile(r"pip install ([^`#\n;)]*)")


def test_its_name_is_not_the_one_that_is_taken() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] != "compress"


@pytest.mark.parametrize("path", [*TEXTS, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_installs_a_stranger_and_every_path_is_a_project(path: Path) -> None:
    for arguments in INSTALLS.findall(path.read_text(encoding="utf-8")):
        for word in re.findall(r"[^\s'\"]+", arguments):
            assert not re.fullmatch(r"compress(\[.*)?", word), arguments
            if word.startswith("."):
                assert (ROOT / word.partition("[")[0] / "pyproject.toml").is_file(), arguments


def test_what_a_build_leaves_in_the_clone_is_not_taken_for_the_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "compress.egg-info"
    left.mkdir()
    (left / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: compress\nVersion: 9\n")
    (left / "top_level.txt").write_text("compress\nexport\n")
    monkeypatch.syspath_prepend(tmp_path)
    own_distribution.cache_clear()
    assert "Apache License" in (own_distribution().read_text("licenses/LICENSE") or "")
