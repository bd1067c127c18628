"""What a later stage cannot take is refused before the first training: with the stage, the person's own line, and advice that fits the recipe."""

import re
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.pipeline import run_recipe
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe

FILE = Path(__file__).with_name("refused.py")
STAGES = {
    "prune": "{stage: prune, keep_macs: 0.5}",
    "distill": "{stage: distill, fit: {epochs: 1}}",
    "ptq": "{stage: ptq, calibration_images: 32, methods: [minmax]}",
    "qat": "{stage: qat, fit: {epochs: 1, lr: 0.001}, calibration_images: 32}",
    "export": "{stage: export, verify_images: 8}",
}


def recipe(folder: Path, network: str, *stages: str, overrides: tuple[str, ...] = ()) -> Recipe:
    rows = ["{stage: source, fit: {epochs: 1}}", *(STAGES[stage] for stage in stages)]
    path = folder / "refused.yaml"
    path.write_text(
        "name: refused\ntarget: cpu_avx2\ndata: {dataset: digits, image_size: 16, limit_per_class: 4}\n"
        f'model: {{arch: "{FILE}:{network}"}}\nstages:\n' + "".join(f"  - {row}\n" for row in rows)
    )
    return read_recipe(path, [f"out={folder}", *overrides])


def run(recipe: Recipe) -> int:
    return run_recipe(recipe, trust_code=True, until=None, verbose=False, command="compress run")


def line_of(code: str) -> str:
    return f"({FILE}, line {next(number for number, line in enumerate(FILE.read_text().splitlines(), 1) if code in line)}: {code})"


REFUSED = [
    ("OnValues", ("distill", "ptq"), "ptq: OnValues: its forward cannot be one graph", "if x.max() > 10:"),
    ("OnValues", ("export",), "export: OnValues: cannot be written as ONNX", "if x.max() > 10:"),
    ("OneByOne", ("export",), "export: OneByOne: its ONNX file runs only on the number of images", None),
    ("OneByOne", ("ptq", "export"), "ptq: OneByOne: its forward cannot be one graph", None),
    ("Noisy", ("export",), "export: Noisy: its ONNX file's outputs differ from PyTorch's", None),
    ("Noisy", ("ptq", "export"), "ptq: Noisy: its graph gives other outputs than its forward", None),
    ("Bessel", ("export",), "export: Bessel: cannot be written as ONNX (No ONNX function found for", None),
    ("OnValues", ("ptq", "qat", "export"), "ptq and qat: OnValues: its forward cannot be", "if x.max() > 10:"),
]


@pytest.mark.parametrize(("network", "stages", "said", "code"), REFUSED)
def test_what_a_stage_cannot_take_is_refused_before_anything_trains(
    tmp_path: Path,
    network: str,
    stages: tuple[str, ...],
    said: str,
    code: str | None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(CompressError, match=re.escape(said)) as refused:
        run(recipe(tmp_path, network, *stages))
    message = str(refused.value)
    assert code is None or line_of(code) in message
    advice = {True: "; or leave out ptq and qat", False: "; or leave out ptq"}["qat" in stages]
    assert message.endswith(advice) == ("ptq" in stages)
    assert ("qat" in message) == ("qat" in stages)
    assert "\n" not in message
    assert list((tmp_path / "refused").glob("*source*")) + list((tmp_path / "refused").glob(".*source*")) == []
    assert "def forward" not in "".join(capfd.readouterr())  # torch prints its graph so far


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("qat.keep_float=[body.*]", "qat.keep_float: body.* matches no layer; (known: first, second, head)"),
        (
            "prune.exclude=[frist]",
            "prune.exclude: frist matches no layer; did you mean first? (known: first, second, head)",
        ),
    ],
)
def test_a_pattern_that_names_no_layer_is_refused_before_anything_trains(
    tmp_path: Path, override: str, said: str
) -> None:
    with pytest.raises(CompressError, match=re.escape(said)):
        run(recipe(tmp_path, "Plain", "prune", "ptq", "qat", overrides=(override,)))
    assert list((tmp_path / "refused").glob("*source*")) == []


@pytest.mark.parametrize(("network", "override"), [("Swapped", "seed=0"), ("Plain", "prune.exclude=[first]")])
def test_layers_that_keep_their_width_are_named_before_anything_trains(
    tmp_path: Path, network: str, override: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGES, "prune", "{stage: prune, keep_macs: 0.9}")
    found = recipe(tmp_path, network, "prune", overrides=(override,))
    run_recipe(found, trust_code=True, until="source", verbose=False, command="compress run")
    lines = [line for line in capfd.readouterr().err.splitlines() if "keep their width" in line]
    said = "prune: 1 of 3 layers keep their width, as their channels cannot be followed or reach"
    assert [line.startswith(said) and ": first; the others can be cut to " in line for line in lines] == [True] * (
        network == "Swapped"
    )


def test_a_refusal_comes_after_a_finished_teacher_too(tmp_path: Path) -> None:
    assert run(recipe(tmp_path, "OneByOne")) == 0
    with pytest.raises(CompressError, match="its forward cannot be one graph"):
        run(recipe(tmp_path, "OneByOne", "distill", "ptq"))
    assert list((tmp_path / "refused").glob("*distill*")) == []


def test_nothing_is_tried_where_nothing_will_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(recipe(tmp_path, "Shared")) == 0

    def no(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("compress.rehearsal._networks", no)
    assert run(recipe(tmp_path, "Shared", "export")) == 0


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ("keep_macs: 0.01", "keep_macs: 0.01 of the macs cannot be reached, the narrowest network has 0."),
        ("max_latency_ms: 0.00001", "max_latency_ms: 1e-05 ms cannot be reached, the narrowest network has 0."),
    ],
)
def test_a_goal_that_no_plan_reaches_is_refused_before_the_teacher_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goal: str, said: str
) -> None:
    monkeypatch.setitem(STAGES, "prune", f"{{stage: prune, {goal}}}")
    with pytest.raises(CompressError, match=re.escape(f"prune: {said}")):
        run(recipe(tmp_path, "Plain", "prune"))
    assert not list((tmp_path / "refused").glob("0*"))


def test_a_network_of_layers_that_map_several_tensors_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        CompressError, match=r"keep_macs: 0\.5 of the macs cannot be reached, as no layer can be cut: leave prune out"
    ):
        run(recipe(tmp_path, "Octave", "prune", overrides=("prune.exclude=[second]",)))
