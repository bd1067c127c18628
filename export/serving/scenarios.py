"""Run a session under MLPerf's four kinds of load with MLCommons' LoadGen, which makes the queries and measures.

SingleStream   the next image arrives when the last is done
MultiStream    the same with eight images at once
Offline        all images are queued at the start
Server         images arrive at random (Poisson) at a given rate

LoadGen is the program behind MLPerf's results. The loads here are only like MLPerf's: its rules on data, accuracy, lengths and
review are not kept.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import mlperf_loadgen
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.serving.workers import Logits, Sample, Workers

SCENARIOS = {
    "single_stream": mlperf_loadgen.TestScenario.SingleStream,
    "multi_stream": mlperf_loadgen.TestScenario.MultiStream,
    "offline": mlperf_loadgen.TestScenario.Offline,
    "server": mlperf_loadgen.TestScenario.Server,
}
STREAMS = 8  # images in a query of MultiStream, as in MLPerf
MIN_QUERIES = 64
PERCENTILES = ("50.00", "90.00", "95.00", "99.00", "99.90")
RECORD = ":::MLLOG "


@dataclass(frozen=True)
class ScenarioRow:
    """One scenario; latencies are per query, None for Offline."""

    scenario: str
    queries: int
    images_per_query: int
    asked_qps: float | None
    images_per_second: float
    mean_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p99_9_ms: float | None


@dataclass(frozen=True)
class Load:
    """How to load a session; `images_per_second` is the most to expect, `qps` is Server's rate, `seconds` the least duration."""

    batch: int
    workers: int
    seconds: float
    images_per_second: float
    qps: float
    seed: int


def run_scenario(
    scenario: str, session: onnxruntime.InferenceSession, images: NDArray[np.generic], load: Load
) -> ScenarioRow:
    """Load the session and return LoadGen's measurements; BundleError if a run failed."""
    pool = Workers(session, images, batch=load.batch, complete=complete)
    settings = settings_of(scenario, load)
    with tempfile.TemporaryDirectory() as folder:
        system = mlperf_loadgen.ConstructSUT(pool.issue, lambda: None)
        library = mlperf_loadgen.ConstructQSL(len(images), len(images), lambda _: None, lambda _: None)
        with pool.running(load.workers):
            mlperf_loadgen.StartTestWithLogSettings(system, library, settings, logs(folder), f"{folder}/none.config")
        mlperf_loadgen.DestroyQSL(library)
        mlperf_loadgen.DestroySUT(system)
        found = read_log(Path(folder, "mlperf_log_detail.txt"))
    return row_of(scenario, found, qps=load.qps)


def complete(samples: Sequence[Sample], logits: Logits) -> None:
    """Tell LoadGen that samples are done, and where their logits are in memory until this call returns."""
    size = logits[0].nbytes
    mlperf_loadgen.QuerySamplesComplete(
        [
            mlperf_loadgen.QuerySampleResponse(sample.id, row.ctypes.data, size)
            for sample, row in zip(samples, logits, strict=True)
        ]
    )


def settings_of(scenario: str, load: Load) -> "mlperf_loadgen.TestSettings":
    """Return LoadGen's settings, with defaults for all that is not set here."""
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = SCENARIOS[scenario]
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = round(load.seconds * 1e3)
    settings.min_query_count = MIN_QUERIES
    settings.multi_stream_samples_per_query = STREAMS
    # LoadGen prepares queries by these, and ends early when they run out.
    settings.offline_expected_qps = load.images_per_second
    settings.single_stream_expected_latency_ns = round(1e9 / load.images_per_second)
    settings.multi_stream_expected_latency_ns = round(1e9 / load.images_per_second * STREAMS)
    settings.server_target_qps = load.qps
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = load.seed
    return settings


def logs(folder: str) -> "mlperf_loadgen.LogSettings":
    """Return settings that write the log files into `folder` and nothing to the terminal."""
    settings = mlperf_loadgen.LogSettings()
    settings.log_output.outdir = folder
    settings.log_output.copy_summary_to_stdout = False
    settings.enable_trace = False
    return settings


def read_log(path: Path) -> dict[str, float]:
    """Return the numbers in LoadGen's detailed log by key."""
    lines = path.read_text().splitlines()
    records = [json.loads(line.removeprefix(RECORD)) for line in lines if line.startswith(RECORD)]
    return {record["key"]: record["value"] for record in records}


def row_of(scenario: str, found: Mapping[str, float], *, qps: float) -> ScenarioRow:
    """Return one scenario's row from LoadGen's numbers, with nanoseconds as milliseconds."""
    each = "per_query_" if scenario == "multi_stream" else ""
    mean_ms = found["result_mean_query_latency_ns" if each else "result_mean_latency_ns"] / 1e6
    p50, p90, p95, p99, p99_9 = (found[f"result_{p}_percentile_{each}latency_ns"] / 1e6 for p in PERCENTILES)
    images_per_query = int(found["effective_samples_per_query"])
    match scenario:
        case "single_stream":
            rate = found["result_qps_with_loadgen_overhead"]
        case "multi_stream":
            rate = images_per_query / mean_ms * 1e3  # the next query arrives when the last is done
        case "offline":
            rate = found["result_samples_per_second"]
        case _:
            rate = found["result_completed_samples_per_sec"]
    queries, asked = int(found["result_query_count"]), qps if scenario == "server" else None
    if scenario == "offline":  # all images are queued at the start, so latencies mean nothing
        return ScenarioRow(scenario, queries, images_per_query, asked, rate, None, None, None, None, None, None)
    return ScenarioRow(scenario, queries, images_per_query, asked, rate, mean_ms, p50, p90, p95, p99, p99_9)


def loadgen_version() -> str:
    """Return LoadGen's version."""
    return metadata.version("mlcommons-loadgen")
