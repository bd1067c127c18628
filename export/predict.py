"""Print a bundle's predictions for images.

`python -m export.predict BUNDLE image.jpg` prints the likeliest labels with their probabilities, the boxes, or the classes' areas, without
torch; `--json` prints JSON, `--draw FOLDER` draws boxes, masks or what else is an image, `--npz FOLDER` writes the outputs.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from export.bundle.read import Bundle, read_bundle
from export.bundle.sandbox import vet
from export.command.arguments import at_least
from export.command.main import MISTAKE, run
from export.command.table import table
from export.errors import BundleError, UserError
from export.images.decode import read_image, values_of
from export.images.drawing import as_rgb, with_legend
from export.images.orientation import read_header
from export.images.preprocess import Preprocess
from export.images.read import read_pixels
from export.runtime.native import RUNTIME_ERRORS, first_line
from export.runtime.providers import add_arguments, asked
from export.runtime.session import infer, open_session
from export.tasks.task import Array, OutputTask

TOP = 5
ALL = 1000  # most lines with --json


def predict(session: onnxruntime.InferenceSession, bundle: Bundle, path: Path) -> Array:
    """Return the network's output for one image, without the batch dimension.

    Raises DataError for a broken image, BundleError if the network cannot run or its output is not finite.
    """
    images = bundle.preprocess.normalize(read_pixels(path, bundle.preprocess)[None])  # (1, channels, height, width)
    try:
        outputs = infer(session, images)
    except RUNTIME_ERRORS as error:
        raise BundleError(f"{path}: the network cannot run on it ({first_line(error)}): export it again") from error
    if not np.isfinite(outputs).all():
        raise BundleError(f"{path}: the network's output for it is not finite: export it again")
    return np.asarray(outputs[0])


def task_for(bundle: Bundle, path: Path) -> OutputTask:
    """Return the task whose places are fractions of this image."""
    if bundle.task.of_whole is None:
        return bundle.task
    size = read_header(path).upright if bundle.preprocess.upright else read_header(path).size
    return bundle.task.of_whole(bundle.task, bundle.preprocess, size[::-1])


def draw(output: Array, task: OutputTask, labels: list[str], preprocess: Preprocess, path: Path, folder: Path) -> None:
    """Write the image, or the crop that a network of images sees, with the prediction drawn on it, as folder/NAME.png, of several outputs each."""
    from PIL import Image

    drawn = task.drawn(task.decode(output[None])[None])
    if task.draw is None or not drawn:
        raise BundleError(f"--draw: no output of {task.name} is an image: leave it out")
    whole = read_image(path, upright=preprocess.upright, pixel=preprocess.pixel)
    pixels = as_rgb(values_of(whole) if preprocess.stretch or task.of_whole else preprocess.pixels(whole))
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in drawn.items():
        place = folder / f"{path.stem}{name and f'_{name}'}.png"
        drawing = task.draw(pixels, one[0, 0], labels)
        if task.legend:
            drawing = with_legend(drawing, task.legend(one[0, 0]), labels)
        Image.fromarray(drawing).save(place)


def write_outputs(output: Array, task: OutputTask, path: Path, folder: Path) -> None:
    """Write an image's outputs by name as folder/NAME.npz."""
    (found,) = task.split(output[None])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{path.stem}.npz", **(found if isinstance(found, dict) else {"output": found}))


def print_predictions(arguments: argparse.Namespace) -> int:
    """Print the predictions for every image that can be read; return 2 if one cannot."""
    code = 0
    bundle = read_bundle(arguments.bundle, inspect=vet)
    task, labels = bundle.task, list(bundle.labels)
    if arguments.draw and task.draw is None:
        raise BundleError(f"--draw: there is nothing to draw for {task.name}: leave it out")
    session = open_session(bundle.file(arguments.file), runs_in=asked(arguments))
    for path in arguments.images:
        try:
            output, task = predict(session, bundle, path), task_for(bundle, path)
            if arguments.draw:
                draw(output, task, labels, bundle.preprocess, path, arguments.draw)
            if arguments.npz:
                write_outputs(output, task, path, arguments.npz)
            columns, rows = task.show(output, labels, arguments.top or (ALL if arguments.json else TOP))
            if arguments.json:
                found = [dict(zip(columns, row, strict=True)) for row in rows]
                sys.stdout.write(f"{json.dumps({'image': str(path), 'found': found})}\n")
            else:
                sys.stdout.write(f"{path}\n{table(columns, rows)}\n")
        except UserError as error:  # go on with the other images
            sys.stderr.write(f"{error}\n")
            code = MISTAKE
    return code


def main() -> int:
    """Print the network's predictions for images: labels with probabilities, boxes with scores, or areas of classes."""
    parser = argparse.ArgumentParser(prog="python -m export.predict", description=main.__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="JPEG, PNG, WebP or BMP")
    parser.add_argument("--file", metavar="NAME", help="a file of the bundle, by default the one to serve")
    add_arguments(parser)
    parser.add_argument("--top", type=at_least(1), help=f"most lines per image (default {TOP}; with --json all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image, one per line")
    parser.add_argument(
        "--draw", type=Path, metavar="FOLDER", help="write the images with boxes or masks on them, or restored"
    )
    parser.add_argument("--npz", type=Path, metavar="FOLDER", help="write each image's outputs, as numpy.savez does")
    return run(parser, print_predictions)


if __name__ == "__main__":
    sys.exit(main())
