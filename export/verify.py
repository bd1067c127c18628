"""`python -m export.verify BUNDLE_OR_FILE`: compare INT8 files, as ONNX Runtime runs them, with their own Q/DQ graphs in float."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from export.bundle.read import Bundle, read_bundle
from export.bundle.sandbox import require_sound, vet
from export.command.arguments import at_least
from export.command.files import json_text, write_text
from export.command.main import run
from export.command.table import table
from export.errors import BundleError
from export.images.read import Examples
from export.onnx_file.model_file import parse, precision
from export.proof.rows import VerifyRow
from export.proof.verify import Floats, verify
from export.tasks import stated_task
from export.tasks.task import Array, Metric


def as_text(found: VerifyRow, metric: Metric) -> str:
    """Return the verification as lines for a terminal."""
    low, high = found["agreement_ci95"]
    rows = [
        (
            tensor["name"],
            ", ".join(tensor["layers"]) or "no layer",
            str(tensor["max_lsb"]),
            f"{tensor['differing']:.2%}",
            tensor["snr_db"],
            str(tensor["local"]["max_lsb"]),
            f"{tensor['local']['differing']:.2%}",
        )
        for tensor in found["tensors"]
    ]
    header = ("tensor", "layers", "max LSB", "differing", "SNR dB", "alone: max LSB", "differing")
    lines = [
        f"agreement {found['agreement']:.2%} on {found['images']} images (95 % interval {low:.2%} to {high:.2%})",
        *(
            [f"{metric.title} {found['score']:.2%}, the reference's {found['score_reference']:.2%}"]
            if found["score"] is not None
            else []
        ),
        table(header, rows),
        f"first tensor that diverges: {found['first_divergence'] or 'none'}",
        *(_blame(found) if found["first_divergence"] and not found["saturation"] else []),
        *(
            f"{layer['layer']}: saturates on this machine: {layer['values']:.2%} of its values are wrong, by up to {layer['max_lsb']} levels: "
            "export for cpu_avx2 (7-bit weights)"
            for layer in found["saturation"]
        ),
    ]
    if found["saturation_possible"] and not found["saturation"]:
        some = ", ".join(found["saturation_possible"][:3])
        lines.append(
            f"on a CPU without VNNI {len(found['saturation_possible'])} layers can saturate ({some} first): serve the file for cpu_avx2 there"
        )
    return "\n".join(lines)


def _blame(found: VerifyRow) -> list[str]:
    """Return a sentence on the first tensor that diverges although nothing saturates: the file is its own reference."""
    (tensor,) = (tensor for tensor in found["tensors"] if tensor["name"] == found["first_divergence"])
    named = ", ".join(tensor["layers"]) or tensor["name"]
    return [f"ONNX Runtime {onnxruntime.__version__} does not compute {named} as the file says: try another version"]


def batches_of(path: Path, examples: Examples | None, images: int) -> Iterator[tuple[Floats, Array | None]]:
    """Yield `images` of the examples, evenly spaced, or noise of unit variance if there are none."""
    if examples is None:
        file = parse(path)
        shape = [dim.dim_value for dim in file.graph.input[0].type.tensor_type.shape.dim][1:]
        generator = np.random.default_rng(0)
        yield generator.standard_normal((images, *shape), dtype=np.float32), None
        return
    yield from examples.spread(images).batches()


def int8_files(bundle: Bundle) -> dict[str, Path]:
    """Return the INT8 files of a bundle that take normalized floats."""
    found = {name: file for name, file in bundle.files.items() if _is_int8_of_floats(file)}
    if not found:
        raise BundleError(f"{bundle.path}: has no INT8 file: run a recipe with a ptq or qat stage")
    return found


def _is_int8_of_floats(file: Path) -> bool:
    model = parse(file)
    return precision(model) == "int8" and model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def print_verifications(arguments: argparse.Namespace) -> int:
    """Print how each file compares with its reference; return 1 if one diverges."""
    found: dict[str, VerifyRow] = {}
    path: Path = arguments.path
    folder = path if path.is_dir() else path.parent
    bundle = read_bundle(folder, inspect=vet) if path.is_dir() or arguments.data else None
    files = int8_files(bundle) if bundle and path.is_dir() else {path.stem: require_sound(path)}
    data: Path | None = arguments.data
    examples = bundle.examples(data) if bundle and data else None
    sys.stdout.write("".join(f"note: {note}\n" for note in (examples.notes if examples else ())))
    for name, file in files.items():
        images = batches_of(file, examples, arguments.images)
        task = bundle.task if bundle else stated_task(file)
        found[name] = verify(file, images, task=task, tensor_images=arguments.tensor_images)
        sys.stdout.write(f"{name}\n{as_text(found[name], task.metric)}\n\n")
    if arguments.json:
        write_text(arguments.json, json_text(found))
    return int(any(row["first_divergence"] or row["agreement"] < arguments.min_agreement for row in found.values()))


def main() -> int:
    """Compare an INT8 file, or each of a bundle, with its own Q/DQ graph in float, on this machine; exit with 1 if they diverge."""
    parser = argparse.ArgumentParser(prog="python -m export.verify", description=main.__doc__)
    parser.add_argument("path", type=Path, metavar="BUNDLE_OR_FILE")
    parser.add_argument(
        "--data", type=Path, help="a folder of class folders, or an .npz file; needs the bundle's preprocessing"
    )
    parser.add_argument(
        "--images", type=at_least(1), default=256, help="images to compare on, evenly spaced over the data"
    )
    parser.add_argument(
        "--tensor-images", type=at_least(0), default=64, help="how many of them to compare tensor by tensor"
    )
    parser.add_argument("--min-agreement", type=float, default=0.0, metavar="FRACTION", help="exit with 1 below it")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return run(parser, print_verifications)


if __name__ == "__main__":
    sys.exit(main())
