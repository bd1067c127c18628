"""Take the smallest network of every family that timm and torchvision offer through the whole chain, and tabulate it in docs/models.md.

`python tools/zoo.py` goes on where it stopped: a row once made lies in runs/zoo/rows.jsonl. Each network has a process of its own, with an
end to its time and memory.
"""

import argparse
import json
import resource
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torchvision
from chain import CLASSES, examine

from compress.models.architectures import build
from export.errors import UserError
from export.onnx_file.to_onnx import to_onnx
from export.tasks.classification import CLASSIFICATION
from export.tasks.detection import DETECTION
from export.tasks.segmentation import SEGMENTATION

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "zoo"
DOCUMENT = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: make zoo -->", "<!-- end of table -->"
BEGIN_OTHERS = "<!-- table: make zoo, other tasks -->"
# Networks of other tasks: the task, and an image size in pixels that each takes.
OTHERS = {
    "fpn:resnet18": (SEGMENTATION, 64),
    "torchvision:lraspp_mobilenet_v3_large": (SEGMENTATION, 64),
    "torchvision:deeplabv3_mobilenet_v3_large": (SEGMENTATION, 64),
    "torchvision:fcn_resnet50": (SEGMENTATION, 64),
    "smp:unet/resnet18": (SEGMENTATION, 64),
    "smp:fpn/tu-resnet10t": (SEGMENTATION, 64),
    "ssd:resnet18": (DETECTION, 96),
    "torchvision:ssdlite320_mobilenet_v3_large": (DETECTION, 320),
    "torchvision:fcos_resnet50_fpn": (DETECTION, 64),
    "torchvision:retinanet_resnet50_fpn": (DETECTION, 64),
    "torchvision:retinanet_resnet50_fpn_v2": (DETECTION, 64),
    "torchvision:ssd300_vgg16": (DETECTION, 300),
}
# Where something is left to convolve; the last one that a network takes is the only one for most transformers.
IMAGE_SIZES = (64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)
SECONDS, GIGABYTES = 540, 18


def families() -> dict[str, str]:
    """Return the member with the fewest parameters of each family (a module of timm's or torchvision's), the smallest families first."""
    sizes: dict[str, dict[str, int]] = {}
    for module in timm.list_modules():
        # timm's test_ networks are for tests alone, nobody trains them.
        for name in timm.list_models(module=module, exclude_filters="test_*"):
            with torch.device("meta"):
                model = build(f"timm:{name}", num_classes=CLASSES)
            sizes.setdefault(f"timm.{module}", {})[f"timm:{name}"] = sum(part.numel() for part in model.parameters())
    for name in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        weights = next(iter(torchvision.models.get_model_weights(name)))
        sizes.setdefault(f"torchvision.{module}", {})[f"torchvision:{name}"] = weights.meta["num_params"]
    smallest = sorted((min(of.items(), key=lambda item: item[1]) for of in sizes.values()), key=lambda item: item[1])
    names = {arch: family for family, of in sizes.items() for arch in of}
    return {names[arch]: arch for arch, _ in smallest}


def image_size(arch: str) -> int:
    """Return the smallest of the sizes at which a network answers, in training mode too."""
    for size in IMAGE_SIZES:
        try:
            model = build(arch, num_classes=CLASSES, shape=(3, size, size))
            with torch.no_grad():
                images = torch.zeros(2, 3, size, size)
                model.eval()(images)
                model.train()(images)
        except (UserError, RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError):
            continue
        return size
    raise AssertionError(f"{arch}: takes none of {IMAGE_SIZES} pixels")


def row_of(family: str, arch: str) -> dict[str, Any]:
    """Return what became of one family: a row, a refusal, or a traceback's last lines."""
    started = time.monotonic()
    try:
        task, size = OTHERS.get(arch) or (CLASSIFICATION, image_size(arch))
        found: dict[str, Any] = asdict(examine(arch, size, task))
    except UserError as error:
        found = {"arch": arch, "refused": str(error)}
    except Exception:  # noqa: BLE001 (the table says it)
        found = {"arch": arch, "crash": traceback.format_exc()[-1500:]}
    return {"family": family, **found, "seconds": round(time.monotonic() - started, 1)}


def in_a_process(family: str, arch: str) -> dict[str, Any]:
    """Return the row of one family, made by a process of its own with an end to its processor time and memory."""
    receiving, sending = Pipe(duplex=False)
    child = get_context("fork").Process(target=_send_row, args=(sending, family, arch))
    child.start()
    sending.close()
    try:
        row: dict[str, Any] = receiving.recv()
    except EOFError:
        child.join()
        late = child.exitcode == -signal.SIGXCPU
        row = {"crash": f"took more than {SECONDS} s" if late else f"its process ended with {child.exitcode}"}
    child.kill()
    child.join()
    return {"family": family, "arch": arch, **row}


