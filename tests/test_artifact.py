"""What makes a stage's directory trustworthy."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from io import BufferedReader
from pathlib import Path

import pytest

from compress.artifact import Meta, damage, exclusive, finish, is_complete, lineage, read_meta, turn
from compress.errors import ArtifactError
from export.command.digest_memory import digests_of
from export.command.files import key_of, write_json


def made(root: Path, name: str, parent: str | None = None, *, weights: bytes = b"12345", seconds: float = 0.5) -> Path:
    work = root / f".{name}.partial"
    work.mkdir(parents=True)
    (work / "weights").write_bytes(weights)
    (work / "log.jsonl").write_text(f"{seconds}")
    parent_digest = None if parent is None else read_meta(root / parent).digest
    finish(work, root / name, Meta("prune", "k", parent, parent_digest, "float", {}, 1, seconds, {"score": 0.5}, {}))
    return root / name


def test_a_finished_directory_is_complete_and_reads_back(tmp_path: Path) -> None:
    path = made(tmp_path, "01-prune-k")
    assert is_complete(path)
    assert read_meta(path).files["weights"] == hashlib.sha256(b"12345").hexdigest()
    assert read_meta(path).metrics == {"score": 0.5}


def test_a_directory_without_meta_is_not_complete(tmp_path: Path) -> None:
    path = made(tmp_path, "01-prune-k")
    (path / "meta.json").unlink()
    assert not is_complete(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"123", "weights: was changed"),
        (b"12354", "weights: was changed"),
        (None, r"weights: cannot be read \(No such"),
    ],
)
def test_a_file_that_is_not_as_it_was_made_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = made(tmp_path, "01-prune-k")
    assert damage(path) is None
    (path / "weights").unlink() if content is None else (path / "weights").write_bytes(content)
    assert re.search(said, damage(path) or "")
    assert not is_complete(path)


def test_a_number_that_is_not_as_it_was_measured_is_noticed(tmp_path: Path) -> None:
    path = made(tmp_path, "01-prune-k")
    meta = json.loads((path / "meta.json").read_text())
    write_json(path / "meta.json", meta | {"metrics": {"score": 0.9}})
    assert "meta.json: was changed after its stage wrote it" in (damage(path) or "")


def test_what_another_version_made_is_said_so(tmp_path: Path) -> None:
    path = made(tmp_path, "01-prune-k")
    meta = json.loads((path / "meta.json").read_text())
    write_json(path / "meta.json", meta | {"schema_version": 1})
    assert "made by another version of compress" in (damage(path) or "")


def test_a_child_of_another_parent_is_noticed_and_one_of_an_equal_parent_stands(tmp_path: Path) -> None:
    made(tmp_path, "00-source-a")
    child = made(tmp_path, "01-prune-b", "00-source-a")
    made(tmp_path, "00-source-a", seconds=2.5)  # made again to the same bits, only slower
    assert damage(child) is None
    made(tmp_path, "00-source-a", weights=b"54321")
    assert "was made from another 00-source-a" in (damage(child) or "")


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_ns = 10**18
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"12345")
        os.utime(tmp_path / name, ns=(old_ns, old_ns))
    monkeypatch.setattr(
        "export.command.digest_memory.TICK_NS", -(10**12)
    )  # or else what is seconds old is not remembered
    read: list[str] = []
    real = hashlib.file_digest

    def counted(file: BufferedReader, name: str) -> object:
        read.append(Path(file.name).name)
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    first = digests_of(tmp_path, "ab", memory=tmp_path / ".digests.json")
    assert digests_of(tmp_path, "ab", memory=tmp_path / ".digests.json") == first
    assert read == ["a", "b"]
    (tmp_path / "b").write_bytes(b"54321")
    os.utime(tmp_path / "b", ns=(old_ns, old_ns))  # its size, its time and its inode are as before
    assert digests_of(tmp_path, "ab", memory=tmp_path / ".digests.json")["b"] != first["b"]
    assert read == ["a", "b", "b"]


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    """Within a tick of the clock a second write leaves size, times and inode as they were."""
    (tmp_path / "a").write_bytes(b"12345")
    digests_of(tmp_path, "a", memory=tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


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


def test_one_run_at_a_time_makes_an_artifact_and_a_killed_one_holds_nothing_up(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from compress.artifact import turn\n"
        "with turn(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "a")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with turn(tmp_path / "b"):  # another artifact is free
            pass
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            other.kill()

        threading.Timer(0.1, kill).start()
        with turn(tmp_path / "a"):
            assert killed.is_set()
    finally:
        other.kill()
        other.communicate()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot be written .*OUT="), exclusive(tmp_path / "file" / "run"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="cannot be written"), exclusive(tmp_path / "run"):
        pass
