"""The Dockerfile copies what is there and nothing else, ends as a user, and its steps give a command that runs without a home."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
ADMITTED = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
TEXT = (".py", ".yaml", ".toml", ".txt", ".md", ".jinja", ".j2", ".html", ".css", ".js", ".typed", "LICENSE")
UID = 10001
# An interpreter in root's home can be read, and nothing be written.
AS_USER = [
    "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
]  # fmt: skip


def steps(word: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in LINES if line.startswith(f"{word} ")]


def copied() -> list[str]:
    """The files that enter the image, as Git knows them."""
    sources = [source for step in steps("COPY") for source in step[:-1]]
    found = subprocess.run(
        ["git", "ls-files", "-z", "--", *sources], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return found.stdout.split("\0")[:-1]


def test_what_is_copied_is_what_the_ignore_file_admits() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in ignored if line and not line.startswith(("#", "!"))] == ["*", "**/__pycache__", "**/.*"]
    assert {source for step in steps("COPY") for source in step[:-1]} == ADMITTED
    assert all((ROOT / source).exists() for source in ADMITTED)


def test_nothing_secret_and_no_data_is_copied() -> None:
    files = copied()
    assert len(files) > 100
    assert [file for file in files if not file.endswith(TEXT)] == []
    assert [
        file for file in files if fnmatch(Path(file).name.lower(), "*secret*") or (ROOT / file).stat().st_size > 1e6
    ] == []
    assert [
        file for file in files if re.search(rb"BEGIN [A-Z ]*PRIVATE KEY|hf_[A-Za-z0-9]{30}", (ROOT / file).read_bytes())
    ] == []


def test_both_images_end_as_a_user_without_a_home() -> None:
    targets = "\n".join(LINES).split("\nFROM base AS ")
    assert [target.split("\n")[0] for target in targets[1:]] == ["cpu", "cuda"]
    for target in targets[1:]:
        assert f"\nUSER {UID}:{UID}\n" in target
        assert target.strip().endswith('ENTRYPOINT ["compress"]')
    assert "HOME=/nonexistent" in targets[0]


@pytest.mark.acceptance
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root may become another user")
def test_the_steps_in_a_clean_folder_give_a_command_for_a_user_without_a_home(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    clean = Path("/tmp", f"compress-image-{os.getpid()}")  # pytest's own folders are closed to other users
    try:
        image, python = clean / "opt", clean / "venv/bin/python"
        for file in copied():
            (image / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, image / file)
        subprocess.run([sys.executable, "-m", "venv", str(clean / "venv")], check=True)
        own = [
            str(python),
            "-m",
            "pip",
            "uninstall",
            "-q",
            "-y",
            "setuptools",
        ]  # Python 3.11 brings one that is too old
        subprocess.run(own, check=True)
        site = Path(
            subprocess.check_output(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
            ).strip()
        )
        (site / "outside.pth").write_text(sysconfig.get_path("purelib"))  # torch and the like, not installed anew
        (step,) = [words for words in steps("RUN") if ".[shards]" in words]
        offline = ["--no-deps", "--no-build-isolation", "-q"]
        subprocess.run([str(python), "-m", *step[1:], *offline], cwd=image, check=True)
        (clean / "work").mkdir()
        os.chown(clean / "work", UID, UID)
        variables = dict(word.split("=", 1) for words in steps("ENV") for word in words)
        for command in (["recipes"], ["run", str(image / "recipes/quickstart.yaml"), *SHORT]):
            ended = subprocess.run(
                [*AS_USER, str(clean / "venv/bin/compress"), *command],
                cwd=clean / "work", env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **variables},
                capture_output=True, text=True,
            )  # fmt: skip
            assert ended.returncode == 0, ended.stderr
        assert (clean / "work/runs/quickstart/report.json").exists()
        assert str(image) not in subprocess.check_output(
            [python, "-c", "import compress; print(compress.__path__)"], text=True, cwd="/"
        )
    finally:
        shutil.rmtree(clean, ignore_errors=True)


SHORT = (
    "--until",
    "prune",
    "--set",
    "data.limit_per_class=8",
    "--set",
    "source.fit={epochs: 1, lr: 0.01}",
    "--set",
    "model.arch=cifar:resnet20",
)
