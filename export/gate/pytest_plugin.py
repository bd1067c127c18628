"""The gate as a pytest plugin: a test with `@pytest.mark.compression` judges the bundle before its body runs.

pytest loads this file for every suite in the environment, so it imports only pytest until a marked test runs.
"""

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from export.gate.checks import Limits

MARKER = "compression"
DESCRIPTION = (
    "compression(max_latency_ratio=1.05, min_score_ratio=0.995, max_size_ratio=1.01): judge the bundle of --bundle against its "
    "baseline; None leaves latency or the score out"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the gate's options."""
    group = parser.getgroup("compression", "gate for compressed models")
    group.addoption("--bundle", type=Path, help="the bundle to judge; without it marked tests are skipped")
    group.addoption(
        "--baseline", type=Path, default=Path("baselines"), help="a baseline, or a folder with one for each machine"
    )
    group.addoption("--bundle-data", type=Path, help="labelled images (default: those that the baseline names)")
    group.addoption("--against-bundle", type=Path, help="time the new file beside this older bundle's")
    group.addoption("--update-baseline", action="store_true", help="record the bundle as this machine's baseline")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", DESCRIPTION)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Judge the bundle before a marked test; any verdict but pass fails the test."""
    marker = pyfuncitem.get_closest_marker(MARKER)
    if marker is not None:
        run_gate(pyfuncitem.config, marker)
    return (yield)


def run_gate(config: pytest.Config, marker: pytest.Mark) -> None:
    """Judge or record with the command line's options and the marker's limits."""
    bundle, baseline, data = (config.getoption(name) for name in ("bundle", "baseline", "bundle_data"))
    if bundle is None:
        pytest.skip("no --bundle to judge")
    from export.errors import UserError
    from export.gate.commands import judge, update
    from export.gate.latency import Plan
    from export.gate.outputs import as_text
    from export.gate.run import Terms

    try:
        terms = Terms(data, limits_of(marker), Plan())
        if config.getoption("update_baseline"):
            update(bundle, baseline, terms)
            return
        verdict = judge(bundle, baseline, terms, against=config.getoption("against_bundle"))
    except UserError as error:
        pytest.fail(f"{bundle}: {error}", pytrace=False)
    if verdict.exit_code:
        pytest.fail(as_text(verdict), pytrace=False)


def limits_of(marker: pytest.Mark) -> "Limits":
    """Return the marker's limits; fail the test for an unknown name."""
    from dataclasses import fields

    from export.gate.checks import Limits

    known = [field.name for field in fields(Limits)]
    unknown = [*map(repr, marker.args), *(name for name in marker.kwargs if name not in known)]
    if unknown:
        pytest.fail(f"@pytest.mark.{MARKER}: takes {', '.join(known)} by name, got {unknown[0]}", pytrace=False)
    return Limits(**marker.kwargs)
