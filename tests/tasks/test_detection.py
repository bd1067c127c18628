"""The detector's rows, boxes and score against torchvision and pycocotools."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from compress.distillation.logits import kd_loss
from compress.distillation.step import check_task
from compress.errors import CompressError, ModelError
from compress.models.architectures import build
from compress.models.detectors import Detector
from compress.recipe.losses import BoxesTerm, CrossEntropyTerm
from compress.tasks.classification import CLASSIFICATION
from compress.tasks.detection import DETECTION as TASK
from compress.tasks.detection import detection_loss
from export.errors import BundleError
from export.images.drawing import colours
from export.tasks.average_precision import average_precision, curves, mean_average_precision, statistics
from export.tasks.boxes import LIMITS, NONE, decode, heads
from export.tasks.detection import DETECTION, truths, truths_json
from export.tasks.task import Array

CLASSES, SIZE, WIDTH = 3, 96, 160
PIXELS = 1000.0  # of the side of an image in COCO's files here


@pytest.fixture(scope="module", params=["ssd", "retinanet", "fcos"])
def network(request: pytest.FixtureRequest) -> tuple[Any, Detector, Tensor]:
    """Torchvision's network, the same weights as a plain network, and images."""
    kept: list[nn.Module] = []
    init = Detector.__init__

    def keep(self: Detector, network: nn.Module, kind: int) -> None:
        kept.append(network)
        init(self, network, kind)

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detector, "__init__", keep)
        mine = build(f"{request.param}:resnet18", num_classes=CLASSES)
    their: Any = kept[0].eval()
    for name, parameter in their.head.named_parameters():
        if name.endswith("cls_logits.weight"):
            nn.init.normal_(parameter, std=0.02)
        if name.endswith("cls_logits.bias"):
            parameter.data[
                :: CLASSES + 1
            ] = -50.0  # torchvision takes column 0 for a class, too, where each stands alone
    their.score_thresh, their.nms_thresh, their.detections_per_img = (
        LIMITS.least_score,
        LIMITS.most_overlap,
        LIMITS.detections,
    )
    assert isinstance(mine, Detector)
    return their, mine, torch.rand(2, 3, SIZE, WIDTH)


