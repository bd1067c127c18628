"""What segmentation networks answer: scores, comparisons and truths in JSON, against hand arithmetic."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from compress.tasks.segmentation import SEGMENTATION as TASK
from export.errors import BundleError
from export.images.drawing import colours
from export.images.preprocess import IGNORED
from export.tasks.segmentation import SEGMENTATION, evidence
from export.tasks.task import Array

LABELS = ("ground", "cat", "dog")
TRUTHS = np.array([[[0, 0], [1, 1]], [[0, 1], [2, IGNORED]]], np.uint8)
ANSWERS = np.array([[[0, 1], [1, 1]], [[0, 0], [2, 2]]], np.uint8)
OUTPUT = (3, 2, 2)


def logits_of(answers: Array, classes: int = 3) -> Array:
    return np.moveaxis(np.eye(classes, dtype=np.float32)[answers], -1, 1)


def test_a_row_is_the_confusion_matrix_of_one_image_without_the_pixels_that_nobody_judges() -> None:
    rows = SEGMENTATION.statistics(ANSWERS, TRUTHS, OUTPUT)
    assert rows.tolist() == [[1, 1, 0, 0, 2, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0, 1]]


def test_the_score_is_the_mean_iou_of_the_whole_set() -> None:
    rows = SEGMENTATION.statistics(ANSWERS, TRUTHS, OUTPUT)
    # ground: 2 of 3 true and 3 answered; cat: 2 of 3 and 3; dog: 1 of 1 and 1.
    assert SEGMENTATION.total(rows) == pytest.approx((2 / 4 + 2 / 4 + 1) / 3)
    assert SEGMENTATION.further(rows) == {
        "pixel accuracy": pytest.approx(5 / 7),
        "mean class accuracy": pytest.approx((2 / 3 + 2 / 3 + 1) / 3),
    }


def test_a_class_without_a_pixel_is_in_no_mean() -> None:
    rows = SEGMENTATION.statistics(ANSWERS[:1], TRUTHS[:1], OUTPUT)
    assert SEGMENTATION.total(rows) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_classes_are_counted_in_pixels() -> None:
    rows = SEGMENTATION.statistics(ANSWERS, TRUTHS, OUTPUT)
    found = SEGMENTATION.by_class({"a": rows}, LABELS, ("a",))
    assert found is not None
    assert found["images"] == [3, 3, 1]
    counts = {"correct": [2, 2, 1], "answered": [3, 3, 1], "mistakes": [(0, 1, 1), (1, 0, 1)]}
    assert found["files"]["a"] == counts | {"scores": [pytest.approx(0.5), pytest.approx(0.5), 1.0]}


def test_masks_pass_through_json_and_what_is_no_mask_is_refused() -> None:
    words = SEGMENTATION.truths_json(TRUTHS)
    assert words == ["0x2 1x2", "0x1 1x1 2x1 255x1"]
    assert np.array_equal(SEGMENTATION.truths(words, OUTPUT), TRUTHS)
    for bad in ("0x3", "3x4", "0x5", "0x-4", "0", 7, "0x4 1x0"):
        with pytest.raises(BundleError, match=r"golden\.truths: must be runs"):
            SEGMENTATION.truths([bad], OUTPUT)


def test_two_files_agree_on_the_fraction_of_pixels_that_get_the_same_class() -> None:
    assert SEGMENTATION.agreement(ANSWERS, TRUTHS).tolist() == [0.75, 0.5]
    assert SEGMENTATION.decode(logits_of(ANSWERS)).tolist() == ANSWERS.tolist()


def test_divergence_is_zero_for_equal_outputs_and_looks_at_evenly_spaced_pixels() -> None:
    outputs = np.random.default_rng(0).normal(size=(2, 3, 16, 24)).astype(np.float32)
    kept = evidence(outputs)
    assert kept.shape == (2, 3, 2, 3)
    assert SEGMENTATION.divergence(kept, kept) == pytest.approx([0, 0])
    assert (SEGMENTATION.divergence(-kept, kept) > 0.1).all()


def set_of(images: int, *, wrong: float, seed: int = 0) -> Array:
    """Return rows of images of three classes in which so many cats are taken for ground."""
    random = np.random.default_rng(seed)
    truths = random.integers(0, 3, (images, 8, 8)).astype(np.uint8)
    answers = np.where((truths == 1) & (random.random(truths.shape) < wrong), 0, truths).astype(np.uint8)
    return SEGMENTATION.statistics(answers, truths, (3, 8, 8))


def test_equal_files_are_no_loss_and_a_lost_class_is_named() -> None:
    before, same, worse = set_of(40, wrong=0.1), set_of(40, wrong=0.1), set_of(40, wrong=0.3)
    equal = SEGMENTATION.compare(before, same, LABELS)
    assert (equal.p_value, equal.changed, equal.lost) == (1.0, 0.0, ())
    found = SEGMENTATION.compare(before, worse, LABELS)
    assert found.p_value < 0.01
    assert found.now < found.before
    assert [text.split(" ")[0] for text in found.lost] == ["cat", "ground"]
    assert SEGMENTATION.compare(worse, before, LABELS).lost == ()


def test_a_class_that_few_images_have_is_not_lost_because_resamples_miss_it() -> None:
    before, now = set_of(30, wrong=0.0), set_of(30, wrong=0.0)
    rare = np.zeros((1, 9), np.int64)
    rare[0, 8] = 4
    found = SEGMENTATION.compare(np.concatenate([before, rare]), np.concatenate([now, rare]), LABELS)
    assert found.lost == found.worse == ()


def test_the_loss_and_the_rows_leave_out_what_nobody_judges() -> None:
    outputs = torch.from_numpy(logits_of(ANSWERS)).requires_grad_()
    truths = torch.from_numpy(TRUTHS)
    loss = TASK.loss(outputs, truths, label_smoothing=0.0)
    right, wrong = -np.log(np.e / (np.e + 2)), -np.log(1 / (np.e + 2))
    assert loss.item() == pytest.approx((5 * right + 2 * wrong) / 7, rel=1e-5)
    loss.backward()
    assert outputs.grad is not None
    assert outputs.grad[1, :, 1, 1].abs().sum() == 0
    assert TASK.rows(outputs, truths).argmax(1).tolist() == [0, 1, 1, 1, 0, 0, 2]
    assert TASK.truth_rows(outputs, truths).tolist() == [0, 0, 1, 1, 0, 1, 2]


def test_an_image_that_nobody_judges_has_no_loss() -> None:
    nothing = torch.full((1, 2, 2), IGNORED, dtype=torch.uint8)
    assert float(TASK.loss(torch.zeros(1, 3, 2, 2), nothing, label_smoothing=0.0)) == 0


def test_the_finished_file_answers_with_the_mask_that_decode_gives() -> None:
    shape: list[str | int | None] = ["batch", 3, 4, 6]
    given, wanted = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "logits"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["logits"])], "g", [given], [wanted])
    model = SEGMENTATION.finish(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for images in (1, 5):
        logits = np.random.default_rng(0).integers(0, 3, (images, 3, 4, 6)).astype(np.float32)  # with many ties
        (mask,) = session.run(["mask"], {"x": logits})
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, SEGMENTATION.decode(logits))


def test_pascal_vocs_and_the_scenes_classes_have_a_colour_each() -> None:
    assert len(np.unique(colours(np.arange(21)), axis=0)) == 21
