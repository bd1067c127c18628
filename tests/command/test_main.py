"""How commands end: whatever a terminal, a pipe or a fault does, nothing is lost and the exit code tells."""

import ast
import errno
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from onnx_files import small_files, write_small_bundle
from reports import build_report, build_student, compared, printed, shown

from compress.report.page.screen import UNBOUNDED, screen
from export.command.main import PLAIN, end
from export.errors import BundleError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main")
    write_small_bundle(folder / "bundle", small_files(folder))
    return folder / "bundle"


def fails(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (lambda: 1, 1, ""),
        (fails(BundleError("a.onnx: is damaged: export it again")), 2, "a.onnx: is damaged: export it again\n"),
        (
            fails(FileNotFoundError(errno.ENOENT, "", "no/x.json")),
            2,
            "no/x.json: no such file or directory; check the path\n",
        ),
        (fails(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_a_command_ends_with_one_sentence_and_a_code(
    capsys: pytest.CaptureFixture[str], command: Callable[[], int], code: int, said: str
) -> None:
    assert (end(command), capsys.readouterr().err) == (code, said)


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), OSError("without a number"), OSError(errno.EIO, "disk")])
def test_a_crash_keeps_its_traceback_and_is_no_missed_target(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert end(fails(error)) == 70
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.endswith("this is a fault of the program, not your mistake\n")


def test_a_crash_of_the_pipeline_is_70_too(tmp_path: Path) -> None:
    crash = "import compress.cli as cli; cli.read_recipe = lambda *_, **__: 1 / 0; cli.main()"
    done = subprocess.run([sys.executable, "-c", crash, "check", "x.yaml"], capture_output=True, text=True, check=False)
    assert (done.returncode, "ZeroDivisionError" in done.stderr) == (70, True)


def test_the_exit_code_of_a_crash_is_documented() -> None:
    for page in ("README.md", "Makefile", "docs/gate.md", "docs/bundle.md"):
        assert re.search(r"\b70\b[^.]*crash", (ROOT / page).read_text()), page


@pytest.mark.parametrize(
    "words", [["compress.cli", "schema"], ["export.audit", "{bundle}"], ["export.check", "{bundle}"]]
)
def test_a_reader_that_leaves_is_no_error(bundle: Path, words: list[str]) -> None:
    command = [sys.executable, "-m", *(word.format(bundle=bundle) for word in words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


@pytest.mark.parametrize(("encoding", "arrow"), [("ascii", b"->"), ("latin-1", b"->"), ("utf-8", "→".encode())])
def test_an_encoding_without_our_signs_gets_others(recipe_path: Path, encoding: str, arrow: bytes) -> None:
    words = [sys.executable, "-m", "compress.cli", "check", str(recipe_path)]
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True)
    assert b" ".join([b"source", arrow, b"prune", arrow, b"ptq", arrow, b"qat"]) in done.stdout


def test_a_label_that_an_encoding_lacks_is_spelt_out() -> None:
    words = [sys.executable, "-c", "from export.command.main import end; end(lambda: print('Käse 茶') or 0)"]
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert done.stdout == b"K\\xe4se \\u8336\n"


def strings(path: Path) -> Iterator[str]:
    """Yield every text in a module that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield node.value


def test_every_sign_that_we_print_has_a_plain_form() -> None:
    files = [path for folder in ("compress", "export") for path in (ROOT / folder).rglob("*.py")]
    signs = {sign for path in files for text in strings(path) for sign in text if not sign.isascii()}
    assert signs - PLAIN.keys() == set()


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_cuts_nothing_off(tmp_path: Path, width: int) -> None:
    whole, narrow = (
        "".join(shown(build_report(tmp_path / str(size)), size, verbose=True).split()) for size in (400, width)
    )
    assert "…" not in narrow
    assert not Counter(whole) - Counter(narrow)  # rows' names come again where columns come below


def test_a_narrow_terminal_cuts_nothing_off_a_comparison(tmp_path: Path) -> None:
    comparison = compared(build_student(tmp_path, "large", score=0.98056), build_student(tmp_path, "small", scale=0.5))
    whole, narrow = ("".join(printed(comparison, width).split()) for width in (400, 40))
    assert not Counter(whole) - Counter(narrow)  # rows' names come again where columns come below


def test_a_pipe_folds_nothing_and_columns_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert screen().width == UNBOUNDED
    monkeypatch.setenv("COLUMNS", "100")
    assert screen().width == 100
