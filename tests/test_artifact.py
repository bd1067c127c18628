"""What makes a stage's directory trustworthy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress.artifact import Meta, exclusive, finish, is_complete, key_of, lineage, read_meta, write_json
from compress.errors import ArtifactError


def made(root: Path, name: str, parent: str | None = None) -> Path:
    work = root / f".{name}.partial"
    work.mkdir(parents=True)
    (work / "weights").write_bytes(b"12345")
    finish(work, root / name, Meta("prune", "k", parent, "float", {}, 1, 0.5, {"top1": 0.5}, {}))
    return root / name


def test_a_finished_directory_is_complete_and_reads_back(tmp_path: Path) -> None:
    path = made(tmp_path, "01-prune-k")
    assert is_complete(path)
    assert read_meta(path).files == {"weights": 5}
    assert read_meta(path).metrics == {"top1": 0.5}


def test_a_directory_without_meta_is_not_complete(tmp_path: Path) -> None:
    path = made(tmp_path, "01-prune-k")
    (path / "meta.json").unlink()
    assert not is_complete(path)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_file_makes_it_incomplete(tmp_path: Path, damage: str) -> None:
    path = made(tmp_path, "01-prune-k")
    (path / "weights").write_bytes(b"123") if damage == "truncate" else (path / "weights").unlink()
    assert not is_complete(path)


def test_a_damaged_artifact_is_replaced(tmp_path: Path) -> None:
    path = made(tmp_path, "01-prune-k")
    (path / "weights").unlink()
    made(tmp_path, "01-prune-k")
    assert is_complete(path)


def test_lineage_goes_back_to_the_source(tmp_path: Path) -> None:
    first = made(tmp_path, "00-source-a")
    second = made(tmp_path, "01-prune-b", "00-source-a")
    assert lineage(made(tmp_path, "02-distill-c", "01-prune-b")) == [first, second, tmp_path / "02-distill-c"]


def test_a_key_depends_on_content_and_not_on_order() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"old": 1})

    class Unwritable:
        pass

    with pytest.raises(TypeError):
        write_json(path, {"new": Unwritable()})
    assert json.loads(path.read_text()) == {"old": 1}


def test_two_runs_on_one_folder_are_refused(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from compress.artifact import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ArtifactError, match="another run is writing here"), exclusive(tmp_path / "run"):
            pass
    finally:
        other.kill()
        other.communicate()
    with exclusive(tmp_path / "run"):  # a killed run leaves no lock behind
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot be written .*OUT="), exclusive(tmp_path / "file" / "run"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="cannot be written"), exclusive(tmp_path / "run"):
        pass
