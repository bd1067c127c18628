"""Start Triton on a bundle's repository for the Python backend, ask it over HTTP and gRPC, stop it: BUNDLE OUT → OUT/*.npy and OUT/facts.json.

Runs in .elsewhere/triton, which has nvidia-pytriton's server, tritonclient, onnxruntime and numpy, nothing of this project. The
server listens on free ports of 127.0.0.1 and ends with this script, however that ends.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytriton  # type: ignore[import-not-found]
import tritonclient.grpc  # type: ignore[import-not-found]
import tritonclient.http  # type: ignore[import-not-found]
from google.protobuf import json_format, text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException  # type: ignore[import-not-found]

SERVER = Path(pytriton.__file__).parent / "tritonserver"
REQUESTS, PATIENCE_S = 64, 60
PR_SET_PDEATHSIG = 1


@contextmanager
def serving(repository: Path, log: Path) -> Iterator[tuple[str, str]]:
    """Run the server; give its HTTP and gRPC addresses once it is ready."""
    http, grpc = (f"127.0.0.1:{port}" for port in free_ports())
    options = {
        "model-repository": repository, "backend-directory": SERVER / "backends", "allow-metrics": "false",
        "http-address": "127.0.0.1", "http-port": http.partition(":")[2], "strict-readiness": "true",
        "grpc-address": "127.0.0.1", "grpc-port": grpc.partition(":")[2], "exit-timeout-secs": "5",
    }  # fmt: skip
    command = [str(SERVER / "bin" / "tritonserver"), *(f"--{name}={value}" for name, value in options.items())]
    # The Python backend starts the first interpreter of the PATH, whose packages model.py then imports.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env={**os.environ, "PATH": path},
            preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )
    try:
        wait_until_ready(http, server, log)
        yield http, grpc
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def free_ports() -> list[int]:
    """Return two ports that nobody listens on."""
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        return [first.getsockname()[1], second.getsockname()[1]]


def wait_until_ready(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return once the model is loaded and warm."""
    deadline = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"Triton did not become ready:\n{log.read_text(errors='replace')[-5000:]}")


def ask(protocol: Any, client: Any, model: str, images: Any, *, classes: int = 0) -> Any:
    """Return what the model answers to one request."""
    given = protocol.InferInput("input", images.shape, "FP32")
    given.set_data_from_numpy(images)
    wanted = protocol.InferRequestedOutput("logits", class_count=classes)
    return client.infer(model, [given], outputs=[wanted]).as_numpy("logits")


def in_batches(client: Any, model: str, inputs: Any) -> Any:
    """Send many requests of one image at once and return the answers (n, classes): the server gathers them into batches."""
    answers: dict[int, Any] = {}
    for index in range(REQUESTS):
        given = tritonclient.grpc.InferInput("input", inputs[:1].shape, "FP32")
        given.set_data_from_numpy(inputs[index % len(inputs)][None])

        def keep(result: Any, error: Any, index: int = index) -> None:
            answers[index] = error if result is None else result.as_numpy("logits")

        client.async_infer(model, [given], keep)
    deadline = time.monotonic() + PATIENCE_S
    while len(answers) < REQUESTS and time.monotonic() < deadline:
        time.sleep(0.01)
    return np.concatenate([answers[index] for index in range(REQUESTS)])


def refused(call: Any) -> str | None:
    """Return the error that a bad request gets."""
    try:
        call()
    except InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
    return None


def parsed(path: Path) -> Any:
    """Return a configuration read by Triton's own schema, in which an unknown field is an error."""
    message = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def post(address: str, model: str, request: bytes) -> Any:
    """Return the JSON answer to a request as `curl` would send it."""
    with urllib.request.urlopen(f"http://{address}/v2/models/{model}/infer", data=request, timeout=30) as answer:
        return json.loads(answer.read())


def main(bundle: Path, out: Path) -> None:
    """Ask in every way."""
    out.mkdir()
    # A copy: where it may write, the server leaves its __pycache__ beside model.py.
    repository = Path(shutil.copytree(bundle / "serving" / "triton-python", out / "repository"))
    (model,) = (path.name for path in repository.iterdir())
    inputs = np.load(bundle / "golden" / "inputs.npy")
    with serving(repository, out / "server.log") as (http, grpc):
        clients = [
            (tritonclient.http, tritonclient.http.InferenceServerClient(http)),
            (tritonclient.grpc, tritonclient.grpc.InferenceServerClient(grpc)),
        ]
        for (protocol, client), name in zip(clients, ("http", "grpc"), strict=True):
            np.save(
                out / f"{name}.npy", np.concatenate([ask(protocol, client, model, image[None]) for image in inputs])
            )
        np.save(out / "whole.npy", ask(*clients[0], model, inputs))
        (over_http, http_client), (_, grpc_client) = clients
        before = http_client.get_inference_statistics(model)["model_stats"][0]
        np.save(out / "batches.npy", in_batches(grpc_client, model, inputs))
        after = http_client.get_inference_statistics(model)["model_stats"][0]
        facts = {
            "version": http_client.get_server_metadata()["version"],
            "metadata": http_client.get_model_metadata(model),
            "config": http_client.get_model_config(model),
            "requests": after["inference_count"] - before["inference_count"],
            "executions": after["execution_count"] - before["execution_count"],
            "configs": {path.relative_to(bundle).as_posix(): parsed(path) for path in bundle.rglob("*.pbtxt")},
            "classified": [bytes(word).decode() for word in ask(*clients[0], model, inputs[:1], classes=1).ravel()],
            "response": post(http, model, (bundle / "serving" / "request.json").read_bytes()),
            "wrong_shape": refused(lambda: ask(over_http, http_client, model, inputs[:, :, 1:])),
            "too_many": refused(lambda: ask(over_http, http_client, model, np.repeat(inputs, 64, axis=0))),
            "ready_after_that": http_client.is_model_ready(model),
        }
    (out / "facts.json").write_text(json.dumps(facts))


main(Path(sys.argv[1]), Path(sys.argv[2]))
