"""Put a network that only sleeps under every load: MILLISECONDS BATCH → the rows as JSON. Runs in `.elsewhere/serve`."""

import json
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from export.serving.scenarios import SCENARIOS, Load, run_scenario


class Sleeper:
    """What `Workers` needs of a session."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def get_inputs(self) -> list[SimpleNamespace]:
        """Return the one input."""
        return [SimpleNamespace(name="input")]

    def run(self, _: None, given: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Sleep as long for one image as for many."""
        time.sleep(self.seconds)
        return [np.zeros((len(given["input"]), 3), np.float32)]


def main(milliseconds: float, batch: int) -> None:
    """Print every scenario's row; Server at a fifth of one image a sleep."""
    rate = 1e3 / milliseconds
    rows = [
        run_scenario(
            scenario,
            Sleeper(milliseconds / 1e3),
            np.zeros((8, 3, 4, 4), np.float32),
            Load(batch, workers=1, seconds=1.0, images_per_second=rate * batch, qps=rate / 5, seed=1),
        )
        for scenario in SCENARIOS
    ]
    sys.stdout.write(json.dumps([asdict(row) for row in rows]))


main(float(sys.argv[1]), int(sys.argv[2]))
