"""What `compress check` finds beside keys and values, without torch."""

from pathlib import Path

import pytest
from names import entry, networks
from typer.testing import CliRunner

from compress.cli import app
from compress.commands.check import mistakes
from compress.errors import RecipeError
from compress.models import known
from compress.models.known import LIST, Library
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
NETWORKS = Path(__file__).parents[1] / "networks.py"
RECIPE = """
name: small
model: {arch: "torchvision:resnet18"}
stages:
  - {stage: source, fit: {epochs: 1}}
students:
  other:
    stages: [{stage: student, arch: "timm:resnet10t"}, {stage: distill, fit: {epochs: 1}}]
"""


def recipe(folder: Path, *overrides: str) -> Recipe:
    (folder / "small.yaml").write_text(RECIPE)
    return read_recipe(folder / "small.yaml", overrides)


def test_the_list_of_networks_is_that_of_the_installed_libraries() -> None:
    listed = [
        (library, version, entries) for library, version, *entries in map(str.split, LIST.read_text().splitlines())
    ]
    found = [(library, version, names) for library, version, names in networks()]
    assert [(*head, [known.partition("=")[0] for known in entries]) for *head, entries in listed] == found, (
        "renew it: make names"
    )
    for library, _, entries in listed:
        for known_entry in entries[:: max(len(entries) // 4, 1)]:
            assert entry(library, known_entry.partition("=")[0]) == known_entry, "renew it: make names"


def test_every_shipped_recipe_passes(tmp_path: Path) -> None:
    for path in (ROOT / "recipes").rglob("*.yaml"):
        if path.parent.name not in ("studies", "search"):
            assert mistakes(read_recipe(path, data=str(tmp_path))) == []


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.arch=torchvision:resnet51", "model.arch: torchvision:resnet51: torchvision has no network of this name; did you mean resnet50 or "),
        ("model.arch=cifar:resnet57", "model.arch: cifar:resnet57: there is no network for CIFAR of this name; did you mean resnet56"),
        ("students.other.student.arch=timm:resnet10T", "students.other.stages.0.arch: timm:resnet10T: timm has no model of this name; did you mean resnet10t"),
        ("model.weights=nothing.pth", "model.weights: nothing.pth: the weights file does not exist; check the path"),
        ("students.other.student.weights=HERE", "is a folder; give the file inside it"),
        ("model.weights=timm:a1_in1k", "model.weights: timm:a1_in1k: are timm's weights, but the network is torchvision:resnet18"),
        ("model.arch=nothing.py:net", "model.arch: nothing.py: the model's file does not exist; check the path"),
        (f"model.arch={NETWORKS}:smal", "networks.py defines no smal; did you mean small"),
        ("data={dataset: imagefolder, path: /no/images}", "data.path: /no/images: there is no such folder; give another with --data"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named_with_its_place(tmp_path: Path, override: str, sentence: str) -> None:
    (found,) = mistakes(recipe(tmp_path, override.replace("HERE", str(tmp_path))))
    assert sentence in found


def test_a_file_that_is_no_python_is_refused_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("raise SystemExit\ndef net(classes):\n")
    (found,) = mistakes(recipe(tmp_path, f"model.arch={tmp_path}/net.py:net"))
    assert "cannot be imported" in found


@pytest.mark.parametrize(
    "code",
    [
        "def net(n): ...",
        "class net: ...",
        "net = make",
        "from other import net",
        "from other import *",
        "import a as net",
    ],
)
def test_a_network_may_be_defined_in_any_way(tmp_path: Path, code: str) -> None:
    (tmp_path / "net.py").write_text(code)
    assert mistakes(recipe(tmp_path, f"model.arch={tmp_path}/net.py:net")) == []


def test_a_library_of_another_version_than_the_list_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Library("0.0.1", {}).is_installed("torchvision")
    monkeypatch.setattr(known, "libraries", dict)
    assert mistakes(recipe(tmp_path, "model.arch=torchvision:resnet51")) == []


def test_the_command_tells_all_mistakes_and_what_it_has_judged(tmp_path: Path) -> None:
    recipe(tmp_path)
    words = ["check", str(tmp_path / "small.yaml"), "--set", "model.arch=torchvision:resnet51", "--weights", "no.pth"]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 2)
    assert "names of networks (torchvision " in done.stdout
    assert "ok" not in done.stdout.split()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["targets.min_speedup=2"], "targets.min_speedup: a bench stage measures it: add `- stage: bench`"),
        (["students.other.targets={max_drop: 0.01}"], "students.other.targets.max_drop: a bench stage measures it"),
    ],
)  # fmt: skip
def test_a_target_that_nothing_measures_is_refused(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, *overrides)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("targets.min_int8_speedup=2", "targets.min_int8_speedup: there is no INT8 file: add `- stage: ptq`"),
        ("export.limits.max_float_layers=0", "stages.1.limits: limits an INT8 file, and there is none: add `- stage: ptq`"),
    ],
)  # fmt: skip
def test_limits_of_an_int8_file_that_is_not_made_are_refused(tmp_path: Path, override: str, sentence: str) -> None:
    stages = "stages=[{stage: source, fit: {epochs: 1}}, {stage: export}, {stage: bench}]"
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, "students={}", stages, override)
    assert sentence in str(caught.value)
    assert (
        recipe(tmp_path, "students={}", stages, "targets={min_speedup: 2, max_macs_ratio: 0.5}").targets.min_speedup
        == 2
    )
