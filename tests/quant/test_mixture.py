"""Which layers stay in float for speed: the cut against brute force, a file's segments and borders, when a file is built."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import Residual, lively

from compress.quant import mixture
from compress.quant.calibrate import calibrate_
from compress.quant.mixture import INPUT, TO_FLOAT, TO_INTEGERS, Border, borders, minimum_cut, repaired, segments
from compress.quant.prepare import deploy, groups, prepare
from compress.quant.rows import SpeedRow, TrialRow
from compress.quant.tuning import Trial, file_of
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.onnx_file.wiring import wire

INT8 = Trial("int8", "minmax")


def row(layer: str, float_ms: float, integer_ms: float) -> SpeedRow:
    return SpeedRow(layer=layer, float_ms=float_ms, integer_ms=integer_ms, in_float=False)


def cost(rows: list[SpeedRow], between: list[Border], pass_ns: float, floats: frozenset[str]) -> float:
    """The milliseconds of a choice, by the definition."""
    total = sum(one["float_ms"] if one["layer"] in floats else one["integer_ms"] for one in rows)
    for border in between:
        before, behind = border.source in floats or border.source == INPUT, border.reader in floats
        passes = TO_INTEGERS if before and not behind else TO_FLOAT if behind and not before else 0
        total += passes * pass_ns * border.elements / 1e6
    return total


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_is_the_cheapest_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [row(f"l{index}", *rng.uniform(0.01, 1, 2)) for index in range(7)]
    names = [INPUT, *(one["layer"] for one in rows)]
    between = [
        Border(names[source], names[reader], int(rng.integers(1, 2_000_000)))
        for reader in range(1, len(names))
        for source in {reader - 1, *rng.integers(0, reader, 2).tolist()}
    ]
    choices = [
        frozenset(name for name, keep in zip(names[1:], kept, strict=True) if keep)
        for kept in product((0, 1), repeat=7)
    ]
    best = min(cost(rows, between, 0.1, choice) for choice in choices)
    assert cost(rows, between, 0.1, minimum_cut(rows, between, 0.1)) == pytest.approx(best, abs=1e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float file, and the one in integers in a folder of trials."""
    folder = tmp_path_factory.mktemp("files")
    model = lively(Residual(5))
    to_onnx(model, folder / "float.onnx", shape=(3, 32, 32), metadata={})
    images = torch.randn(3, 3, 32, 32)
    prepared = prepare(model, TARGETS["cpu_avx2"], images)
    assert "block2.down.0" in groups(prepared)
    calibrate_(prepared, [images], "minmax")
    to_onnx(deploy(prepared), file_of(INT8, folder), shape=(3, 32, 32), metadata={})
    return folder / "float.onnx", folder


def test_every_layer_is_timed_in_both_files_and_every_border_has_its_size(files: tuple[Path, Path]) -> None:
    fp32, folder = files
    rows, between, pass_ns = mixture.times_of_layers(
        onnx.load(fp32), onnx.load(file_of(INT8, folder)), provider="CPUExecutionProvider", threads=1
    )
    assert [one["layer"] for one in rows] == [
        "stem.0", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.down.0", "head",
    ]  # fmt: skip
    assert all(one["float_ms"] > 0 and one["integer_ms"] > 0 for one in rows)
    assert pass_ns > 0
    assert set(between) == {
        Border(INPUT, "stem.0", 3 * 32 * 32),
        Border("stem.0", "block1.conv1", 16 * 16 * 16),
        Border("stem.0", "block1.conv2", 16 * 16 * 16),  # the residual
        Border("block1.conv1", "block1.conv2", 16 * 16 * 16),
        Border("block1.conv2", "block2.conv1", 16 * 16 * 16),
        Border("block1.conv2", "block2.down.0", 16 * 16 * 16),
        Border("block2.conv1", "block2.conv2", 32 * 8 * 8),
        Border("block2.down.0", "block2.conv2", 32 * 8 * 8),
        Border("block2.conv2", "head", 32),
    }


def test_what_follows_a_layer_is_in_its_segment(files: tuple[Path, Path]) -> None:
    file = wire(onnx.load(files[0]))
    owner = segments(file, {"stem.0", "head"})
    assert {owner[name] for name in file.nodes if name in owner} == {"stem.0", "head"}
    assert list(borders(file, owner)) == [Border(INPUT, "stem.0", 3072), Border("stem.0", "head", 32)]


@pytest.mark.parametrize(
    ("slow", "kept"),
    [({"block1.conv1": 3.0}, ("block1.conv1",)), ({"block1.conv1": 1.05}, None), ({}, None)],
    ids=["slower", "hardly slower", "nowhere"],
)
def test_a_file_is_built_with_those_layers_in_float_that_are_slower_in_integers(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, slow: dict[str, float], kept: tuple[str, ...] | None
) -> None:
    rows = [row(name, 1, slow.get(name, 0.5)) for name in ("stem.0", "block1.conv1", "block1.conv2", "head")]
    monkeypatch.setattr(
        mixture, "times_of_layers", lambda *_, **__: (rows, [Border("stem.0", "block1.conv1", 100)], 0.1)
    )
    built: list[Trial] = []

    def judge(trial: Trial) -> TrialRow:
        built.append(trial)
        return TrialRow(number_format="int8", calibration="minmax", keep_float=list(trial.keep_float), score=1, drop=0,
                        agreement=1, kl=0, latency_ratio=None, met=True)  # fmt: skip

    found, trial = repaired(INT8, *files, judge)
    assert built == ([] if kept is None else [replace(INT8, keep_float=kept)])
    assert (trial is None) == (kept is None)
    assert tuple(one["layer"] for one in found if one["in_float"]) == (kept or ())
