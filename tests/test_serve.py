"""`export.serve` as a process of its own and real HTTP requests; KServe's SDK lives in an environment that `make elsewhere` makes."""

import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from elsewhere.serving import (
    JSON,
    JSON_LENGTH,
    OCTETS,
    PYTHON,
    ROOT,
    Body,
    Server,
    as_binary,
    as_json,
    from_binary,
    from_json,
    is_there,
    served,
    start,
)
from numpy.typing import NDArray
from onnx_files import small_files, write_small_bundle

from export.bundle.read import read_bundle

INFER = "/v2/models/small/infer"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_there(), reason="run `make elsewhere`")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_small_bundle(folder / "bundle", small_files(folder))
    return folder / "bundle"


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with served(bundle) as running:
        yield running


def noise(batch: int, *, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, 3, 16, 16), np.float32)


def bare(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """What ONNX Runtime answers without a server, with as many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": images})
    return np.asarray(logits, np.float32)


def still_answers(server: Server, bundle: Path) -> bool:
    status, answer, _ = server.ask("POST", INFER, as_json("input", noise(1)))
    return status == 200 and np.array_equal(from_json(answer), bare(bundle / "student_fp32.onnx", noise(1)))


def test_the_server_says_what_it_serves(server: Server) -> None:
    assert server.get("/v2/health/live") == (200, {"live": True})
    assert server.get("/v2/health/ready") == (200, {"ready": True})
    assert server.get("/v2/models/small/ready") == (200, {"name": "small", "ready": True})
    assert server.get("/v2")[1]["extensions"] == ["binary_tensor_data"]
    status, found = server.get("/v2/models/small")
    assert status == 200
    assert found["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 16, 16]}]
    assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_answer_is_that_of_bare_onnx_runtime_to_the_last_bit(server: Server, bundle: Path, batch: int) -> None:
    images, expected = noise(batch), bare(bundle / "student_fp32.onnx", noise(batch))
    status, answer, _ = server.ask("POST", INFER, as_json("input", images))
    assert (status, from_json(answer).tobytes()) == (200, expected.tobytes())
    status, answer, headers = server.ask("POST", INFER, as_binary("input", images))
    assert (status, from_binary(answer, headers).tobytes()) == (200, expected.tobytes())


def test_golden_inputs_get_the_golden_answers(server: Server, bundle: Path) -> None:
    golden = read_bundle(bundle).golden
    for image, expected in zip(golden.inputs, golden.outputs["student_fp32"], strict=True):
        status, answer, _ = server.ask("POST", INFER, as_json("input", image[None]))
        assert (status, from_json(answer)[0].tobytes()) == (200, expected.tobytes())


def test_the_bundles_own_request_gets_the_answer_beside_it(server: Server, bundle: Path) -> None:
    body = (bundle / "serving/request.json").read_bytes()
    status, answer, _ = server.ask("POST", INFER, (body, {"Content-Type": JSON}))
    expected, found = json.loads((bundle / "serving/response.json").read_text()), json.loads(answer)
    assert (status, found["id"], found["model_name"]) == (200, expected["id"], expected["model_name"])
    for one, other in zip(found["outputs"], expected["outputs"], strict=True):
        assert {key: one[key] for key in ("name", "datatype", "shape")} == {
            key: other[key] for key in ("name", "datatype", "shape")
        }
        assert np.array_equal(np.float32(one["data"]), np.float32(other["data"]))


def test_requests_at_once_get_their_own_answers(server: Server, bundle: Path) -> None:
    def ask(seed: int) -> NDArray[np.float32]:
        return from_json(server.ask("POST", INFER, as_json("input", noise(2, seed=seed)))[1])

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(12)))
    for seed, answer in enumerate(answers):
        assert np.array_equal(answer, bare(bundle / "student_fp32.onnx", noise(2, seed=seed)))


def test_requests_at_once_run_in_sessions_of_their_own(bundle: Path) -> None:
    """While one request runs, the next takes another session: a slow one does not hold it up."""
    script = """
import asyncio, threading, time
from types import SimpleNamespace
import numpy as np
from export.serving.open_inference import SessionModel

met, used = threading.Barrier(2), []

class Session:
    def run(self, wanted, images):
        used.append(self)
        met.wait(30)  # two sessions at once, or it breaks
        return [images["input"]]

value = SimpleNamespace(name="input", dtype="float32", shape=(None, 1))
facts = SimpleNamespace(input=value, outputs=[SimpleNamespace(name="logits", dtype="float32", shape=(None, 1))])
given = SimpleNamespace(name="input", datatype="FP32", shape=[1, 1], as_numpy=lambda: np.ones((1, 1), np.float32))
payload = SimpleNamespace(inputs=[given], id="x", use_binary_outputs=False, request_outputs=None)

async def ask():
    model = SessionModel("small", [Session(), Session()], facts, max_batch=1)
    await asyncio.gather(*(model.predict(payload) for _ in range(4)))
    assert len(set(map(id, used[:2]))) == 2, used
    assert model.running == [0, 0]

asyncio.run(ask())
"""
    subprocess.run([PYTHON, "-c", script], cwd=ROOT, check=True)
    with served(bundle, "--instances", "2") as running, ThreadPoolExecutor(4) as pool:
        bodies = [as_json("input", noise(2, seed=seed)) for seed in range(8)]
        answers = list(pool.map(lambda body: running.ask("POST", INFER, body), bodies))
    for seed, (status, answer, _) in enumerate(answers):
        expected = bare(bundle / "student_fp32.onnx", noise(2, seed=seed))
        assert (status, from_json(answer).tobytes()) == (200, expected.tobytes())


def tensor(**changes: object) -> dict[str, object]:
    return {"name": "input", "shape": [1, 3, 16, 16], "datatype": "FP32", "data": [0.5] * 768} | changes


def request(*inputs: object, **more: object) -> Body:
    return json.dumps({"inputs": inputs, **more}).encode(), {"Content-Type": JSON}


def binary(given: dict[str, object], length: str | None = None, **more: object) -> Body:
    header = json.dumps({"inputs": [{key: given[key] for key in given if key != "data"}], **more}).encode()
    return header + bytes(3072), {"Content-Type": OCTETS, JSON_LENGTH: length or str(len(header))}


def binary_and_json() -> Body:
    header = json.dumps({"inputs": [tensor()]}).encode()
    return header + bytes(3072), {"Content-Type": OCTETS, JSON_LENGTH: str(len(header))}


SIZED = tensor(parameters={"binary_data_size": 3072})
BAD_REQUESTS: dict[str, Body] = {
    "no body": (b"", {"Content-Type": JSON}),
    "garbage": (b"\x00\xff not json", {"Content-Type": JSON}),
    "cut JSON": (b'{"inputs": [{"name"', {"Content-Type": JSON}),
    "deep JSON": (b"[" * 20_000, {"Content-Type": JSON}),
    "no object": (b"[1, 2]", {"Content-Type": JSON}),
    "a huge number": request(tensor(data=[10**400] + [0] * 767)),
    "no inputs": request(),
    "two inputs": request(tensor(), tensor()),
    "inputs of another kind": (b'{"inputs": 5}', {"Content-Type": JSON}),
    "another name": request(tensor(name="pixels")),
    "another datatype": request(tensor(datatype="INT64")),
    "an unknown datatype": request(tensor(datatype="FP31")),
    "half precision": request(tensor(datatype="FP16")),
    "a bigger image": request(tensor(shape=[1, 3, 17, 17], data=[0.5] * 867)),
    "no batch": request(tensor(shape=[3, 16, 16])),
    "batch 0": request(tensor(shape=[0, 3, 16, 16], data=[])),
    "batch -1": request(tensor(shape=[-1, 3, 16, 16])),
    "batch 9": request(tensor(shape=[9, 3, 16, 16], data=[0.5] * 768 * 9)),
    "a shape of words": request(tensor(shape=["a"])),
    "too few numbers": request(tensor(data=[0.5] * 767)),
    "too many numbers": request(tensor(data=[0.5] * 769)),
    "words for numbers": request(tensor(data=["cat"] * 768)),
    "null": request(tensor(data=[None] * 768)),
    "ragged lists": request(tensor(data=[[1, 2], [3]])),
    "not a number": request(tensor(data=[float("nan")] * 768)),
    "infinite": request(tensor(data=[1e300] * 768)),
    "an infinite answer": request(tensor(data=[3e38] * 768)),
    "an unknown output": request(tensor(), outputs=[{"name": "boxes"}]),
    "an id of another kind": request(tensor(), id=[1]),
    "an id of half a surrogate pair": request(tensor(), id="\ud800"),
    "a name of half a surrogate pair": request(tensor(name="\ud800")),
    "a datatype of half a surrogate pair": request(tensor(datatype="\ud800")),
    "an output of half a surrogate pair": request(tensor(), outputs=[{"name": "\ud800"}]),
    "binary without a length": (binary(SIZED)[0], {"Content-Type": OCTETS}),
    "binary with a word for a length": binary(SIZED, length="many"),
    "binary with a length below 0": binary(SIZED, length="-1"),
    "binary with a length beyond the body": binary(SIZED, length="99999"),
    "binary with too few bytes": binary(tensor(parameters={"binary_data_size": 3068})),
    "binary with more bytes than its parts": (binary(SIZED)[0] + bytes(4), binary(SIZED)[1]),
    "binary with a size beyond the body": binary(tensor(parameters={"binary_data_size": 3076})),
    "binary with a header of one byte more": (b" " + binary(SIZED)[0], binary(SIZED)[1]),
    "binary with numbers in JSON and after it": binary_and_json(),
    "binary with half a number": binary(tensor(parameters={"binary_data_size": 3071})),
    "binary with a size of words": binary(tensor(parameters={"binary_data_size": "all"})),
    "binary with parameters of another kind": binary(SIZED, parameters=[1]),
    "binary with an id of another kind": binary(SIZED, id=5),
    "binary with outputs of another kind": binary(SIZED, outputs=[{"name": 5, "parameters": 5}]),
    "binary with a shape of another kind": binary(SIZED | {"shape": {"a": 1}}),
    "binary with a datatype of another kind": binary(SIZED | {"datatype": 5}),
    "binary strings": binary(SIZED | {"datatype": "BYTES"}),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_answered_in_one_sentence_and_the_server_goes_on(
    server: Server, bundle: Path, case: str
) -> None:
    status, answer, _ = server.ask("POST", INFER, BAD_REQUESTS[case])
    assert 400 <= status < 500, answer
    sentence = json.loads(answer)["error"]
    assert 0 < len(sentence) <= 500
    assert "\n" not in sentence
    assert still_answers(server, bundle)


@pytest.mark.parametrize("form", [as_json, as_binary])
def test_no_damaged_request_is_the_servers_fault(
    server: Server, bundle: Path, form: Callable[[str, NDArray[np.float32]], Body]
) -> None:
    """200 requests with flipped, lost and doubled bytes in the first 150, where the fields are."""
    rng = np.random.default_rng(0)
    body, headers = form("input", noise(1))
    for _ in range(200):
        damaged = bytearray(body)
        at = int(rng.integers(150))
        match int(rng.integers(3)):
            case 0:
                damaged[at] = int(rng.integers(256))
            case 1:
                del damaged[at : at + int(rng.integers(1, 20))]
            case _:
                damaged[at:at] = damaged[at : at + int(rng.integers(1, 20))]
        status, answer, _ = server.ask("POST", INFER, (bytes(damaged), headers))
        assert status in (200, 400), (bytes(damaged[:200]), answer)
    assert still_answers(server, bundle)


def test_a_body_beyond_eight_images_is_refused_unread(server: Server, bundle: Path) -> None:
    connection = server.connect()
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Type", JSON)
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())) == (
        413,
        {"error": "the body has 1000000000000 bytes, allowed are 262144: send fewer images"},
    )
    connection.close()
    assert still_answers(server, bundle)


def test_a_body_of_unsaid_length_is_cut_off(server: Server, bundle: Path) -> None:
    connection = server.connect()
    chunks = (b"[" * 2**16 for _ in range(16))  # 1 MiB; 8 images of 768 numbers may take a quarter of it
    connection.request("POST", INFER, chunks, {"Content-Type": JSON}, encode_chunked=True)
    response = connection.getresponse()
    assert (response.status, list(json.loads(response.read()))) == (413, ["error"])
    connection.close()
    assert still_answers(server, bundle)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("POST", "/v2/models/small/versions/7/infer", 404),
        ("GET", "/v2/models/small/versions/7", 404),
        ("GET", "/v2/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/nothing", 404),
        ("GET", INFER, 405),
        ("POST", "/v2/repository/models/small/unload", 403),
        ("POST", "/v2/repository/models/other/load", 403),
    ],
)  # fmt: skip
def test_what_is_not_there_or_not_allowed_is_a_4xx(
    server: Server, bundle: Path, method: str, path: str, status: int
) -> None:
    body = as_json("input", noise(1)) if path.endswith("infer") else (b"", {})
    found, answer, _ = server.ask(method, path, body)
    assert (found, list(json.loads(answer))) == (status, ["error"])
    assert still_answers(server, bundle)


def test_another_file_is_served_by_name_and_sigterm_ends_it_cleanly(bundle: Path) -> None:
    with served(bundle, "--file", "teacher_fp32", "--max-batch", "1") as server:
        status, answer, _ = server.ask("POST", INFER, as_json("input", noise(1)))
        assert (status, server.ask("POST", INFER, as_json("input", noise(2)))[0]) == (200, 400)
        assert np.array_equal(from_json(answer), bare(bundle / "teacher_fp32.onnx", noise(1)))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""
        with pytest.raises(ConnectionRefusedError):
            server.get("/v2")


def test_ctrl_c_right_after_the_start_ends_it_cleanly(bundle: Path) -> None:
    with served(bundle) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""


def refused(process: "subprocess.Popen[str]") -> str:
    """What a process says that ends with an error."""
    shown, sentence = process.communicate(timeout=60)
    assert (process.returncode, shown, sentence.count("\n")) == (2, "", 1), sentence
    return sentence


def test_a_bundle_that_was_tampered_with_is_not_served(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    with (tmp_path / "bundle/student_fp32.onnx").open("ab") as stream:
        stream.write(b"\x00")
    assert "student_fp32.onnx: is not the file" in refused(start("export.serve", str(tmp_path / "bundle")))


def test_an_address_that_is_taken_is_one_sentence(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}: cannot listen there" in refused(start("export.serve", str(bundle), "--port", port))


def test_a_file_that_the_bundle_lacks_is_one_sentence(bundle: Path) -> None:
    sentence = refused(start("export.serve", str(bundle), "--file", "student_int4"))
    assert "--file: the bundle has teacher_fp32, student_fp32, student_fp16, got 'student_int4'" in sentence
