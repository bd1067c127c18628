"""Send a run to a sink, as two processes do of which the second goes on: `python run_sinks.py SINK FOLDER`; imports no torch."""

import json
import sys
from pathlib import Path

from compress.report.sinks import opened

sink, folder = sys.argv[1], Path(sys.argv[2])
report = {"stages": [{"stage": "source", "metrics": {"score": 0.75, "unknown": None}}]}
(folder / "report.json").write_text(json.dumps(report))
(folder / "bundle").mkdir(exist_ok=True)
(folder / "bundle" / "README.md").write_text("a card")
settings = {"seed": 3, "stages": [{"stage": "source", "fit": {"lr": 0.5}}], "many": {str(i): i for i in range(150)}}
for epochs in ((1, 2), (3,)):
    with opened([sink], "tiny", folder, settings) as sinks:
        for epoch in epochs:
            sinks.epoch("source", epoch, {"loss": 1 / epoch, "score": epoch / 4})
        if 3 in epochs:
            sinks.finish({"": folder})
