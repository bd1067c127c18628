"""Draw a few validation images with their ground truth and the predictions of teacher and deployed file."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compress.report.judge.verdict import deployed_name
from compress.report.page import summary
from compress.report.shape import Report
from export.images.drawing import as_rgb
from export.names import ANSWERS, EXAMPLES_NPZ
from export.onnx_file.roles import TEACHER
from export.tasks import TASKS

SIDE = 256  # pixels of a picture's longer side


def examples(root: Path, report: Report) -> Iterator[Sequence[tuple[str, str]]]:
    """Yield each image's pictures as (title, JPEG as a data URI)."""
    folders = [root / stage["directory"] for stage in report["stages"] if stage["stage"] == "bench"]
    if not folders or not (folders[-1] / EXAMPLES_NPZ).exists():
        return
    task = TASKS[report["recipe"]["task"]]
    assert task.draw is not None
    labels = (report["classes"] or {"names": []})["names"]
    with np.load(folders[-1] / EXAMPLES_NPZ) as kept:
        images, truths, files = (kept[name] for name in ("images", "truths", "files"))
        drawn = {name.removeprefix(ANSWERS): kept[name] for name in kept if name.startswith(ANSWERS)}
    for index, pixels in enumerate(images):
        height, width = (SIDE * side // max(pixels.shape[:2]) for side in pixels.shape[:2])
        image = np.asarray(Image.fromarray(as_rgb(pixels)).resize((width, height), Image.Resampling.BICUBIC))
        yield [
            ("Image", _jpeg(image, (width, height))),
            *(
                [("Truth", _jpeg(task.draw_truth(image, truths[index], labels), (width, height)))]
                if task.draw_truth
                else []
            ),
            *(
                (
                    f"{summary.title(name)} {output}".rstrip(),
                    _jpeg(task.draw(image, of[index], labels), (width, height)),
                )
                for output, predictions in drawn.items()
                for name, of in zip(files.tolist(), predictions, strict=True)
                if name in (TEACHER, deployed_name(report))
            ),
        ]


def _jpeg(pixels: NDArray[np.uint8], size: tuple[int, int]) -> str:
    content = io.BytesIO()
    # Subsampling would blur the boxes' thin coloured lines.
    Image.fromarray(pixels).resize(size).save(content, "JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