def _send_row(sending: Connection, family: str, arch: str) -> None:
    limit = GIGABYTES * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 60))
    sending.send(row_of(family, arch))


def recorded() -> dict[str, dict[str, Any]]:
    """Return the latest row of each family that has one."""
    file = FOLDER / "rows.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["family"]: row for row in map(json.loads, lines)}


def members() -> dict[str, str]:
    """Return `families()`, remembered for the versions that are installed."""
    file, versions = FOLDER / "families.json", f"timm {timm.__version__}, torchvision {torchvision.__version__}"
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("versions") != versions:
        known = {"versions": versions, "families": families()}
        FOLDER.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1))
    found: dict[str, str] = known["families"]
    return found


def as_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of docs/models.md."""
    titles = ("network", "pixels", "MACs kept", "layers in integers", "what stays float, and why", "agreement, SNR (rounding)")  # fmt: skip
    return "\n".join(
        [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *(f"| {' | '.join(_cells(row))} |" for row in rows)]
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"`{row['arch']}`"
    if "layers" not in row:
        said = row.get("refused") or row["crash"].strip().splitlines()[-1]
        return (name, "–", "–", "–", f"{'refused' if 'refused' in row else 'FAILS'}: {said}".replace("|", "\\|"), "–")
    kernels, others = Counter[str](), Counter[str]()
    for reason in row["float_reasons"].values():
        _, no_kernel, operation = reason.partition("ONNX Runtime has no integer kernel for ")
        (kernels if no_kernel else others)[operation.partition(".")[0] or reason] += 1
    what = [f"{times} × {reason}" for reason, times in others.most_common()]
    if kernels:
        names = ", ".join(f"{operation} {times}" for operation, times in kernels.most_common())
        what.insert(0, f"no integer kernel: {names}")
    snr = "same bits" if row["snr_db"] > 200 else f"{row['snr_db']:.1f}"
    return (
        name,
        str(row["image_size"]),
        f"{row['kept_macs']:.2f}" if row["not_pruned"] is None else "1 (refused)",
        f"{row['layers'] - len(row['float_layers'])} of {row['layers']}",
        "; ".join(what) or "nothing",
        f"{row['agreement']:.0%}, {snr} ({row['rounding_snr_db']:.1f}) dB",
    )


def summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return how many families go through, and how far."""
    rows = list(rows)
    through = [row for row in rows if "layers" in row]
    counts = {
        "families": len(rows),
        "go through": len(through),
        "with every convolution and linear layer in integers": sum(not row["float_layers"] for row in through),
        "pruned": sum(row["not_pruned"] is None for row in through),
        "equal to torch layer by layer": sum(row["first_divergence"] is None for row in through),
        "refused": sum("refused" in row for row in rows),
        "fail": sum("crash" in row for row in rows),
    }
    return ", ".join(f"{number} {what}" for what, number in counts.items())


def write_table(rows: Iterable[Mapping[str, Any]], begin: str) -> None:
    """Put the table, with its summary, behind its mark in docs/models.md."""
    rows = list(rows)
    head, _, rest = DOCUMENT.read_text().partition(begin)
    _, _, tail = rest.partition(END)
    counts = textwrap.fill(f"{summary(rows)}.", 99)
    DOCUMENT.write_text(f"{head}{begin}\n{counts}\n\n{as_markdown(rows)}\n{END}{tail}")


def main() -> None:
    """Examine every family that has no row yet, and put the table into docs/models.md."""
    parser = argparse.ArgumentParser(prog="python tools/zoo.py", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no network after this time")
    parser.add_argument(
        "--again", nargs="*", default=(), metavar="FAMILY", help="these anew; `failed`, `refused` are all of those"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with (
        TemporaryDirectory() as folder
    ):  # the first export takes long; without a backward, behind which no process can be forked
        to_onnx(build("cifar:resnet8", num_classes=CLASSES), Path(folder, "first.onnx"), shape=(3, 32, 32), metadata={})
    end, known = time.monotonic() + arguments.seconds, recorded()
    for family, arch in {**members(), **dict(zip(OTHERS, OTHERS, strict=True))}.items():
        row = known.get(family, {})
        kinds = {family, *(kind for kind, key in (("failed", "crash"), ("refused", "refused")) if key in row)}
        if (row and kinds.isdisjoint(arguments.again)) or time.monotonic() > end:
            continue
        known[family] = in_a_process(family, arch)
        with (FOLDER / "rows.jsonl").open("a") as file:
            file.write(json.dumps(known[family]) + "\n")
        sys.stdout.write(f"{family} {known[family].get('seconds', '')} {_cells(known[family])}\n")
        sys.stdout.flush()
    for begin, families in ((BEGIN, sorted(members())), (BEGIN_OTHERS, list(OTHERS))):
        write_table((known[family] for family in families if family in known), begin)
    sys.stdout.write(f"{summary(known.values())}\n")


if __name__ == "__main__":
    main()
