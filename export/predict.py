"""Say what a bundle's model sees in an image.

`python -m export.predict BUNDLE image.jpg` prints the likeliest labels with their probabilities, without torch.
"""

import argparse
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
from export.images.read import read_pixels
from export.runtime.session import DTYPES, RUNTIME_ERRORS, first_line, open_session


def predict(session: onnxruntime.InferenceSession, bundle: Bundle, path: Path, *, top: int) -> str:
    """Return the image's path and what the network sees in it.

    Raises DataError for a file that is no whole image, BundleError for a network that cannot run and for outputs that are not finite.
    """
    images = bundle.preprocess.normalize(read_pixels(path, bundle.preprocess)[None])  # (1, 3, size, size)
    (given,) = session.get_inputs()
    try:
        (outputs,) = session.run(None, {given.name: images.astype(DTYPES[given.type], copy=False)})
    except RUNTIME_ERRORS as error:
        raise BundleError(f"{path}: the network cannot run on it ({first_line(error)}): export it again") from error
    if not np.isfinite(outputs).all():
        raise BundleError(f"{path}: the network gives no finite numbers for it: export it again")
    return f"{path}\n{table(*bundle.task.show(outputs[0], bundle.labels, top))}"


def print_predictions(arguments: argparse.Namespace) -> int:
    """Print the labels of every image that can be read; return 2 where one cannot."""
    code = 0
    bundle = read_bundle(arguments.bundle, inspect=vet)
    session = open_session(bundle.file(arguments.file))
    for path in arguments.images:
        try:
            sys.stdout.write(f"{predict(session, bundle, path, top=arguments.top)}\n")
        except UserError as error:  # the other images are still worth an answer
            sys.stderr.write(f"{error}\n")
            code = MISTAKE
    return code


def main() -> int:
    """Print the likeliest labels of images, with their probabilities."""
    parser = argparse.ArgumentParser(prog="python -m export.predict", description=main.__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="JPEG, PNG, WebP or BMP")
    parser.add_argument("--file", metavar="NAME", help="another file of the bundle than the one to serve")
    parser.add_argument("--top", type=at_least(1), default=5, help="how many labels")
    return run(parser, print_predictions)


if __name__ == "__main__":
    sys.exit(main())
