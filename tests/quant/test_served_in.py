"""Candidates are timed where they will be served: in the CPU's provider and arithmetic that is the fastest for each."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from altered import plant
from onnx_files import classifier, save

from compress import scoring
from compress.recipe import arguments
from compress.recipe.arguments import providers_of
from compress.recipe.read import read_recipe
from export.onnx_file.targets import host_target
from export.runtime import measure as measure_module
from export.runtime.providers import PLAIN, Runtime, present


def recipe(path: Path, more: str = "") -> Any:
    return read_recipe(path, more.split())


def test_without_a_list_target_auto_takes_the_plugins_that_start_here(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ["cpu", "openvino"]
    known = present
    monkeypatch.setattr(arguments, "present", lambda asked: there if asked == "auto" else known(asked))
    assert providers_of(recipe(recipe_path)) == ["cpu", "openvino", "cuda"]
    assert providers_of(recipe(recipe_path, "target=cpu_avx2")) == ["cpu", "cuda"]
    with recipe_path.open("a") as file:
        file.write("  - {stage: export}\n  - {stage: bench, providers: [cpu]}\n")
    assert providers_of(recipe(recipe_path)) == ["cpu"]
    there.remove("openvino")
    assert providers_of(recipe(recipe_path, "stages.5.providers=auto")) == ["cpu"]


def test_a_speed_up_is_between_each_file_s_fastest_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = plant(monkeypatch, (scoring, measure_module), lambda outputs, _: outputs)
    waits = {("fp32", PLAIN): 8e-3, ("fp32", Runtime(row, "f32")): 6e-3, ("fp32", Runtime(row, "bf16")): 1e-3}
    waits |= {("int8", PLAIN): 2e-3, ("int8", Runtime(row, "f32")): 6e-3, ("int8", Runtime(row, "bf16")): 6e-3}
    files = {name: save(classifier(), tmp_path / f"{name}.onnx") for name in ("fp32", "int8")}

    def opened(path: Path, *, threads: int, runs_in: Runtime) -> tuple[str, Runtime]:
        assert threads == 1
        return path.stem, runs_in

    def bound(key: tuple[str, Runtime], _: object) -> Callable[[], None]:
        return lambda: time.sleep(waits[key])

    monkeypatch.setattr(scoring, "open_session", opened)
    monkeypatch.setattr(scoring, "bind", bound)
    monkeypatch.setattr(scoring, "LATENCY_SECONDS", 0.1)
    monkeypatch.setattr(scoring, "providers_of", lambda _: ["cpu", "other"])
    run: Any = SimpleNamespace(shape=(3, 16, 16), recipe=SimpleNamespace(seed=0))
    found = scoring.faster_than(files["fp32"], run, host_target())(files["int8"])
    assert found is not None
    assert found.high < 1, "INT8 does not pay where the float file is computed in bf16"
