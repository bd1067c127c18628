"""The gate on masks: a file whose answers are known by hand, and the class that a planted fault takes from it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import ModelProto, helper
from onnx_files import model_of, save, small_contents
from PIL import Image

from export.bundle.write import write_bundle
from export.gate.checks import Limits
from export.gate.commands import judge, update
from export.gate.latency import Plan
from export.gate.run import Terms

SIZE, LABELS = 16, ("red", "green", "blue")
PREPROCESS = {"image_size": SIZE, "resize_to": SIZE, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
LIMITS = Limits(max_latency_ratio=None)


def brightest(bias: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> ModelProto:
    """Return a network that gives each pixel the class of its brightest channel, but for a bias."""
    weights = {"w": np.eye(3, dtype=np.float32)[:, :, None, None], "b": np.array(bias, np.float32)}
    model = model_of(
        [helper.make_node("Conv", ["input", "w", "b"], ["logits"])], weights, shape=(3, SIZE, SIZE), classes=3
    )
    shape: list[str | int | None] = ["batch", 3, SIZE, SIZE]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", 1, shape))
    return model


def write(folder: Path, model: ModelProto, images: np.ndarray, masks: np.ndarray) -> Path:
    folder.mkdir()
    files = {"student_fp32": save(model, folder / "student_fp32.onnx")}
    small = replace(small_contents(files), task="segmentation", preprocess=PREPROCESS, labels=LABELS, metrics={})
    write_bundle(folder / "bundle", replace(small, images=images[:4], truths=masks[:4]))
    return folder / "bundle"


def test_the_class_that_was_lost_is_named_and_an_equal_file_passes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    masks = random.integers(0, 3, (60, SIZE, SIZE)).astype(np.uint8)
    images = (200 * np.eye(3)[masks] + random.integers(0, 50, (60, SIZE, SIZE, 3))).astype(np.uint8)
    images[masks == 1] = (images[masks == 1] * 0.6).astype(np.uint8)  # green is dark
    for kind, arrays in (("images", images), ("masks", masks)):
        (tmp_path / "data" / kind / "val").mkdir(parents=True)
        for index, array in enumerate(arrays):
            Image.fromarray(array).save(tmp_path / "data" / kind / "val" / f"{index}.png")
    (tmp_path / "data" / "classes.txt").write_text("\n".join(LABELS))
    good, equal = (write(tmp_path / name, brightest(), images, masks) for name in ("good", "equal"))
    planted = write(tmp_path / "planted", brightest(bias=(0.0, -0.55, 0.0)), images, masks)
    update(good, tmp_path / "baselines", Terms(tmp_path / "data", LIMITS, Plan()))
    verdicts = {
        bundle: judge(bundle, tmp_path / "baselines", Terms(tmp_path / "data", LIMITS, Plan()))
        for bundle in (equal, planted)
    }
    assert verdicts[equal].status == "pass"
    assert verdicts[planted].status == "fail"
    told = "\n".join(check.detail for check in verdicts[planted].checks)
    assert "green (IoU 100.00% to" in told
    assert "mIoU" in {check.name for check in verdicts[planted].checks}
