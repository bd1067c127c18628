"""Images with boxes through the whole chain: a small detector, from COCO's JSON to its bundle and the gate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from planted import seal

from compress.artifact import read_meta
from compress.pipeline import run_recipe
from compress.recipe.read import read_recipe
from export import audit, predict, verify
from export.bundle.golden import npy_header, outputs_of
from export.bundle.read import read_bundle
from export.check.findings import check_bundle
from export.gate.__main__ import main as gate_main
from export.runtime.session import open_session
from export.tasks.boxes import NONE, decode

SIZE = 48
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
RECIPE = f"""
name: squares
task: detection
target: cpu_avx2
data: {{dataset: imagefolder, path: DATA, image_size: {SIZE}, eval_batch_size: 16, augment: {{flip: true, crop: pad}}}}
model: {{arch: "{Path(__file__).with_name("networks.py")}:boxes"}}
stages:
  - {{stage: source, fit: {{epochs: 12, batch_size: 8, optimizer: adamw, lr: 0.005, warmup_epochs: 1}}}}
  - {{stage: prune, keep_macs: 0.7, round_to: 4}}
  - stage: distill
    fit: {{epochs: 3, batch_size: 8, optimizer: adamw, lr: 0.002}}
    loss: [{{name: cross_entropy}}, {{name: kd}}, {{name: boxes}}, {{name: pkd, layers: [backbone.wide]}}]
  - {{stage: ptq, calibration_images: 32, methods: [minmax]}}
  - {{stage: qat, fit: {{epochs: 1, batch_size: 8, lr: 0.0005}}, calibration_images: 32}}
  - {{stage: export, verify_images: 16, limits: {{max_float_fraction: 0.3}}}}
  - {{stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}}
