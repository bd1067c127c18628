"""Measure one file of a bundle under loads like MLPerf's: one image at a time, eight, all at once, and at random.

`python -m export.loadgen BUNDLE` does it, without torch, with MLCommons' LoadGen. What it shows is no MLPerf result.
"""

import argparse
import signal
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

from export.bundle.read import Bundle, read_bundle
from export.bundle.sandbox import vet
from export.command.arguments import at_least, positive
from export.command.files import json_text, write_text
from export.command.main import run
from export.command.table import table
from export.errors import BundleError
from export.runtime.environment import environment
from export.runtime.session import DTYPES, open_session
from export.serving.workers import capacity

SCENARIOS = ("single_stream", "multi_stream", "offline", "server")
NOTICE = (
    "MLPerf-style load, not an MLPerf result: MLCommons' LoadGen makes the queries, "
    "but none of MLPerf's rules on data, accuracy, duration and review is kept"
)
INSTALL = "this needs MLCommons' LoadGen: python -m pip install mlcommons-loadgen"
WARM_UP = 0.1  # of a scenario's time
EASY = 0.5  # of what the machine does at most: queues stay short


class LoadJson(TypedDict):
    """The whole report; `notice` comes first and says what it is not."""

    notice: str
    loadgen: str
    bundle: str
    file: str
    threads: int
    workers: int
    batch: int
    seconds: float
    seed: int
    capacity_ips: float
    scenarios: list[dict[str, str | float | None]]
    environment: dict[str, object]


def measure(bundle: Bundle, arguments: argparse.Namespace) -> LoadJson:
    """Run the asked scenarios one after the other.

    Raises BundleError for a file that cannot run, and for a rate that the machine cannot follow.
    """
    from export.serving.scenarios import loadgen_version, run_scenario

    path = bundle.file(arguments.file)
    session = open_session(path, threads=arguments.threads)
    images = bundle.golden.inputs.astype(DTYPES[session.get_inputs()[0].type], copy=False)
    batch, workers = arguments.batch, arguments.workers
    most = capacity(session, images, batch=batch, workers=workers, seconds=arguments.seconds * WARM_UP)
    qps = arguments.qps or EASY * most
    if qps > most:
        raise BundleError(f"--qps: this machine answers {most:.4g} images a second, got {qps:g}: ask for less")
    rows = [
        run_scenario(
            scenario,
            session,
            images,
            batch=batch,
            workers=workers,
            seconds=arguments.seconds,
            images_per_second=most,
            qps=qps,
            seed=arguments.seed,
        )
        for scenario in arguments.scenario or SCENARIOS
    ]
    return LoadJson(
        notice=NOTICE,
        loadgen=loadgen_version(),
        bundle=bundle.name,
        file=path.name,
        threads=arguments.threads,
        workers=workers,
        batch=batch,
        seconds=arguments.seconds,
        seed=arguments.seed,
        capacity_ips=most,
        scenarios=[asdict(row) for row in rows],
        environment=environment(),
    )


def as_text(found: LoadJson) -> str:
    """Return what it is not, the conditions, and the table."""
    header = (
        "MLPerf-style", "queries", "images each", "asked/s", "images/s", "mean ms", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "p99.9 ms",
    )  # fmt: skip
    conditions = (
        f"{found['file']}: {found['threads'] or 'all'} CPU threads a run, {found['workers']} runs at once, "
        f"up to {found['batch']} images a run, {found['seconds']:g} s each"
    )
    rows = [list(row.values()) for row in found["scenarios"]]
    return f"{found['notice']}.\n{conditions}\n\n{table(header, rows)}"


def print_loads(arguments: argparse.Namespace) -> int:
    """Print what was measured under each load."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # LoadGen waits where Python sees no Ctrl-C
    if find_spec("mlperf_loadgen") is None:
        raise BundleError(INSTALL)
    found = measure(read_bundle(arguments.bundle, inspect=vet), arguments)
    if arguments.json:
        write_text(arguments.json, json_text(found))
    sys.stdout.write(f"{as_text(found)}\n")
    return 0


def main() -> int:
    """Measure one file of a bundle under loads like MLPerf's, which is no MLPerf result."""
    parser = argparse.ArgumentParser(prog="python -m export.loadgen", description=main.__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="may be repeated; all four without it")
    parser.add_argument("--file", metavar="NAME", help="another file of the bundle than the one to serve")
    parser.add_argument(
        "--seconds", type=positive, default=10.0, help="the least time of a scenario; 64 queries at least"
    )
    parser.add_argument("--threads", type=at_least(0), default=1, help="CPU threads of a run; 0 is all cores")
    parser.add_argument("--workers", type=at_least(1), default=1, help="runs at once")
    parser.add_argument("--batch", type=at_least(1), default=8, help="the most images in a run")
    parser.add_argument(
        "--qps", type=positive, help="Server's images a second; half of what the machine does without it"
    )
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return run(parser, print_loads)


if __name__ == "__main__":
    sys.exit(main())
