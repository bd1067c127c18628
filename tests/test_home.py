"""Without a home that can be written nothing crashes, and in one that can nothing is left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from compress.logs.stage_log import quiet_libraries
quiet_libraries(False)
import export.bench
from compress.quant import neural_compressor_ptq
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.runtime.session import open_session
network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)).eval()
batches = [torch.randn(4, 3, 8, 8)]
quantized = neural_compressor_ptq.quantize(network, batches, target=TARGETS["cpu_vnni"], algorithm="minmax")
from pathlib import Path
to_onnx(quantized, Path("int8.onnx"), shape=(3, 8, 8), metadata={})
open_session(Path("int8.onnx"), threads=1)
"""


@pytest.mark.parametrize("home", ["empty", pytest.param("/proc/nowhere", marks=pytest.mark.acceptance)])
def test_nothing_needs_a_home_and_nothing_is_left_in_it(home: str, tmp_path: Path) -> None:
    """Root may write everywhere but below /proc."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "ORT_DISABLE_TELEMETRY")}
    environment["HOME"] = str(tmp_path / home)
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "empty").iterdir()) == []
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["int8.onnx"]
