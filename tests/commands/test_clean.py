"""What `compress clean` finds and removes, and what it never touches."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.artifact import exclusive
from compress.cli import app
from compress.commands.clean import leftovers, remove
from compress.errors import ArtifactError

USED, OLD = "00-source-000000000000", "00-source-111111111111"


def run_folder(root: Path) -> Path:
    """Write a run's folder with a used stage, and one of each thing that piles up."""
    for name in (USED, OLD, f".{OLD}.partial", ".bundle-x8k2", "bundle", "report", "00-source-by-hand"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_bytes(b"12345")
    for name in (".report.json.42.partial", "recipe.yaml", "notes.txt", ".lock"):
        (root / name).write_text("12345")
    report(root, USED)
    return root


def report(folder: Path, *stages: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"stages": [{"directory": stage} for stage in stages]}))


def test_what_no_report_uses_is_found_and_removed_and_all_else_stays(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run")
    before = {path.name for path in root.iterdir()}
    found = leftovers(root)
    gone = {OLD, f".{OLD}.partial", ".bundle-x8k2", ".report.json.42.partial"}
    assert {left.path.name for left in found} == gone
    assert {left.bytes for left in found} == {5}
    assert {path.name for path in root.iterdir()} == before
    assert remove(root) == found
    assert {path.name for path in root.iterdir()} == before - gone
    assert leftovers(root) == []


def test_a_stage_that_only_a_student_s_report_uses_stays(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run")
    (root / "report.json").unlink()
    report(root / "students" / "narrow", f"../../{USED}", f"../../{OLD}")
    assert OLD not in {left.path.name for left in leftovers(root)}


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (root / "01-prune-222222222222").symlink_to(tmp_path / "elsewhere")
    remove(root)
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("content", [None, "{}", "[1", '{"stages": [{}]}'])
def test_without_a_report_that_tells_what_is_used_nothing_is_removed(tmp_path: Path, content: str | None) -> None:
    root = run_folder(tmp_path / "run")
    (root / "report.json").unlink() if content is None else (root / "report.json").write_text(content)
    with pytest.raises(ArtifactError, match="has no report" if content is None else "cannot be read"):
        remove(root)
    assert (root / OLD).exists()


def test_nothing_is_removed_below_a_run_that_is_writing(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run")
    with exclusive(root), pytest.raises(ArtifactError, match="another run is writing here"):
        remove(root)
    assert (root / OLD).exists()


def test_a_folder_that_is_no_run_s_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no report"):
        remove(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_the_command_lists_and_removes_only_when_asked(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run")
    listed = CliRunner().invoke(app, ["clean", str(root)])
    assert listed.exit_code == 0
    assert f"{root / OLD}  (a stage that no report uses)" in listed.stdout
    assert "nothing was removed: add --remove" in listed.stdout
    assert (root / OLD).exists()
    assert "removed 0.0 MB" in CliRunner().invoke(app, ["clean", str(root), "--remove"]).stdout
    assert not (root / OLD).exists()
    assert CliRunner().invoke(app, ["clean", str(root)]).stdout == "nothing to remove\n"
