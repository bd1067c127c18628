"""`export.predict` against a network whose answer is known by hand: its three logits are the mean red, green and blue."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_files import classifier, colour_reader, save, write_small_bundle
from PIL import Image

from export import predict
from export.images import decode
from export.tasks.classification import softmax

ROOT = Path(__file__).parent.parent
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # of the small bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    files = {
        "student_fp32": save(colour_reader(), folder / "colours.onnx"),
        "teacher_fp32": save(classifier(), folder / "t.onnx"),
    }
    write_small_bundle(folder / "bundle", files)
    return folder / "bundle"


def colour(path: Path, *values: int) -> Path:
    Image.new("RGB", (30, 24), values).save(path)
    return path


def shown(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    return predict.main()


def by_hand(*values: int) -> list[float]:
    """The softmax of the normalized colour."""
    powers = [math.exp((value / 255 - mean) / std) for value, mean, std in zip(values, MEAN, STD, strict=True)]
    return [power / sum(powers) for power in powers]


def test_labels_come_with_their_probabilities_the_likeliest_first(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = colour(tmp_path / "a.png", 100, 180, 60)
    cat, dog, gnu = by_hand(100, 180, 60)
    assert dog > gnu > cat
    assert shown(monkeypatch, bundle, path) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == [str(path)]
    assert rows[1] == ["label", "probability"]
    assert rows[2:] == [["dog", f"{dog:.3f}"], ["gnu", f"{gnu:.3f}"], ["cat", f"{cat:.3f}"]]


def test_probabilities_are_the_softmax_of_extreme_logits_too() -> None:
    assert softmax(np.array([1e4, 1e4, -1e4])).tolist() == [0.5, 0.5, 0.0]


def test_several_images_each_get_a_table(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    red, blue = colour(tmp_path / "red.png", 255, 0, 0), colour(tmp_path / "blue.webp", 0, 0, 255)
    assert shown(monkeypatch, bundle, red, blue, "--top", 1) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [str(red), "label", "cat", str(blue), "label", "gnu"]


@pytest.mark.parametrize("broken", ["cut.png", "words.jpg", "absent.jpg", "folder.png", "narrow.png"])
def test_a_broken_image_is_one_sentence_and_the_others_are_answered(
    bundle: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    red = colour(tmp_path / "red.png", 255, 0, 0)
    (tmp_path / "cut.png").write_bytes(red.read_bytes()[:60])
    (tmp_path / "words.jpg").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (300_000, 1)).save(tmp_path / "narrow.png")
    assert shown(monkeypatch, bundle, tmp_path / broken, red, "--top", 1) == 2
    out, err = capsys.readouterr()
    assert "cat" in out
    assert err.startswith(str(tmp_path / broken))
    assert err.count("\n") == 1


def test_programs_get_one_json_object_for_each_image(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = colour(tmp_path / "a.png", 100, 180, 60)
    assert shown(monkeypatch, bundle, path, path, "--json") == 0
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert documents[0] == documents[1]
    cat, dog, gnu = by_hand(100, 180, 60)
    assert documents[0]["image"] == str(path)
    assert [one["label"] for one in documents[0]["found"]] == ["dog", "gnu", "cat"]
    assert [one["probability"] for one in documents[0]["found"]] == pytest.approx([dog, gnu, cat], rel=1e-5)


def test_there_is_nothing_to_draw_of_a_label(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = colour(tmp_path / "a.png", 1, 2, 3)
    assert shown(monkeypatch, bundle, path, "--draw", tmp_path / "drawn") == 2
    assert "--draw: there is nothing to draw for classification" in capsys.readouterr().err


def test_another_file_is_run_by_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = colour(tmp_path / "a.png", 100, 180, 60)
    answers = []
    for name in ("student_fp32", "teacher_fp32"):
        assert shown(monkeypatch, bundle, path, "--file", name) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
    assert shown(monkeypatch, bundle, path, "--file", "../teacher_fp32") == 2
    assert "--file: the bundle has" in capsys.readouterr().err


def test_a_bundle_that_was_tampered_with_is_refused_before_its_model_is_opened(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (copy / "labels.txt").write_text("dog\ncat\ngnu\n")

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a model of a bundle that is not whole was opened")

    monkeypatch.setattr(predict, "open_session", never)
    assert shown(monkeypatch, copy, colour(tmp_path / "a.png", 1, 2, 3)) == 2
    assert "labels.txt: is not the file" in capsys.readouterr().err


def test_without_pillow_one_sentence_says_what_to_install(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "find_spec", lambda name: None)
    assert shown(monkeypatch, bundle, colour(tmp_path / "a.png", 1, 2, 3)) == 2
    assert "pip install pillow" in capsys.readouterr().err


def test_it_runs_without_torch(bundle: Path, tmp_path: Path) -> None:
    path = colour(tmp_path / "a.png", 255, 0, 0)
    program = "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; from export.predict import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "predict", str(bundle), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[3] == "cat"
