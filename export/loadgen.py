"""Measure one file of a bundle under loads like MLPerf's: one image at a time, eight, all at once, and at random.

`python -m export.loadgen BUNDLE` runs it, without torch, with MLCommons' LoadGen. The results are not MLPerf results.
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
    "but MLPerf's rules on data, accuracy, duration and review are not kept"
)
INSTALL = "this needs MLCommons' LoadGen: python -m pip install mlcommons-loadgen"
WARM_UP = 0.1  # fraction of a scenario's time
EASY = 0.5  # Server's default rate as a fraction of the capacity, so that queues stay short


class LoadJson(TypedDict):
    """The whole report; `notice`, first, says that it is not an MLPerf result."""

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
    """Run the requested scenarios one after the other.

    Raises BundleError if the file cannot run, and for a rate above the machine's capacity.
    """
    from export.serving.scenarios import Load, loadgen_version, run_scenario

    path = bundle.file(arguments.file)
    session = open_session(path, threads=arguments.threads)
    images = bundle.golden.inputs.astype(DTYPES[session.get_inputs()[0].type], copy=False)
    batch, workers = arguments.batch, arguments.workers
    most = capacity(session, images, batch=batch, workers=workers, seconds=arguments.seconds * WARM_UP)
    qps = arguments.qps or EASY * most
    if qps > most:
        raise BundleError(f"--qps: this machine processes {most:.4g} images per second, got {qps:g}: give a lower rate")
    load = Load(batch, workers, arguments.seconds, images_per_second=most, qps=qps, seed=arguments.seed)
    rows = [run_scenario(scenario, session, images, load) for scenario in arguments.scenario or SCENARIOS]
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
    """Return the notice, the conditions, and the table."""
    header = (
        "MLPerf-style", "queries", "images each", "asked/s", "images/s", "mean ms", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "p99.9 ms",
    )  # fmt: skip
    conditions = (
        f"{found['file']}: {found['threads'] or 'all'} CPU threads per run, {found['workers']} runs at once, "
        f"up to {found['batch']} images per run, {found['seconds']:g} s each"
    )
    rows = [list(row.values()) for row in found["scenarios"]]
    return f"{found['notice']}.\n{conditions}\n\n{table(header, rows)}"


def print_loads(arguments: argparse.Namespace) -> int:
    """Measure under each load, and print the table."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while LoadGen waits, Python does not see Ctrl-C
    if find_spec("mlperf_loadgen") is None:
        raise BundleError(INSTALL)
    found = measure(read_bundle(arguments.bundle, inspect=vet), arguments)
    sys.stdout.write(f"{as_text(found)}\n")
    if arguments.json:
        write_text(arguments.json, json_text(found))
    return 0


def main() -> int:
    """Measure one file of a bundle under loads like MLPerf's; the results are not MLPerf results."""
    parser = argparse.ArgumentParser(prog="python -m export.loadgen", description=main.__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="may be repeated; default: all four")
    parser.add_argument("--file", metavar="NAME", help="a file of the bundle, by default the one to serve")
    parser.add_argument(
        "--seconds", type=positive, default=10.0, help="least time of a scenario, which has at least 64 queries"
    )
    parser.add_argument("--threads", type=at_least(0), default=1, help="CPU threads per run; 0 is all cores")
    parser.add_argument("--workers", type=at_least(1), default=1, help="runs at once")
    parser.add_argument("--batch", type=at_least(1), default=8, help="most images per run")
    parser.add_argument(
        "--qps", type=positive, help="Server's images per second, by default half of the machine's capacity"
    )
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return run(parser, print_loads)


if __name__ == "__main__":
    sys.exit(main())
