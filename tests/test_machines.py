"""Two agents on this machine's loopback, as torchrun starts them on two machines: one dies in the middle, the same commands go on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.acceptance
RECIPE = """
name: two
device: cpu
model: {arch: "cifar:resnet20"}
data: {limit_per_class: 40, augment: {crop: pad}}
stages:
  - stage: source
    fit: {epochs: 4, batch_size: 64, lr: 0.05}
"""
RANK = """
import os, sys
from pathlib import Path
from compress import cli
from compress.training import loop

Path(sys.argv.pop(), f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
loop.CHECKPOINT_EVERY_S = -1.0
cli.main()
"""


def machines(folder: Path, out: Path) -> list[subprocess.Popen[bytes]]:
    """Start both agents, as `make compress NODES=2 HEAD=127.0.0.1:PORT` does on each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{free.getsockname()[1]}"
    meet = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=compress", f"--rdzv-endpoint={head}", "--nproc-per-node=1"]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, "--local-addr=127.0.0.1", str(folder / "rank.py")]
    return [
        subprocess.Popen(
            [*command, "run", str(folder / "two.yaml"), "--out", str(out), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]


def end(agents: list[subprocess.Popen[bytes]]) -> list[int]:
    """Return the agents' exit codes; where one dies, the other ends within a minute by itself."""
    return [agent.wait() for agent in agents]


def checkpoints(out: Path) -> list[Path]:
    return list(out.glob("two/.*.partial/checkpoint-*.pt"))


@pytest.mark.parametrize("number", [0, 1])
def test_a_machine_that_dies_costs_no_bit(number: int, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(RECIPE)
    (tmp_path / "rank.py").write_text(RANK)
    assert end(machines(tmp_path, tmp_path / "whole")) == [0, 0]

    agents = machines(tmp_path, tmp_path / "torn")
    while not checkpoints(tmp_path / "torn"):
        assert [agent.poll() for agent in agents] == [None, None]
        time.sleep(0.05)
    agents[number].kill()
    ranks = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    (child,) = [pid for pid in ranks if parent_of(pid) != agents[1 - number].pid]
    os.kill(child, signal.SIGKILL)
    assert end(agents) != [0, 0]
    assert checkpoints(tmp_path / "torn")

    assert end(machines(tmp_path, tmp_path / "torn")) == [0, 0]
    first, second = (
        load_file(next((tmp_path / out / "two").glob("00-source-*/*.safetensors"))) for out in ("whole", "torn")
    )
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
