"""Send a run to a tracker, as two processes do of which the second goes on: `python run_trackers.py SINK FOLDER [GROUP]`; imports no torch.

The processes of the GROUP, a server's, are killed before the last epoch.
"""

import json
import os
import signal
import sys
from pathlib import Path

from compress.logs.trackers import opened

tracker, folder = sys.argv[1], Path(sys.argv[2])
report = {"stages": [{"stage": "source", "metrics": {"score": 0.75, "unknown": None}}]}
(folder / "report.json").write_text(json.dumps(report))
(folder / "bundle").mkdir(exist_ok=True)
(folder / "bundle" / "README.md").write_text("a card")
settings = {"seed": 3, "stages": [{"stage": "source", "fit": {"lr": 0.5}}], "many": {str(i): i for i in range(150)}}
for epochs in ((1, 2), (3,)):
    with opened([tracker], "tiny", folder, settings) as trackers:
        if 3 in epochs and len(sys.argv) > 3:
            os.killpg(int(sys.argv[3]), signal.SIGKILL)
        for epoch in epochs:
            trackers.epoch("source", epoch, {"loss": 1 / epoch, "score": epoch / 4})
        if 3 in epochs:
            trackers.finish({"": folder})
