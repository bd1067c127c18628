"""Time networks of random weights, whole and cut to half of their INT8 time, in every provider and arithmetic of this machine: `make providers`.

Goes on where it stopped: a row once measured lies in runs/provider_study.jsonl, which also names the processor. Writes docs/results.md's
table. Time does not depend on the weights; nothing here says what accuracy is left. MIXED is the INT8 file with those layers in float that a
minimum cut finds faster so (compress/quant/mixture.py), if there are any.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from torch import nn

from compress.models.architectures import build
from compress.models.structure import classifier
from compress.pruning.goals import Goal
from compress.pruning.latency.search import open_latency
from compress.pruning.latency.timings import Table
from compress.pruning.plan import cut_, find_groups, smallest_widths
from compress.pruning.planner import options_of
from compress.quant.mixture import minimum_cut, times_of_layers
from compress.scoring import Served
from export.errors import UserError
from export.images.size import Shape
from export.onnx_file.targets import CPU, host_target
from export.runtime.conditions import Conditions
from export.runtime.environment import cpu_model, runtime
from export.runtime.latency import speedup, time_sessions
from export.runtime.measure import BenchPlan, trusted
from export.runtime.providers import PLAIN, PROVIDERS, present
from export.runtime.rows import file_in
from export.runtime.session import bind, open_session

ROOT = Path(__file__).parent.parent
ROWS, TABLE = ROOT / "runs" / "provider_study.jsonl", ROOT / "runs" / "latency-table"
DOCUMENT, BEGIN, END = ROOT / "docs" / "results.md", "<!-- table: providers -->", "<!-- end of providers -->"
NETWORKS = {
    **{f"torchvision:{name}": 224 for name in ("resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")},
    "timm:deit_small_patch16_224": 224, "torchvision:swin_t": 224, "torchvision:convnext_tiny": 224,
    "torchvision:ssdlite320_mobilenet_v3_large": 320,
}  # fmt: skip
FORMS, KEEP = ("whole", "cut"), 0.5
SECONDS, BLOCKS = 3.0, 12


def tell(text: str) -> None:
    sys.stderr.write(f"  {text}\n")


def halved(model: nn.Module, served: Served, folder: Path) -> nn.Module:
    """Return a network cut to KEEP of its time."""
    images = torch.zeros(1, *served.shape)
    groups = find_groups(model, images, "l2", exclude=(classifier(model),))
    options = options_of(model, groups, images, scope="global", round_to=8, min_channels=smallest_widths(groups, 0.1))
    goal, table = Goal("keep_latency", "latency", KEEP), Table(TABLE, served.conditions)
    latency = open_latency(
        model, options, goal, table, shape=served.shape, folder=folder, write=served.write, tell=tell
    )
    student = copy.deepcopy(model)
    cut_(student, images, latency.choose(model, images, options, latency.budget(1, 1))[-1].cuts)
    return student


def timed(files: dict[str, Path], shape: Shape, whole: Path) -> dict[str, dict[str, float]]:
    """Return each file's milliseconds in each place, and its speed-up over the whole network's FP32 file in the CPU provider."""
    channels, height, width = shape
    entries, warnings = trusted(files, BenchPlan(providers=present("auto")), channels=channels, size=(height, width))
    for warning in warnings:
        tell(warning)
    images = np.random.default_rng(0).standard_normal((1, *shape), np.float32)
    runs = {"reference": bind(open_session(whole, threads=1), images)}
    for name, place in entries:
        fixed = 1 if place.provider.plugin else None
        session = open_session(files[name], runs_in=place, threads=1, batch=fixed)
        runs[file_in(name, place)] = bind(session, images)
    plain = all(place == PLAIN for _, place in entries)
    clock = time.thread_time if plain else time.perf_counter
    found = time_sessions(runs, seconds=SECONDS, blocks=BLOCKS, clock=clock)
    reference = found.pop("reference")
    rows = {}
    for name, timing in found.items():
        ratio = speedup(reference, timing)
        rows[name] = {"ms": timing.percentile(50), "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}
    return rows


def rows_of(arch: str, size: int, provider: str, done: set[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the missing rows of a network: whole and cut."""
    torch.manual_seed(0)
    shape = (3, size, size)
    model = build(arch, num_classes=200, trust_code=False).eval()
    conditions = Conditions(PROVIDERS[provider].name, 1, 1)
    precisions = {name: Served(conditions, name, shape, host_target()) for name in ("fp32", "int8")}
    with TemporaryDirectory() as folder:
        whole = Path(folder, "whole.onnx")
        precisions["fp32"].write(copy.deepcopy(model), whole)
        for form in FORMS:
            if f"{arch} {form}" in done:
                continue
            try:
                network = model if form == "whole" else halved(model, precisions["int8"], Path(folder, "timed"))
                files = {name.upper(): Path(folder, f"{form}-{name}.onnx") for name in precisions}
                for name, served in precisions.items():
                    served.write(copy.deepcopy(network), files[name.upper()])
                layers = times_of_layers(*map(onnx.load, files.values()), provider=CPU, threads=1)
                if floats := minimum_cut(*layers):
                    files["MIXED"] = Path(folder, f"{form}-mixed.onnx")
                    replace(precisions["int8"], keep_float=tuple(floats)).write(copy.deepcopy(network), files["MIXED"])
                yield (
                    f"{arch} {form}",
                    {"times": timed(files, shape, whole), "in_float": len(floats), "layers": len(layers[0])},
                )
            except UserError as error:
                yield f"{arch} {form}", {"failed": str(error)}


def as_markdown(rows: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return the table: a row for each network whole and cut, a column for each file and place."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row.get("times", ())))
    lines = [["network", *names], ["---"] * (len(names) + 1)]
    for key, row in rows.items():
        cells = [row.get("times", {}).get(name) for name in names]
        texts = [
            f"{one['ms']:.1f} ms, {one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" if one else ""
            for one in cells
        ]
        floats = f", {row['in_float']} of {row['layers']} layers in float if mixed" if row.get("in_float") else ""
        lines.append(
            [f"{key}{floats}", *([str(row["failed"]), *[""] * (len(names) - 1)] if "failed" in row else texts)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Make the rows that are missing, and write the table where docs/results.md has its marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="parts of names; all by default")
    parser.add_argument("--cut-in", choices=PROVIDERS, default="cpu", help="the provider whose time is halved")
    arguments = parser.parse_args()
    here = f"{cpu_model()}, ONNX Runtime {runtime()['onnxruntime']}, {host_target().name}"
    ROWS.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    done = {key: row for key, where, row in lines if where == here}
    for arch, size in NETWORKS.items():
        if arguments.networks and not any(part in arch for part in arguments.networks):
            continue
        if all(f"{arch} {form}" in done for form in FORMS):
            continue
        for key, row in rows_of(arch, size, arguments.cut_in, set(done)):
            done[key] = row
            with ROWS.open("a") as file:
                file.write(json.dumps([key, here, row]) + "\n")
            tell(f"{key}: {json.dumps(row)}")
    ordered = {key: done[key] for arch in NETWORKS for form in FORMS if (key := f"{arch} {form}") in done}
    text = DOCUMENT.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{head}{BEGIN}\n{here}:\n\n{as_markdown(ordered)}\n{END}{tail}")


if __name__ == "__main__":
    main()
