"""Small ONNX files made by hand, a bundle of them, and images, for tests that need no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from export.bundle.write import Contents, write_bundle
from export.serving.triton import Serving

PREPROCESS = {"image_size": 16, "resize_to": 18, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
LABELS = ("cat", "dog", "gnu")


def classifier(
    width: int = 8, *, size: int = 16, classes: int = 3, pooled: bool = True, half: bool = False, seed: int = 0
) -> ModelProto:
    """Return a convolution, a ReLU, a global pool (or none: the size is then baked in) and a linear layer."""
    rng = np.random.default_rng(seed)
    features = width if pooled else width * size * size
    dtype = np.float16 if half else np.float32
    weights = {
        "conv": rng.standard_normal((width, 3, 3, 3)).astype(dtype),
        "linear": rng.standard_normal((features, classes)).astype(dtype),
    }
    node = helper.make_node
    body = [node("Conv", ["x", "conv"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["r"])]
    pool = [node("GlobalAveragePool", ["r"], ["g"])] if pooled else [node("Identity", ["r"], ["g"])]
    head = [node("Flatten", ["g"], ["f"]), node("MatMul", ["f", "linear"], ["y"])]
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    ends = [node("Cast", ["input"], ["x"], to=kind)], [node("Cast", ["y"], ["logits"], to=TensorProto.FLOAT)]
    return model_of(
        [*ends[0], *body, *pool, *head, *ends[1]],
        weights,
        shape=(3, size, size),
        classes=classes,
    )


def colour_reader() -> ModelProto:
    """Return a network whose three logits are the mean red, green and blue."""
    node = helper.make_node
    nodes = [node("GlobalAveragePool", ["input"], ["g"]), node("Flatten", ["g"], ["logits"])]
    return model_of(nodes, {}, shape=(3, 16, 16), classes=3)


def restorer(size: int = 16, gain: float = 0.5) -> ModelProto:
    """Return a network whose output is the image times `gain`."""
    gains = {"gain": np.full((3, 1, 1), gain, np.float32)}
    return model_of([helper.make_node("Mul", ["input", "gain"], ["logits"])], gains, shape=(3, size, size))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    shape: tuple[int, int, int],
    classes: int | None = None,
) -> ModelProto:
    """Return a model from `input` (batch, *shape) to `logits` (batch, classes) or of the same shape, opset 18, IR 9."""
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *shape])
    output: list[str | int] = ["batch", classes] if classes else ["batch", *shape]
    wanted = helper.make_tensor_value_info("logits", TensorProto.FLOAT, output)
    tensors = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "net", [given], [wanted], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def save(model: ModelProto, path: Path) -> Path:
    """Write the model and return where."""
    onnx.save_model(model, path)
    return path


def small_files(folder: Path) -> dict[str, Path]:
    """Return a wide teacher, a narrow student, and the student in half precision."""
    models = {"teacher_fp32": classifier(32), "student_fp32": classifier(8), "student_fp16": classifier(8, half=True)}
    return {name: save(model, folder / f"{name}.onnx") for name, model in models.items()}


def small_contents(files: dict[str, Path]) -> Contents:
    """Return what a legal bundle of `files` is made of; the golden images are noise."""
    served = next((name for name in ("student_int8", "student_fp32") if name in files), min(files))
    return Contents(
        name="small",
        files=files,
        serving=Serving(
            {"cpu": served, "cuda": served, "tensorrt": served}, "cpu", threads=1, instances=1, max_batch_size=8
        ),
        preprocess=PREPROCESS,
        labels=LABELS,
        images=np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8),
        truths=np.array([0, 1, 2, 0]),
        task="classification",
        target="cpu_avx2",
        recipe_digest="abc",
        metrics={"student_fp32": {"score": 0.75, "agreement": 1.0}},
    )


def write_small_bundle(out: Path, files: dict[str, Path]) -> None:
    """Write a legal bundle of `files`."""
    write_bundle(out, small_contents(files))


def class_folders(root: Path, names: list[str]) -> None:
    """Write two images of one colour in each class folder: red in the first, green in the second, blue in the third."""
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for copy in range(2):
            colour = tuple(255 * (channel == index) for channel in range(3))
            Image.new("RGB", (20 + copy, 16), colour).save(root / name / f"{copy}.png")
