"""From a detector's outputs to boxes: the built-in functions and one's own, as torch and as a graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert
from yolo import Yolo

from compress.errors import ModelError, RecipeError
from compress.models.decodes import DECODES, Decode, Function, decoder_of, function_of
from compress.quant.graph.rewrite import traced
from compress.quant.prepare import heads
from compress.recipe.read import read_recipe
from export.images.size import Size
from export.onnx_file.outputs import Output
from export.tasks.boxes import NONE, Limits
from export.tasks.detection import DETECTION

SIZE = (64, 96)


def of(function: Function, shape: tuple[int, ...], classes: int = 3, size: Size = SIZE) -> Decode:
    return Decode(function, [Output("rows", shape)], size, classes)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("objectness", [0, 1])
def test_dense_rows_lie_either_way_round(turned: bool, objectness: int) -> None:
    torch.manual_seed(0)
    boxes, scores = torch.rand(2, 30, 4) * 50, torch.rand(2, 30, 3 + objectness)
    rows = torch.cat([boxes, scores], 2)
    rows = rows.transpose(1, 2) if turned else rows
    found = decoder_of(of(DECODES["dense"], tuple(rows.shape[1:])), Limits(), rows).run(rows.numpy())
    expected = box_convert(boxes, "cxcywh", "xyxy") / torch.tensor([96, 64, 96, 64])
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_allclose(found[1], scores[..., -3:] * (scores[..., :1] if objectness else 1), atol=1e-6)


def test_yolox_is_decoded_as_its_package_does() -> None:
    pytest.importorskip("yolox")
    from compress.models.architectures import build

    torch.manual_seed(0)
    network = build("yolox:nano", num_classes=3)
    images = 255 * torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        rows = network(images)
        vars(network.get_submodule("head"))["decode_in_inference"] = True
        wanted = network(images)
    boxes, scores = decoder_of(of(DECODES["yolox"], tuple(rows.shape[1:])), Limits(), rows).run(rows.numpy())
    expected = box_convert(wanted[..., :4], "cxcywh", "xyxy") / torch.tensor([96, 64, 96, 64])
    np.testing.assert_allclose(boxes, expected, atol=1e-5)
    np.testing.assert_allclose(scores, wanted[..., 4:5] * wanted[..., 5:], atol=1e-6)


def labelled(outputs: Tensor, _size: Size, _classes: int) -> tuple[Tensor, Tensor, Tensor]:
    return outputs[..., :4], outputs[..., 4], outputs[..., 5].round()


def test_scores_with_labels_are_scores_of_classes() -> None:
    rows = torch.tensor([[[0.1, 0.1, 0.4, 0.4, 0.9, 2], [0.1, 0.1, 0.4, 0.42, 0.8, 2], [0.5, 0.5, 0.9, 0.9, 0.3, 0]]])
    decoder = decoder_of(of(labelled, (3, 6)), Limits(detections=7, least_score=0.2, most_overlap=0.5), rows)
    found = decoder.decode(rows.numpy())[0]
    assert found.shape == (7, 6)
    assert found[:2, 0].tolist() == [2, 0]
    assert (found[2:, 0] == NONE).all()
    truths = np.array([[[2, 0.1, 0.1, 0.4, 0.4, 0], [0, 0.5, 0.5, 0.9, 0.9, 0]]])
    rows_of = DETECTION.statistics(found[None], truths, ())
    assert DETECTION.total(rows_of) == pytest.approx(1.0)
    assert DETECTION.truth_text(rows_of[0], ["a", "b", "c"]) == "a 1, c 1"


def test_logits_in_place_of_scores_are_refused() -> None:
    with pytest.raises(ModelError, match=r"scores from 0 to 1, got -1 to -1: apply a sigmoid"):
        decoder_of(of(DECODES["dense"], (5, 7)), Limits(), torch.full((1, 5, 7), -1.0))


def test_other_rows_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"dense: reads \(n, rows, 7 or 8\)"):
        of(DECODES["dense"], (5, 9))(torch.zeros(1, 5, 9))


def test_a_file_of_ones_own_runs_only_if_it_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def decode(outputs, size, classes):\n    return outputs[0], outputs[1]\n")
    with pytest.raises(ModelError, match="add --trust-code"):
        function_of(f"{tmp_path}/mine.py:decode", trust_code=False)
    assert callable(function_of(f"{tmp_path}/mine.py:decode", trust_code=True))
    with pytest.raises(ModelError, match="defines no function other"):
        function_of(f"{tmp_path}/mine.py:other", trust_code=True)


def test_convolutions_before_sigmoids_and_distributions_are_heads() -> None:
    found = heads(traced(Yolo(2).eval(), torch.zeros(1, 3, 32, 32)))
    last = {f"{kind}.{level}.1" for kind in ("boxes", "scores") for level in (0, 1)}
    assert {name.removesuffix("_run2") for name in found} == {*last, "expectation"}


RECIPE = """
name: mine
task: detection
data: {dataset: imagefolder, path: parts}
model: {arch: "onnx:mine.onnx"}
decode: dense
stages:
  - {stage: source}
  - {stage: distill, fit: {epochs: 1}, loss: [{name: kd}]}
"""


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("task: detection", "task: segmentation", "decode: makes boxes, and segmentation has none"),
        ("{stage: source}", "{stage: source, fit: {epochs: 1}}", r"stages.0.fit: .* no loss from labels here"),
        (
            "name: kd",
            "name: cross_entropy",
            "decode: cross_entropy in distill needs a loss from labels: use kd and boxes",
        ),
        (
            RECIPE,
            RECIPE.replace("onnx:mine.onnx", "hf:a").replace("dense", "queries").replace("kd", "cross_entropy"),
            None,
        ),
        (
            RECIPE,
            RECIPE.replace('"onnx:mine.onnx"', "yolox:nano")
            .replace("dense", "yolox")
            .replace("kd", "cross_entropy")
            .replace("{stage: source}", "{stage: source, fit: {epochs: 1}}"),
            None,
        ),
        (
            RECIPE,
            RECIPE.replace("onnx:mine.onnx", "hf:a")
            .replace("dense", "queries")
            .replace("{stage: source}", "{stage: source, fit: {epochs: 1}}"),
            None,
        ),
        ("decode: dense", "decode: other", "must be dense, yolox, queries or FILE.py:function"),
        ("decode: dense", "", None),
        ('"onnx:mine.onnx"}\ndecode: dense', "yolox:nano, weights: a.pth}", "also set `decode: yolox`"),
        ('"}\ndecode: dense', '", outputs: [a, b]}', "a detector of several outputs needs `decode`"),
    ],
)
def test_what_decode_cannot_mean_is_refused(tmp_path: Path, before: str, after: str, complaint: str | None) -> None:
    assert before in RECIPE
    (tmp_path / "a.yaml").write_text(RECIPE.replace(before, after))
    if complaint is None:
        read_recipe(tmp_path / "a.yaml")
        return
    with pytest.raises(RecipeError, match=complaint):
        read_recipe(tmp_path / "a.yaml")
