"""Measure what `export.serve` adds to a bare call of ONNX Runtime: BUNDLE [SECONDS].

A request of one golden image goes over loopback and one connection that stays open, in JSON and as binary tensor data. Its bytes are made beforehand
and the answer's are read but not decoded: that is the client's. All take turns in blocks, with one thread each. Linux only.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from elsewhere.serving import Body, as_binary, as_json, served
from export.bundle.read import read_bundle
from export.command.table import table
from export.runtime.latency import time_sessions
from export.runtime.session import open_session


def main(path: Path, seconds: float) -> None:
    """Print medians, and how much more than the bare call they are."""
    bundle = read_bundle(path)
    session = open_session(bundle.file(None), threads=1)
    (given,), image = session.get_inputs(), bundle.golden.inputs[:1]
    with served(path) as server:
        connection = server.connect()

        def sends(method: str, url: str, body: Body) -> Callable[[], None]:
            def send() -> None:
                connection.request(method, url, *body)
                response = connection.getresponse()
                answer = response.read()
                assert response.status == 200, answer

            return send

        infer = f"/v2/models/{bundle.name}/infer"
        bodies = {"JSON": as_json(given.name, image), "binary": as_binary(given.name, image)}
        calls: dict[str, Callable[[], object]] = {
            "bare": lambda: session.run(None, {given.name: image}),
            "health": sends("GET", "/v2/health/ready", (b"", {})),
            **{form: sends("POST", infer, body) for form, body in bodies.items()},
        }
        timed = time_sessions(calls, seconds=seconds, blocks=20)
        cpu = {name: cpu_ms(run, server.process.pid) for name, run in calls.items()}
        connection.close()
    p10, p50, p90 = ({name: timed[name].percentile(percent) for name in calls} for percent in (10, 50, 90))
    kilobytes = {name: len(body) / 1e3 for name, (body, _) in bodies.items()}
    rows = [
        (
            name,
            kilobytes.get(name),
            p10[name],
            p50[name],
            p90[name],
            p50[name] - p50["bare"],
            cpu[name],
            timed[name].runs,
        )
        for name in calls
    ]
    header = ("call", "request kB", "p10 ms", "p50 ms", "p90 ms", "p50 - bare", "CPU ms", "runs")
    print(f"{bundle.files[bundle.served].name}, {image.shape[2]} px, one image\n{table(header, rows)}")  # noqa: T201


def cpu_ms(run: Callable[[], object], server: int, *, count: int = 40) -> float:
    """Return the processor time of a call in this process and the server's, which a busy machine hardly changes."""
    start = time.process_time() + cpu_seconds(server)
    for _ in range(count):
        run()
    return (time.process_time() + cpu_seconds(server) - start) / count * 1e3


def cpu_seconds(process: int) -> float:
    """Return the processor time that Linux counts for a process, in user and system mode."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 5.0)
