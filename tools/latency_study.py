"""Prune networks of random weights to fractions of their INT8 latency, and say how near the clock comes: `make latency`.

Time does not depend on the weights, so none are needed. Prints one line a network and goal, as docs/results.md shows them.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from compress.models.architectures import build
from compress.models.structure import classifier, count
from compress.pruning.goals import Goal
from compress.pruning.latency.clock import Clock
from compress.pruning.latency.search import open_latency
from compress.pruning.latency.timings import Table
from compress.pruning.plan import cut_, find_groups, smallest_widths
from compress.pruning.planner import options_of
from compress.scoring import Served
from export.onnx_file.targets import CPU, host_target
from export.runtime.conditions import Conditions

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
KEEPS = (0.7, 0.5, 0.35)


def tell(text: str) -> None:
    sys.stderr.write(f"  {text}\n")


def study(name: str, keeps: tuple[float, ...], *, image_size: int, table: Path) -> None:
    """Print asked for, predicted and measured for each goal; measured once more at the end, apart from the search."""
    torch.manual_seed(0)
    model = build(f"torchvision:{name}", num_classes=200, trust_code=False).eval()
    images = torch.zeros(1, 3, image_size, image_size)
    groups = find_groups(model, images, "l2", exclude=(classifier(model),))
    smallest = smallest_widths(groups, 0.1)
    options = options_of(model, groups, images, scope="global", round_to=8, min_channels=smallest)
    conditions = Conditions(CPU, 1, 1)
    served = Served(conditions, "int8", (3, image_size, image_size), host_target())
    with TemporaryDirectory() as folder:
        for keep in keeps:
            goal = Goal("keep_latency", "latency", keep)
            latency = open_latency(
                model,
                options,
                goal,
                Table(table, conditions),
                shape=(3, image_size, image_size),
                folder=Path(folder),
                write=served.write,
                tell=tell,
            )
            started = time.monotonic()
            attempts = latency.choose(model, images, options, latency.budget(1, 1))
            seconds = time.monotonic() - started
            student = copy.deepcopy(model)
            cut_(student, images, attempts[-1].cuts)
            served.write(student, Path(folder) / "again.onnx")
            again, _, _ = Clock(latency.clock.reference, conditions, (3, image_size, image_size)).against(
                Path(folder) / "again.onnx"
            )
            macs = count(student, (3, image_size, image_size)).macs / count(model, (3, image_size, image_size)).macs
            cells = (
                name, f"{keep:.2f}", f"{latency.whole_ms:.2f} ms", f"{attempts[-1].predicted_ms / latency.whole_ms:.3f}",
                f"{attempts[-1].measured_ms / latency.whole_ms:.3f}", f"{again.ratio:.3f} [{again.low:.3f}, {again.high:.3f}]", f"{again.ratio / keep:.3f}", f"{macs:.3f}",
                len(attempts), f"{latency.table_s:.0f} s, {latency.model.timed:,}", f"{seconds:.0f} s",
            )  # fmt: skip
            sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--table", type=Path, default=Path("runs/latency-table"))
    arguments = parser.parse_args()
    sys.stdout.write(
        "| network | asked | before | predicted | measured | measured again | again / asked | MACs | choices | table | choosing |\n"
    )
    for name in arguments.networks:
        study(name, tuple(arguments.keep), image_size=arguments.image_size, table=arguments.table)


if __name__ == "__main__":
    main()
