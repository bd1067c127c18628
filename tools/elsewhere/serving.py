"""Start `export.serve` as a process of its own, in its own environment, and talk to it over HTTP."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".elsewhere/serve"
PYTHON = ENVIRONMENT / "bin/python"
JSON, OCTETS = "application/json", "application/octet-stream"
JSON_LENGTH = "Inference-Header-Content-Length"

Body = tuple[bytes, dict[str, str]]  # and its headers


def is_there() -> bool:
    """Whether `make elsewhere` has made the environment."""
    return (ENVIRONMENT / ".ready").exists()


def start(module: str, *arguments: str) -> "subprocess.Popen[str]":
    """Run a module of this project in the environment, which has none of the project's own packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(PYTHON), "-m", module, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: "subprocess.Popen[str]"
    port: int

    def connect(self) -> HTTPConnection:
        """Return a connection, not yet open."""
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: Body = (b"", {})) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers of the answer."""
        connection = self.connect()
        try:
            connection.request(method, path, *body)
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        """Return status and JSON."""
        status, answer, _ = self.ask("GET", path)
        return status, json.loads(answer)


@contextmanager
def served(bundle: Path, *arguments: str) -> Iterator[Server]:
    """Serve on a free port while the block runs."""
    with start("export.serve", str(bundle), "--port", "0", *arguments) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert " is served at http://127.0.0.1:" in line, line + process.stderr.read()
            yield Server(process, int(line.partition("127.0.0.1:")[2].partition("/")[0]))
        finally:
            process.terminate()


def as_json(name: str, images: NDArray[np.generic], datatype: str = "FP32") -> Body:
    """Return a request with the numbers in JSON."""
    given = {"name": name, "shape": images.shape, "datatype": datatype, "data": images.ravel().tolist()}
    return json.dumps({"inputs": [given]}).encode(), {"Content-Type": JSON}


def as_binary(name: str, images: NDArray[np.generic], datatype: str = "FP32") -> Body:
    """Return a request with the numbers behind the JSON, which asks for the answer in the same form."""
    size = {"binary_data_size": images.nbytes}
    given = {"name": name, "shape": images.shape, "datatype": datatype, "parameters": size}
    header = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    return header + images.tobytes(), {"Content-Type": OCTETS, JSON_LENGTH: str(len(header))}


def from_json(answer: bytes) -> NDArray[np.float32]:
    """Return the one output of an answer in JSON."""
    (output,) = json.loads(answer)["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def from_binary(answer: bytes, headers: dict[str, str]) -> NDArray[np.float32]:
    """Return the one output of a binary answer."""
    length = int({name.lower(): value for name, value in headers.items()}[JSON_LENGTH.lower()])
    (output,) = json.loads(answer[:length])["outputs"]
    return np.frombuffer(answer[length:], np.float32).reshape(output["shape"])