"""


def write_squares(folder: Path, part: str, images: int, seed: int) -> None:
    """Write images of one or two squares whose colour is their class, in COCO's format with gaps in its ids; the first image has none."""
    random, listed, drawn = np.random.default_rng(seed), list[dict[str, Any]](), list[dict[str, Any]]()
    (folder / "images" / part).mkdir(parents=True)
    for index in range(images):
        pixels = random.integers(60, 120, (64, 64, 3)).astype(np.uint8)
        for left in [int(random.integers(0, 10)), int(random.integers(32, 40))][: min(index, 2)]:
            side, top, label = int(random.integers(18, 24)), int(random.integers(0, 40)), int(random.integers(2))
            pixels[top : top + side, left : left + side] = list(COLOURS.values())[label]
            entry = {"id": len(drawn) + 1, "image_id": index, "category_id": (7, 90)[label], "iscrowd": 0}
            drawn.append(entry | {"bbox": [left, top, side, side], "area": side * side})
        Image.fromarray(pixels).save(folder / "images" / part / f"{index}.png")
        listed.append({"id": index, "file_name": f"{index}.png", "width": 64, "height": 64})
    categories = [{"id": 7, "name": "red"}, {"id": 90, "name": "blue"}]
    (folder / "annotations").mkdir(exist_ok=True)
    document = {"images": listed, "annotations": drawn, "categories": categories}
    (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's folder; the images are beside it in `data`."""
    folder = tmp_path_factory.mktemp("squares")
    write_squares(folder / "data", "train", 64, 0)
    write_squares(folder / "data", "val", 24, 1)
    (folder / "recipe.yaml").write_text(RECIPE.replace("DATA", str(folder / "data")))
    recipe = read_recipe(folder / "recipe.yaml", [f"out={folder}"])
    assert run_recipe(recipe, trust_code=True, until=None, verbose=False, command="compress run recipe.yaml") == 0
    return folder / "squares"


def report_of(root: Path) -> Any:
    return json.loads((root / "report.json").read_text())


def stages_of(root: Path) -> dict[str, Path]:
    return {line["stage"]: root / line["directory"] for line in report_of(root)["stages"]}


def test_only_the_heads_last_convolutions_stay_in_float_and_say_why(root: Path) -> None:
    found = json.loads((stages_of(root)["export"] / "audit.json").read_text())["student_int8"]
    heads = [f"head.{kind}_head.module_list.{level}" for kind in ("classification", "regression") for level in (0, 1)]
    assert sorted(found["float_layers"]) == heads
    assert {found["reasons"][name] for name in heads} == {"its output leaves the network"}
    assert len(found["integer_layers"]) == 11
    (warning,) = [one for one in report_of(root)["warnings"] if "in float" in one]
    assert warning == "student_int8: 4 layers run in float once optimized: its output leaves the network"


def test_inputs_of_a_concat_share_one_scale(root: Path) -> None:
    graph = onnx.load(stages_of(root)["export"] / "student_int8.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    joins = [node for node in graph.node if node.op_type == "Concat" and "DequantizeLinear" in makers_of(node, makers)]
    (join,) = joins
    scales = {float(constants[makers[name].input[1]]) for name in join.input}
    assert makers_of(join, makers) == {"DequantizeLinear"}
    assert len(scales) == 1


def makers_of(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> set[str]:
    return {makers[name].op_type for name in node.input if name in makers}


def test_onnx_runtime_scores_as_torch_does_within_a_twentieth_of_a_point(root: Path) -> None:
    deployed = {row["name"]: row["score"] for row in report_of(root)["deployed"]}
    stages = stages_of(root)
    measured = {"teacher_fp32": ("source", "score"), "student_fp32": ("distill", "score")}
    measured["student_int8"] = ("qat", "score_cpu_avx2")
    assert deployed["teacher_fp32"] > 0.2
    for file, (stage, name) in measured.items():
        score = read_meta(stages[stage]).metrics[name]
        assert score is not None
        assert abs(deployed[file] - score) < 0.0005
    assert abs(deployed["student_fp16"] - deployed["student_fp32"]) < 0.01


def test_the_file_finds_what_the_trained_network_finds(root: Path) -> None:
    verified = report_of(root)["verify"]["student_int8"]
    assert verified["agreement"] >= 0.98
    assert verified["first_divergence"] is None


def test_bytes_in_boxes_out(root: Path) -> None:
    folder = stages_of(root)["export"]
    pixels = np.load(folder / "golden.npz")["images"][1:2]
    preprocess = read_bundle(root / "bundle").preprocess
    rows, in_bytes = (open_session(folder / f"student_int8{end}.onnx") for end in ("", "_uint8"))
    (expected,) = decode(rows.run(None, {"input": preprocess.normalize(pixels)})[0])
    expected = expected[expected[:, 0] != NONE]
    boxes, scores, labels = in_bytes.run(["boxes", "scores", "labels"], {"pixels": pixels})
    assert len(scores) == len(expected) > 0
    assert np.allclose(scores, expected[:, 1], atol=1e-5)
    assert np.allclose(boxes[:3], expected[:3, 2:], atol=1e-4)
    assert labels[0] == expected[0, 0]


def test_a_bundle_keeps_its_golden_boxes_and_serves_several_outputs(root: Path) -> None:
    folder = root / "bundle"
    golden = read_bundle(folder).golden
    assert check_bundle(folder)[1] == []
    assert golden.truths.shape[2] == 6
    assert (golden.truths[0, :, 0] == NONE).all()  # an image without a box is an image
    assert (golden.truths[1:, 0, 0] >= 0).all()
    (config,) = folder.glob("serving/triton-answers/*/config.pbtxt")
    assert [name in config.read_text() for name in ('"boxes"', '"scores"', '"labels"')] == [True] * 3


def test_the_page_shows_examples_and_what_an_image_takes_from_file_to_answer(root: Path) -> None:
    page = (root / "report" / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 16
    assert "From file to prediction" in page
    assert "detections in common: same class, overlap of 0.9, scores within 0.02" in page
    assert "AP of each class" in page
    assert "Confusion matrix" not in page  # a detector's mistakes are no other class
    assert "top-1" not in page.lower()


def test_the_cards_lines_of_python_print_boxes(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (root / "bundle" / "README.md").read_text()
    assert "a row for each anchor" in card
    lines = card.partition("```python\n")[2].partition("```")[0].replace("decode(outputs)[0]", "decode(outputs)[1]")
    monkeypatch.chdir(root / "bundle")
    exec(lines, {})
    label, score, *places = capsys.readouterr().out.splitlines()[0].split()
    assert label in COLOURS
    assert float(score) > 0.3
    assert all(0 <= float(one) <= 1 for one in places)


def test_predict_draws_what_it_says(
    root: Path, tmp_path: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    image = root.parent / "data" / "images" / "val" / "3.png"
    bundle = root / "bundle"
    assert called(predict.main, bundle, image, "--json", "--draw", tmp_path / "drawn") == 0
    (best, *_) = json.loads(capsys.readouterr().out)["found"]
    assert set(best) == {"label", "score", "left", "top", "right", "bottom"}
    assert best["label"] in COLOURS
    drawn, plain = (np.asarray(Image.open(path)) for path in (tmp_path / "drawn" / "3.png", image))
    assert drawn.shape == plain.shape  # of the photograph, not of what the network sees
    assert (drawn != plain).any()


def test_verify_and_audit_take_a_bundle_of_boxes(
    root: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = root / "bundle"
    assert called(verify.main, bundle, "--data", root.parent / "data", "--images", 16) == 0
    assert "mAP" in capsys.readouterr().out
    assert called(audit.main, bundle / "student_int8.onnx") == 0


def test_the_gate_names_the_class_that_was_lost(
    root: Path, tmp_path: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(root / "bundle", tmp_path / "bundle"))
    words = [bundle, "--baseline", tmp_path / "baseline.json", "--data", root.parent / "data", "--no-latency"]
    assert called(gate_main, *words, "--update-baseline") == 0
    assert called(gate_main, *words) == 0
    forget(bundle, 2)
    capsys.readouterr()
    assert called(gate_main, *words) == 1
    said = capsys.readouterr().out
    assert "blue (AP" in said
    assert "mAP" in said


def forget(bundle: Path, column: int) -> None:
    """Have the served file never find the class of a column of the heads, and its golden outputs say so."""
    read = read_bundle(bundle)
    path = bundle / f"{read.served}.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if "classification_head" in tensor.name and tensor.name.endswith("bias"):
            bias = numpy_helper.to_array(tensor).copy()
            bias[column :: len(COLOURS) + 1] = -50
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    path.unlink()
    onnx.save(model, path)
    outputs = outputs_of(path, read.golden.inputs)
    golden = bundle / "golden" / f"{read.served}.npy"
    golden.write_bytes(npy_header(outputs.dtype, outputs.shape) + outputs.tobytes())
    seal(bundle)
