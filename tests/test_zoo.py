"""Networks through the whole chain: one always, and a tenth of those of docs/models.md, chosen anew by the date."""

import random
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import timm
from chain import KEEP_MACS, examine
from zoo import BEGIN, DOCUMENT, END

from export.tasks.detection import DETECTION

LARGEST, DEEPEST = 64, 60  # pixels and layers: others take over ten seconds each
BUDGET = 10  # processor seconds after which no further network starts


def documented() -> dict[str, tuple[int, int]]:
    """Return the image size and the layers of each network of docs/models.md that goes through whole."""
    table = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:]] for line in table.splitlines() if line.startswith("| `")]
    return {row[0]: (int(row[1]), int(row[3].rpartition(" ")[2])) for row in rows if row[1].isdigit()}


def chosen_today() -> list[str]:
    small = sorted(arch for arch, (size, layers) in documented().items() if size <= LARGEST and layers <= DEEPEST)
    return random.Random(datetime.now(UTC).date().toordinal()).sample(small, len(documented()) // 10)


def test_a_network_goes_from_pruning_to_integers() -> None:
    row = examine("cifar:resnet8x4", 32)
    assert not row.float_layers
    assert not row.float_products
    assert row.on_grid
    assert row.first_divergence is None
    assert row.kept_macs <= KEEP_MACS
    assert row.agreement >= 0.97  # at most one of 40, although random weights make much of a tie
    assert row.snr_db > max(10.0, row.rounding_snr_db)  # what the runtime adds is less than what rounding costs


@pytest.mark.parametrize(("name", "ends"), [pytest.param("retinanet", 2, marks=pytest.mark.acceptance), ("fcos", 3)])
def test_a_detector_goes_through_with_its_last_convolutions_in_float(name: str, ends: int) -> None:
    row = examine(f"{Path(__file__).with_name('networks.py')}:{name}", 48, DETECTION)
    assert {row.float_reasons[layer] for layer in row.float_layers} == {"its output leaves the network"}
    assert len(row.float_layers) == 2 * ends  # on each of two levels
    assert row.on_grid
    assert row.first_divergence is None
    assert row.kept_macs <= KEEP_MACS
    assert row.agreement >= 0.98
    assert row.snr_db > max(10.0, row.rounding_snr_db)


@pytest.fixture(scope="module")
def started() -> float:
    return time.process_time()


@pytest.mark.slow
@pytest.mark.parametrize("arch", chosen_today())
def test_a_tenth_of_the_documented_networks_goes_through_today(arch: str, started: float) -> None:
    if time.process_time() - started > BUDGET:
        pytest.skip(f"today's {BUDGET} seconds are spent")
    row = examine(arch, documented()[arch][0])
    assert row.on_grid
    assert row.first_divergence is None
    assert row.kept_macs < 1 or row.not_pruned  # to 60 %, or as far as it goes
    assert not row.float_layers


def test_the_documented_networks_are_in_the_libraries() -> None:
    assert len(documented()) > 20
    names = [arch.removeprefix("timm:") for arch in documented() if arch.startswith("timm:")]
    assert set(names) <= set(timm.list_models())