def parts(their: Any, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
    features = list(their.backbone(images).values())
    sizes = [(SIZE, WIDTH)] * len(images)
    found = their.head(features)
    anchors = their.anchor_generator(ImageList(images, sizes), features)
    levels = [
        level.shape[2]
        * level.shape[3]
        * (found["cls_logits"].shape[1] // sum(f.shape[2] * f.shape[3] for f in features))
        for level in features
    ]
    return found, anchors, levels


def test_decoded_boxes_are_torchvisions(network: tuple[Any, Detector, Tensor]) -> None:
    their, mine, images = network
    with torch.no_grad():
        found, anchors, levels = parts(their, images)
        if hasattr(their, "neg_to_pos_ratio"):  # SSD
            expected = their.postprocess_detections(found, anchors, [(SIZE, WIDTH)] * 2)
        else:
            by_level = {key: list(value.split(levels, dim=1)) for key, value in found.items()}
            split = [list(one.split(levels)) for one in anchors]
            expected = their.postprocess_detections(by_level, split, [(SIZE, WIDTH)] * 2)
        outputs = mine(images).numpy()
    answers = decode(outputs)
    if not hasattr(their, "neg_to_pos_ratio"):
        assert np.diff(heads(outputs).levels).tolist() == levels
    for answer, wanted in zip(answers, expected, strict=True):
        boxes = answer[answer[:, 0] != NONE]
        assert len(boxes) == len(wanted["scores"]) > 5
        assert np.allclose(boxes[:, 1], wanted["scores"].numpy(), atol=1e-6)
        its = np.column_stack(
            [wanted["labels"].numpy() - 1, wanted["scores"].numpy(), wanted["boxes"].numpy() / ((WIDTH, SIZE) * 2)]
        )
        apart = np.abs(boxes[:, None] - its).max(axis=2)  # nearly equal scores may stand in another order
        assert (apart.min(axis=1) < 1e-5).all()


def test_the_loss_is_torchvisions(network: tuple[Any, Detector, Tensor]) -> None:
    their, mine, images = network
    boxes = [[[10.3, 12.3, 60.7, 70.1], [50.3, 40.9, 90.1, 80.3]], [[30.1, 20.7, 90.3, 90.1]]]
    labels = [[1, 3], [2]]
    targets = [{"boxes": torch.tensor(b), "labels": torch.tensor(c)} for b, c in zip(boxes, labels, strict=True)]
    truth = torch.tensor([[[0, *boxes[0][0], 0], [2, *boxes[0][1], 0]], [[1, *boxes[1][0], 0], [NONE, 0, 0, 0, 0, 0]]])
    truth = truth.float() / torch.tensor([1, WIDTH, SIZE, WIDTH, SIZE, 1])
    with torch.no_grad():
        found, anchors, levels = parts(their, images)
        if hasattr(their, "neg_to_pos_ratio"):
            from torchvision.ops import box_iou

            matched = [their.proposal_matcher(box_iou(t["boxes"], a)) for t, a in zip(targets, anchors, strict=True)]
            expected = their.compute_loss(targets, found, anchors, matched)
        else:
            centred = ["bbox_ctrness"] if "bbox_ctrness" in found else []
            expected = their.compute_loss(targets, found, anchors, *([levels] if centred else []))
        loss = detection_loss(mine(images), truth, label_smoothing=0.0)
    assert float(loss) == pytest.approx(float(sum(expected.values())), rel=1e-4)


def test_a_network_that_knows_nothing_has_a_loss_which_limits_an_image_that_judges(
    network: tuple[Any, Detector, Tensor],
) -> None:
    """Outputs of zeros alone have no anchors, and so no finite loss: no image judged, and no training was better than its start."""
    _, mine, images = network
    truth = torch.tensor([[[1, 0.1, 0.1, 0.7, 0.8, 0]], [[2, 0.3, 0.2, 0.9, 0.9, 0]]])
    with torch.no_grad():
        loss = detection_loss(TASK.blank(mine(images)), truth, label_smoothing=0.0)
    assert 0.1 < loss < 1e4


def test_a_batch_without_an_object_has_a_loss(network: tuple[Any, Detector, Tensor]) -> None:
    _, mine, images = network
    empty = torch.full((2, 1, 6), 0.0)
    empty[..., 0] = NONE
    outputs = mine(images)
    loss = detection_loss(outputs, empty, label_smoothing=0.0)
    loss.backward()
    assert loss.isfinite()
    rows = TASK.rows(outputs, empty)
    assert len(rows) == len(TASK.truth_rows(outputs, empty)) > 0
    assert not TASK.truth_rows(outputs, empty).any()


def test_rows_are_logits_of_the_anchors_near_objects(network: tuple[Any, Detector, Tensor]) -> None:
    _, mine, images = network
    outputs = mine(images).detach()
    truth = outputs.new_tensor([[[2, 0.1, 0.1, 0.7, 0.7, 0]], [[1, 0.3, 0.3, 0.9, 0.9, 0]]])
    rows, labels = TASK.rows(outputs, truth), TASK.truth_rows(outputs, truth)
    assert len(rows) == len(labels)
    assert set(labels.tolist()) == ({0, 2, 3} if rows.shape[1] == CLASSES + 1 else {0, 1})


def test_soft_targets_are_learned_by_the_heads_own_measure(network: tuple[Any, Detector, Tensor]) -> None:
    """Kullback-Leibler's divergence of classes under a softmax; binary cross-entropy, less its least, where each stands alone."""
    _, mine, images = network
    taught = mine(images).detach()
    student = taught + 0.3 * torch.randn(taught.shape, generator=torch.Generator().manual_seed(0))
    student[..., CLASSES + 5 :] = taught[..., CLASSES + 5 :]
    truth = taught.new_tensor([[[2, 0.1, 0.1, 0.7, 0.7, 0]], [[1, 0.3, 0.3, 0.9, 0.9, 0]]])
    s, t = TASK.rows(student, truth), TASK.rows(taught, truth)
    if s.shape[1] == CLASSES + 1:
        expected = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    else:
        wanted = t[:, 1].sigmoid()
        crossed, least = (F.binary_cross_entropy_with_logits(z[:, 1], wanted) for z in (s, t))
        expected = crossed - least
    assert float(kd_loss(s, t, temperature=1.0)) == pytest.approx(float(expected), rel=1e-4)


def test_places_are_compared_where_the_teacher_is_sure(network: tuple[Any, Detector, Tensor]) -> None:
    assert TASK.places is not None
    _, mine, images = network
    taught = mine(images).detach()
    taught[..., : CLASSES + 1] = -9.0
    taught[0, 5, : CLASSES + 1] = (
        torch.tensor([9.0, 9, -9, -9]) if taught[0, 0, -5] else torch.tensor([-9.0, 9, -9, -9])
    )
    student = taught.clone().requires_grad_()
    assert TASK.places(student, taught) == 0
    apart = torch.zeros_like(taught)
    apart[..., CLASSES + 1] = 3.0  # smooth L1: 3 - 1 / 2
    loss = TASK.places(student + apart, taught)
    assert float(loss.detach()) == pytest.approx(2.5, rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert student.grad.nonzero().tolist() == [[0, 5, CLASSES + 1]]
    taught[0, 5, : CLASSES + 1] = -9.0
    assert TASK.places(student + apart, taught) == 0


def test_losses_that_mean_nothing_here_are_refused() -> None:
    check_task([BoxesTerm(name="boxes"), CrossEntropyTerm(name="cross_entropy")], TASK)
    with pytest.raises(CompressError, match="loss boxes: classification predicts no boxes"):
        check_task([BoxesTerm(name="boxes")], CLASSIFICATION)
    with pytest.raises(CompressError, match=r"label_smoothing: the loss of detection allows none, got 0\.1"):
        check_task([CrossEntropyTerm(name="cross_entropy", label_smoothing=0.1)], TASK)


def test_answers_and_truths_are_drawn_in_the_colours_of_their_classes() -> None:
    assert DETECTION.draw is not None
    assert DETECTION.draw_truth is not None
    image, labels = np.zeros((64, 64, 3), np.uint8), ["a", "b", "c"]
    answer = np.array([[1, 0.9, 0.25, 0.5, 0.75, 1.0], [0, 0.1, 0, 0, 1, 1], [NONE, 0, 0, 0, 0, 0]])
    truth = np.array([[1, 0.25, 0.5, 0.75, 1.0, 0], [NONE, 0, 0, 0, 0, 0]])
    for drawn in (DETECTION.draw(image, answer, labels), DETECTION.draw_truth(image, truth, labels)):
        assert drawn[40, 16].tolist() == drawn[40, 48].tolist() == colours(np.array(2)).tolist()
        assert not drawn[40, 20:46].any()
        assert not drawn[:18].any()  # what is not sure is not drawn


def test_a_backbone_that_is_none_is_refused() -> None:
    with pytest.raises(ModelError, match="ssd:resnet19: there is no backbone of this name; did you mean resnet18"):
        build("ssd:resnet19", num_classes=2)


# The score.


def scattered(seed: int, *, images: int = 25, most: int = 12, classes: int = CLASSES) -> tuple[Array, Array]:
    """Return detections around truths, some of another class, some of crowds, with many equal scores."""
    random = np.random.default_rng(seed)
    true, answers = np.zeros((images, most, 6)), np.zeros((images, LIMITS.detections, 6))
    true[..., 0] = answers[..., 0] = NONE
    for image in range(images):
        number = random.integers(0, most + 1)
        corner = random.random((number, 2)) * 0.8
        boxes = np.concatenate([corner, np.minimum(corner + 0.05 + random.random((number, 2)) * 0.3, 1)], axis=1)
        true[image, :number] = np.column_stack(
            [random.integers(0, classes, number), boxes, random.random(number) < 0.15]
        )
        near = np.concatenate([np.clip(boxes + random.normal(0, 0.03, boxes.shape), 0, 1) for _ in range(3)])
        label = np.where(
            random.random(len(near)) < 0.8, np.tile(true[image, :number, 0], 3), random.integers(0, classes, len(near))
        )
        found = np.column_stack([label, np.round(random.random(len(near)), 2), near])
        found = found[(found[:, 4] > found[:, 2]) & (found[:, 5] > found[:, 3])]
        found = found[np.argsort(-found[:, 1], kind="stable")]
        answers[image, : len(found)] = found
    return answers, true


def by_pycocotools(answers: Array, true: Array) -> tuple[Array, Array]:
    """Return mAP, mAP50 and mAP75, and the average precision of each class."""
    from pycocotools import coco, cocoeval

    judge = judged(coco.COCO(), cocoeval.COCOeval, answers, true)
    precision = judge.eval["precision"][..., 0, 2]  # (overlaps, recalls, classes) of all areas, 100 detections
    return np.array(judge.stats[:3]), precision.mean(axis=(0, 1))


def judged(truth: Any, evaluation: Any, answers: Array, true: Array) -> Any:
    """Return COCO's evaluation once it ran."""
    drawn, found = list[dict[str, Any]](), list[dict[str, Any]]()
    for image, (boxes, detections) in enumerate(zip(true, answers, strict=True)):
        for label, *corners, crowd in boxes[boxes[:, 0] != NONE]:
            left, top, right, bottom = np.array(corners) * PIXELS
            entry = {"id": len(drawn) + 1, "image_id": image, "category_id": int(label), "iscrowd": int(crowd)}
            drawn.append(
                entry | {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            )
        for label, score, *corners in detections[detections[:, 0] != NONE]:
            left, top, right, bottom = np.array(corners) * PIXELS
            found.append(
                {
                    "image_id": image,
                    "category_id": int(label),
                    "score": score,
                    "bbox": [left, top, right - left, bottom - top],
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = {
            "images": [{"id": image} for image in range(len(true))],
            "annotations": drawn,
            "categories": [{"id": label} for label in range(CLASSES)],
        }
        truth.createIndex()
        judge = evaluation(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_pycocotools(seed: int) -> None:
    answers, true = scattered(seed)
    rows = statistics(answers, true)
    expected, classes = by_pycocotools(answers, true)
    found = DETECTION.further(rows)
    assert [DETECTION.total(rows), found["mAP50"], found["mAP75"]] == pytest.approx(expected, abs=1e-9)
    mine = DETECTION.by_class({"a": rows}, ["a", "b", "c"], ())
    assert mine is not None
    assert mine["files"]["a"]["scores"] == pytest.approx(classes.tolist(), abs=1e-9)


def test_the_score_is_faster_coco_evals() -> None:
    from faster_coco_eval import COCO, COCOeval_faster

    answers, true = scattered(7)
    judge = judged(COCO(), COCOeval_faster, answers, true)
    assert DETECTION.total(statistics(answers, true)) == pytest.approx(judge.stats[0], abs=1e-9)


def test_the_score_by_hand() -> None:
    """Two truths; the first detection is right, the second wrong, the third finds the other truth at 0.6 only: precision 1, then 2 / 3."""
    true = np.array([[[0, 0, 0, 0.5, 0.5, 0], [0, 0.5, 0.5, 1, 1, 0]]])
    answers = np.zeros((1, LIMITS.detections, 6))
    answers[..., 0] = NONE
    answers[0, :3] = [[0, 0.9, 0, 0, 0.5, 0.5], [0, 0.8, 0, 0.6, 0.3, 0.9], [0, 0.7, 0.5, 0.5, 1, 0.8]]
    found = average_precision(statistics(answers, true))[0]
    assert found[0] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found[3] == pytest.approx(51 / 101)


def test_images_that_count_twice_are_images_that_are_there_twice() -> None:
    answers, true = scattered(5)
    answers[..., 1] += np.random.default_rng(1).random(answers.shape[:2]) * 0.009  # no two scores are equal
    rows = statistics(answers, true)
    times = np.random.default_rng(0).integers(0, 3, len(rows))
    weighted = np.mean([curve.precision(times.astype(float)) for curve in curves(rows)])
    assert weighted == pytest.approx(mean_average_precision(np.repeat(rows, times, axis=0)))


def test_a_set_without_objects_scores_nothing_and_says_so() -> None:
    answers, true = scattered(0)
    true[..., 0] = NONE
    rows = statistics(answers, true)
    assert DETECTION.total(rows) == 0.0
    assert DETECTION.truth_text(rows[0], ["a", "b", "c"]) == "nothing"
    assert DETECTION.compare(rows, rows, ["a", "b", "c"]).p_value == 1.0


def test_files_agree_where_place_class_and_score_do() -> None:
    answers, _ = scattered(2)
    assert np.array_equal(DETECTION.agreement(answers, answers), np.ones(len(answers)))
    one = np.zeros((1, LIMITS.detections, 6))
    one[..., 0] = NONE
    one[0, 0] = [1, 0.8, 0.1, 0.1, 0.5, 0.5]
    for column, value, same in ((1, 0.815, 1.0), (1, 0.83, 0.0), (0, 2, 0.0), (2, 0.105, 1.0), (2, 0.16, 0.0)):
        other = one.copy()
        other[0, 0, column] = value
        assert DETECTION.agreement(one, other)[0] == same


def test_a_file_that_misses_a_class_is_surely_worse_and_named() -> None:
    answers, true = scattered(3, images=40)
    worse = answers.copy()
    worse[worse[..., 0] == 1, 0] = NONE
    found = DETECTION.compare(statistics(answers, true), statistics(worse, true), ["a", "b", "c"])
    assert found.p_value < 0.01
    assert len(found.lost) == 1
    assert found.lost[0].startswith("b (AP ")
    equal = DETECTION.compare(statistics(answers, true), statistics(answers, true), ["a", "b", "c"])
    assert (equal.p_value, equal.changed, equal.lost) == (1.0, 0.0, ())


def test_golden_truths_survive_json_and_others_are_refused() -> None:
    _, true = scattered(4)
    output = (10, CLASSES + 10)
    again = truths(list(truths_json(true.astype(np.float32))), output)
    assert np.array_equal(again[again[..., 0] != NONE], true.astype(np.float32)[true[..., 0] != NONE])
    for bad in ([[3, 0, 0, 1, 1, 0]], [[0, 0, 0, 1, 1.5, 0]], [[0, 0, 0, 1]], 5, [["0", 0, 0, 1, 1, 0]]):
        with pytest.raises(BundleError, match=r"golden.truths: must be lists of boxes"):
            truths([bad], output)


def test_a_distribution_is_no_distance_from_itself(network: tuple[Any, Detector, Tensor]) -> None:
    _, mine, images = network
    with torch.no_grad():
        outputs = mine(images).numpy()
    other = outputs.copy()
    other[..., 1] += 1
    kept = DETECTION.evidence(outputs)
    assert np.allclose(DETECTION.divergence(kept, kept), 0, atol=1e-9)
    assert (DETECTION.divergence(DETECTION.evidence(other), kept) > 0).all()
