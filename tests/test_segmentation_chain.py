"""Images with masks through the whole chain: a small network, from a folder of scenes to its bundle."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from drawn import few_scenes
from onnxruntime import InferenceSession
from PIL import Image

from compress.artifact import read_meta
from compress.data.scenes import CLASSES, draw_scenes
from compress.pipeline import run_recipe
from compress.recipe.read import read_recipe
from compress.report.bundling import contents
from compress.report.page.pictures import examples
from compress.report.page.summary import TITLES
from compress.report.shape import Report
from export import audit, predict, verify
from export.bundle.read import read_bundle
from export.check.findings import check_bundle
from export.images.preprocess import IGNORED
from export.runtime.session import open_session

SIZE = 32
RECIPE = f"""
name: outlined
task: segmentation
target: cpu_avx2
teaching: {{mode: online}}
data: {{dataset: imagefolder, path: DATA, image_size: {SIZE}, eval_batch_size: 16, augment: {{crop: pad, flip: true}}}}
model: {{arch: "{Path(__file__).with_name("networks.py")}:outlines"}}
stages:
  - {{stage: source, fit: {{epochs: 6, batch_size: 8, optimizer: adamw, lr: 0.005}}}}
  - {{stage: prune, keep_macs: 0.6, round_to: 4}}
  - stage: distill
    fit: {{epochs: 2, batch_size: 8, optimizer: adamw, lr: 0.002}}
    loss: [{{name: cross_entropy}}, {{name: dice}}, {{name: kd}}, {{name: cwd, layers: [classifier]}}, {{name: pkd, layers: [mix]}}]
  - {{stage: ptq, calibration_images: 32, methods: [minmax]}}
  - {{stage: qat, fit: {{epochs: 1, batch_size: 8, lr: 0.001}}, calibration_images: 32}}
  - {{stage: export, verify_images: 16}}
  - {{stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's folder; the images are beside it in `data`."""
    folder = tmp_path_factory.mktemp("outlined")
    few = few_scenes("scenes", train=48, val=16)
    for part in ("train", "val"):
        scenes = draw_scenes(few, part, size=SIZE, seed=0)
        for kind, arrays in (("images", scenes.images), ("masks", scenes.masks)):
            (folder / "data" / kind / part).mkdir(parents=True)
            for index, array in enumerate(arrays):
                Image.fromarray(array).save(folder / "data" / kind / part / f"{index}.png")
    (folder / "data" / "classes.txt").write_text("\n".join(CLASSES))
    (folder / "recipe.yaml").write_text(RECIPE.replace("DATA", str(folder / "data")))
    recipe = read_recipe(folder / "recipe.yaml", [f"out={folder}"])
    assert run_recipe(recipe, trust_code=True, until=None, verbose=False, command="compress run recipe.yaml") == 0
    return folder / "outlined"


def stage(root: Path, name: str) -> Path:
    (line,) = [line for line in report_of(root)["stages"] if line["stage"] == name]
    return root / str(line["directory"])


def report_of(root: Path) -> Any:
    return json.loads((root / "report.json").read_text())


def test_every_convolution_of_the_pruned_network_runs_in_integers(root: Path) -> None:
    before, after = (read_meta(stage(root, name)).metrics["macs_m"] for name in ("source", "prune"))
    assert before is not None
    assert after is not None
    assert after <= 0.6 * before
    found = json.loads((stage(root, "export") / "audit.json").read_text())["student_int8"]
    assert len(found["integer_layers"]) == 8
    assert found["float_layers"] == []


def test_onnx_runtime_scores_as_torch_does_within_a_twentieth_of_a_point(root: Path) -> None:
    deployed = {row["name"]: row["score"] for row in report_of(root)["deployed"]}
    assert report_of(root)["metric"] == {"name": "miou", "title": "mIoU"}
    for file, made_by, name in (
        ("teacher_fp32", "source", "score"),
        ("student_fp32", "distill", "score"),
        ("student_int8", "qat", "score_cpu_avx2"),
    ):
        in_torch = read_meta(stage(root, made_by)).metrics[name]
        assert deployed[file] == pytest.approx(in_torch, abs=0.0005)


def test_a_file_takes_any_number_of_images_and_its_byte_form_gives_their_masks(root: Path) -> None:
    folder = stage(root, "export")
    golden = np.load(folder / "golden.npz")
    bundle = read_bundle(root / "bundle")
    floats, in_bytes = (open_session(folder / f"student_int8{end}.onnx") for end in ("", "_uint8"))
    for images in (1, 5):
        pixels = golden["images"][:images]
        (logits,) = floats.run(None, {"input": bundle.preprocess.normalize(pixels)})
        (masks,) = in_bytes.run(None, {"pixels": pixels})
        assert masks.dtype == np.uint8
        assert masks.shape == (images, SIZE, SIZE)
        assert np.array_equal(masks, logits.argmax(1))


def test_a_bundle_keeps_its_golden_masks(root: Path) -> None:
    golden = read_bundle(root / "bundle").golden
    assert check_bundle(root / "bundle")[1] == []
    assert golden.truths.shape == (len(golden.images), SIZE, SIZE)
    assert set(np.unique(golden.truths)) <= {*range(len(CLASSES)), IGNORED}
    assert golden.outputs["student_int8"].shape[1:] == (len(CLASSES), SIZE, SIZE)


def test_predict_names_the_areas_of_classes_and_draws_them(
    root: Path, tmp_path: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    image = root.parent / "data" / "images" / "val" / "0.png"
    assert called(predict.main, root / "bundle", image, "--top", 11, "--draw", tmp_path) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["label", "area"]
    assert sum(float(row[1]) for row in rows[2:] if len(row) == 2) == pytest.approx(1, abs=0.01)
    given, drawn = (np.asarray(Image.open(path).convert("RGB"), float) for path in (image, tmp_path / "0.png"))
    height = len(given)
    assert len(drawn) > height  # the legend is below
    assert (abs(drawn[:height] - given).max(axis=2) > 0).mean() > 0.9


def test_reading_and_arg_max_are_timed_with_the_network(root: Path) -> None:
    report = report_of(root)
    assert set(report["end_to_end"]) == {"teacher_fp32", "student_ptq_int8", "student_int8"}
    assert all(min(parts.values()) > 0 for parts in report["end_to_end"].values())
    page = (root / "report" / "index.html").read_text()
    assert page.count("data:image/jpeg") >= 4


@pytest.mark.parametrize("served", ["student_int8", "student_ptq_int8", "student_fp32"])
def test_examples_and_the_file_that_gives_masks_are_the_served_file_s(root: Path, served: str) -> None:
    report, exported = {**report_of(root), "recommendation": {"file": served, "sentence": ""}}, stage(root, "export")
    recipe = read_recipe(root / "recipe.yaml", ())
    made = contents(recipe, "outlined", root, exported, cast(Report, report))
    model = onnx.load_from_string(made.documents["serving/triton-answers/outlined/1/model.onnx"])
    inside = {tensor.name for tensor in onnx.load(exported / f"{served}.onnx").graph.initializer}
    assert inside <= {tensor.name for tensor in model.graph.initializer}
    pixels = np.load(exported / "golden.npz")["images"]
    (masks,) = InferenceSession(model.SerializeToString()).run(None, {"pixels": pixels})
    images = read_bundle(root / "bundle").preprocess.normalize(pixels)
    (logits,) = open_session(exported / f"{served}.onnx").run(None, {"input": images})
    assert np.array_equal(masks, logits.argmax(1))
    drawn = [title for pictures in examples(root, cast(Report, report)) for title, _ in pictures]
    judged = "student_ptq_int8" if served == "student_ptq_int8" else "student_int8"  # which targets are about
    assert drawn == ["Image", "Truth", TITLES["teacher_fp32"], TITLES[judged]] * 4


def test_verify_and_audit_take_a_bundle_of_masks(
    root: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = root / "bundle"
    assert called(verify.main, bundle, "--data", root.parent / "data", "--images", 16) == 0
    assert "mIoU" in capsys.readouterr().out
    assert called(audit.main, bundle / "student_int8.onnx") == 0
