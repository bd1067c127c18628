"""Recipes are read strictly, every mistake is told at once, and what is written reads back equal."""

import re
from pathlib import Path

import pytest

from compress.errors import RecipeError
from compress.recipe import strict_yaml
from compress.recipe.arguments import qat_fit
from compress.recipe.order import TAKES
from compress.recipe.read import MAX_BYTES, read_recipe, write_recipe
from compress.recipe.reference import reference
from compress.recipe.schema import Recipe
from compress.recipe.section import Section

ROOT = Path(__file__).parents[2]
SEARCHES = sorted((*ROOT.glob("recipes/studies/*.yaml"), *ROOT.glob("recipes/search/*.yaml")))
SHIPPED = sorted(set(ROOT.glob("recipes/**/*.yaml")) - set(SEARCHES))
HEAD = "name: tiny\nmodel: {arch: 'torchvision:resnet18'}\n"
SOURCE = "stages:\n- {stage: source, fit: {epochs: 1}}\n"


def read(path: Path, text: str, *overrides: str) -> Recipe:
    path.write_text(text)
    return read_recipe(path, overrides)


def mistakes(path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the path in front."""
    with pytest.raises(RecipeError) as caught:
        read(path, text, *overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


# --- shipped recipes


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads_with_data_and_its_header_says_command_time_and_expected_numbers(path: Path) -> None:
    assert read_recipe(path, data="/data/images").data.path == "/data/images"
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert [word for word in ("Command", "Time", "Expected") if word not in header] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_written_recipe_reads_back_equal(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    write_recipe(recipe, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("pixels", ["unit", "bytes"])
def test_a_written_recipe_of_pixels_without_mean_and_std_reads_back_equal(pixels: str, tmp_path: Path) -> None:
    """A run of such a detector could not be opened again: by export-data, search and everything that reads its recipe."""
    recipe = read_recipe(ROOT / "recipes" / "quickstart.yaml", [f"data.pixels={pixels}"])
    write_recipe(recipe, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml") == recipe


def fields_left_out(section: object, written: object, path: str = "") -> list[str]:
    """Return the path of every field of a section that is not in its written form."""
    if isinstance(section, Section):
        assert isinstance(written, dict)
        missing = [f"{path}.{name}" for name in type(section).model_fields if name not in written]
        return missing + [
            one for name in written for one in fields_left_out(getattr(section, name), written[name], f"{path}.{name}")
        ]
    if isinstance(section, tuple) and isinstance(written, list):
        return [one for pair in zip(section, written, strict=True) for one in fields_left_out(*pair, path)]
    if isinstance(section, dict) and isinstance(written, dict):
        return [one for name in section for one in fields_left_out(section[name], written[name], f"{path}.{name}")]
    return []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_written_recipe_spells_out_every_default(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path, data="/data/images")
    write_recipe(recipe, tmp_path / "again.yaml")
    assert fields_left_out(recipe, strict_yaml.load((tmp_path / "again.yaml").read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "1e-3",
        "no",
        "yes",
        "null",
        "~",
        "",
        "010",
        "1:30",
        "2024-01-01",
        "a: b",
        "#x",
        "<<",
        "=",
        "é\n'\"\t\\",
        "&a",
        "1_000",
        "0x10",
    ],
)
def test_any_text_reads_back_as_the_same_text(text: str) -> None:
    assert strict_yaml.load(strict_yaml.dump({"key": [text, text]})) == {"key": [text, text]}


@pytest.mark.parametrize("number", [1e-5, 5e-4, 0.1, 1e22, 1 / 3, -2.5, 0, -1, 10**17])
def test_any_number_reads_back_as_the_same_number(number: float) -> None:
    again = strict_yaml.load(strict_yaml.dump(number))
    assert (again, type(again)) == (number, type(number))


# --- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), (".5", 0.5), ("+1.", 1.0), ("-3", -3), ("true", True), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("On", "On"), ("True", "True"), ("0x10", "0x10"), ("1_000", "1_000"), ("1:30", "1:30"), (".inf", ".inf"),
        ("2024-01-01", "2024-01-01"), ("9" * 5000, "9" * 5000), ("1e999", "1e999"), ("<<", "<<"),
    ],
)  # fmt: skip
def test_plain_values_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    loaded = strict_yaml.load(text)
    assert (loaded, type(loaded)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: a\nseed: 1\nname: b", "line 3, column 1: name is given twice, first in line 1; keep one"),
        ("a: {b: 1, b: 2}", "line 1, column 11: b is given twice, first in line 1; keep one"),
        ("a: &x 1", "line 1, column 4: anchors and aliases (& and *) are not supported; repeat the value"),
        ("a: *x", "line 1, column 4: anchors and aliases (& and *) are not supported; repeat the value"),
        ("a: !!python/object/apply:os.system [id]", "line 1, column 4: the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: !!float x", "line 1, column 4: the tag tag:yaml.org,2002:float is not supported"),
        ("a:\n\t- 1", "line 2, column 1: a tab cannot indent; use spaces"),
        ("a: 1\n b: 2", "line 2, column 3: a colon is not allowed here"),
        ("a: [1,\nb", "line 2, column 2: expected ',' or ']', but got '<stream end>' while parsing a flow sequence"),
        ("a: 1\n---\nb: 1", "line 2, column 1: a second document starts"),
        ("1: a", "line 1, column 1: a key must be text"),
        ("? [a]\n: b", "line 1, column 3: a key must be text"),
        ("[" * 100_000, "line 1, column 33: nested more than 32 levels deep"),
        ("a: b\x07", "line 1: the character U+0007 is not allowed in YAML"),
    ],
)  # fmt: skip
def test_bad_yaml_is_one_sentence_with_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    (line,) = mistakes(tmp_path / "a.yaml", text)
    assert line.startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty; "),
        ("# only words\n", "is empty; "),
        ("- a", "must be a mapping of keys to values, got a list of 1; "),
    ],
)
def test_a_file_without_keys_is_no_recipe(tmp_path: Path, text: str, sentence: str) -> None:
    (line,) = mistakes(tmp_path / "a.yaml", text)
    assert line == f"{sentence}a recipe starts with `name:`, `model:` and `stages:`"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path / "a.yaml", "#" * (MAX_BYTES + 1))
    assert line.startswith("larger than 1,000,000 bytes")


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"name: \xff")
    with pytest.raises(RecipeError, match=r"a\.yaml: not UTF-8 text \(byte 6\)"):
        read_recipe(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a file"):
        read_recipe(tmp_path)


def test_a_missing_file_names_the_nearest(recipe_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tinny\.yaml: no such file; in .*: did you mean tiny\.yaml\?"):
        read_recipe(recipe_path.with_name("tinny.yaml"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file; .*nowhere holds no recipes"):
        read_recipe(tmp_path / "nowhere" / "a.yaml")


# --- the schema


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (HEAD + "stages: [{stage: source, fit: {epochs: 0}}]", "stages.0.fit.epochs: must be > 0, got 0"),
        (HEAD + "stages: [{stage: source, fit: {epochs: 2.0}}]", "stages.0.fit.epochs: must be a whole number, got 2.0"),
        (HEAD + "stages: [{stage: source, fit: {epochs: true}}]", "stages.0.fit.epochs: must be a whole number, got true"),
        (HEAD + "stages: [{stage: source, fit: {epochs: '2'}}]", "stages.0.fit.epochs: must be a whole number, got '2'"),
        (HEAD + "stages: [{stage: source, fit: {epochs: 1, lr: 1e-3x}}]", "stages.0.fit.lr: must be a number, got '1e-3x'"),
        (HEAD + "stages: [{stage: source, fit: {epochs: 1, lr: .inf}}]", "stages.0.fit.lr: must be a number, got '.inf'"),
        (
            HEAD + "stages: [{stage: source, fit: {epochs: 1, compile: no}}]",
            "stages.0.fit.compile: must be true or false, got 'no' (only true and false are booleans here)",
        ),
        (
            HEAD + "stages: [{stage: source, fit: {epochs: 1, optimizer: adam}}]",
            "stages.0.fit.optimizer: unknown value 'adam'; did you mean adamw? (known: sgd, adamw)",
        ),
        (
            HEAD + SOURCE + "- {stage: distill, fit: {epochs: 1}, loss: [{name: kd}, {name: fitnet, layers: [a]}]}",
            "stages.1.loss.1.name: fitnet was removed; use kd, or review to compare features",
        ),
        (
            HEAD + SOURCE + "- {stage: prune, keep_macs: 0.5, criterion: bn_scale}",
            "stages.1.criterion: bn_scale was removed; use l2, or obs",
        ),
        (HEAD + "stages: [{stage: source, fit: 3}]", "stages.0.fit: must be a mapping of keys to values, got 3"),
        (HEAD + "stages: [{stage: source, fit: {}}]", "stages.0.fit.epochs: missing; Passes over the training images"),
        (HEAD + "stages: []", "stages: must not be empty, got a list of 0"),
        (HEAD + "stages: {stage: source}", "stages: must be a list, got a mapping"),
        (HEAD + "stages: [source]", "stages.0: must be a mapping of keys to values, got 'source'"),
        (HEAD + "stages: [{fit: {epochs: 1}}]", "stages.0.stage: missing; one of " + ", ".join(sorted(TAKES))),
        (
            "name: a\nmodel: {arch: 'timm:resnet18.a1_in1k'}\n" + SOURCE,
            "model.arch: timm:resnet18.a1_in1k names pretrained weights, which arch does not load; "
            "give arch: timm:resnet18, and weights: timm:a1_in1k to start from them",
        ),
        (
            HEAD + "stages: [{stage: source, fit: {epochs: 1}}, {stage: student, arch: 'timm:a.b', weights: b.pt}]",
            "stages.1.arch: timm:a.b names pretrained weights, which arch does not load; "
            "give arch: timm:a, and weights: timm:b to start from them",
        ),
        (HEAD + SOURCE + "out: ''", "out: must not be empty, got ''"),
        (HEAD + SOURCE + "out: 2024", "out: must be text, got 2024; put it in quotes"),
        (HEAD + SOURCE + "schema_version: 2", "schema_version: must be 1, got 2"),
        (HEAD + SOURCE + "seed: -1", "seed: must be >= 0, got -1"),
        (HEAD + SOURCE + "seed: 2147483648", "seed: must be < 2147483648, got 2147483648"),
        (HEAD + SOURCE + "targets: null", "targets: must be a mapping of keys to values, got null"),
        (HEAD + SOURCE + "data: {std: [1, 0, 1]}", "data.std: must be > 0 in every channel, got (1.0, 0.0, 1.0)"),
        *(
            (
                HEAD + SOURCE + f"data: {given}",
                f"data.{name}: must have a number for each channel ({channels}), got {got}: set data.mean and data.std, which compress init measures",
            )
            for given, name, channels, got in [("{std: [1, 1]}", "std", 3, 2), ("{channels: 1, std: [1]}", "mean", 1, 3)]
        ),
        (HEAD + SOURCE + "data: {channels: 2}", "data.channels: must be 1, 3 or 4, got 2"),
        *(
            (
                HEAD + SOURCE + f"data: {{image_size: {size}}}",
                f"data.image_size: must be one whole number of pixels or [height, width], from 8 to 1024 each, got {got}",
            )
            for size, got in [("4", "4"), ("1.5", "1.5"), ("big", "'big'"), ("[8, 8, 8]", "a list of 3"), ("[96, -1]", "a list of 2")]
        ),
    ],
)  # fmt: skip
def test_a_mistake_names_its_place_its_value_and_the_repair(tmp_path: Path, text: str, line: str) -> None:
    assert mistakes(tmp_path / "a.yaml", text) == [line]


def test_an_unknown_key_of_a_stage_names_the_nearest_and_all(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path / "a.yaml", HEAD + SOURCE + "- {stage: prune, keep_macs: 0.5, min_kep: 0.2}")
    assert line.startswith("stages.1.min_kep: unknown key; did you mean min_keep? (known: stage, criterion, ")


def test_a_misspelt_stage_names_the_nearest_and_all(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path / "a.yaml", HEAD + SOURCE + "- {stage: pruen, keep_macs: 0.5}")
    known = "source, student, prune, distill, ptq, qat, export, bench"
    assert line == f"stages.1.stage: unknown value 'pruen'; did you mean prune? (known: {known})"


def test_a_key_of_a_loss_term_is_found_below_its_union(tmp_path: Path) -> None:
    stage = "- {stage: distill, fit: {epochs: 1}, loss: [{name: kd, temprature: 2}]}"
    (line,) = mistakes(tmp_path / "a.yaml", HEAD + SOURCE + stage)
    known = "name, weight, schedule, warmup, standardize, temperature"
    assert line == f"stages.1.loss.0.temprature: unknown key; did you mean temperature? (known: {known})"


@pytest.mark.parametrize(
    "order", ["[{stage: prune, keep_macs: 0.5}]", "[{stage: source, fit: {epochs: 1}}, {stage: bench}]"]
)
def test_an_illegal_order_says_what_the_stage_takes(tmp_path: Path, order: str) -> None:
    (line,) = mistakes(tmp_path / "a.yaml", f"{HEAD}stages: {order}")
    assert re.fullmatch(
        r"stages\.\d: (prune takes float|bench takes onnx), but .*; the usual order is source, prune, .*", line
    )


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = "nme: tiny\nseed: x\nmodel: {arch: resnet18}\nstages: [{stage: source, fit: {epochs: 0}}, {stage: pruen}]"
    lines = mistakes(tmp_path / "a.yaml", text)
    assert sorted(line.split(":")[0] for line in lines) == [
        "model.arch",
        "name",
        "nme",
        "seed",
        "stages.0.fit.epochs",
        "stages.1.stage",
    ]


def test_a_hostile_value_is_shown_short_and_printable(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path / "a.yaml", HEAD + SOURCE + f'device: "\\e[2J{"x" * 10_000}"')
    assert line.isprintable()
    assert len(line) < 300


# --- overrides and shorthands


@pytest.mark.parametrize("path", ["stages.3.fit.epochs", "stages.qat.fit.epochs", "qat.fit.epochs"])
def test_an_override_reaches_a_stage_by_position_and_by_name(recipe_path: Path, path: str) -> None:
    stage = read_recipe(recipe_path, [f"{path}=7"]).stages[3]
    assert stage.stage == "qat"
    assert stage.fit is not None
    assert stage.fit.epochs == 7


def test_an_override_makes_the_sections_on_its_way(recipe_path: Path) -> None:
    assert read_recipe(recipe_path, ["data.augment.flip=true"]).data.augment.flip


def test_an_override_takes_lists_and_later_ones_win(recipe_path: Path) -> None:
    recipe = read_recipe(recipe_path, ["prune.exclude=[a.*, b]", "seed=1", "seed=2"])
    assert (recipe.model_dump()["stages"][1]["exclude"], recipe.seed) == (("a.*", "b"), 2)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("qat.fit.epochs=0", "{path}: stages.3.fit.epochs: must be > 0, got 0"),
        ("qat.fit.epoch=1", "{path}: stages.3.fit.epoch: unknown key; did you mean epochs?"),
        ("task=clasification", "{path}: task: must be one of classification, segmentation, detection, multilabel, unlabelled, tensors, got 'clasification'"),
        ("sed=1", "--set sed=1: unknown path sed; did you mean seed?"),
        ("qta.fit=1", "--set qta.fit=1: unknown path qta.fit; did you mean qat?"),
        ("distill.fit.epochs=1", "--set distill.fit.epochs=1: the recipe has no such stage; known: "),
        ("stages.distill.fit.epochs=1", "--set stages.distill.fit.epochs=1: the recipe has no such stage; known: source, prune, ptq, qat"),
        ("stages.9.fit=1", "--set stages.9.fit=1: stages has entries 0 to 3, got 9"),
        ("name.first=1", "--set name.first=1: name is 'tiny' and has no first; set name itself"),
        ("seed", "--set seed: must be path.to.key=value"),
        ("a..b=1", "--set a..b=1: must be path.to.key=value"),
        ("seed=[1", "--set seed=[1: line 1, column 3: expected ',' or ']'"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_told_like_a_wrong_recipe(recipe_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence.format(path=recipe_path))):
        read_recipe(recipe_path, [override])


def test_a_stage_that_comes_twice_is_addressed_by_position(tmp_path: Path) -> None:
    twice = HEAD + SOURCE + "- {stage: distill, fit: {epochs: 1}}\n" * 2
    (line,) = mistakes(tmp_path / "a.yaml", twice, "distill.fit.epochs=2")
    assert line.endswith("the recipe has distill more than once; name stages.1 or stages.2")


def test_data_turns_embedded_digits_into_an_imagefolder(recipe_path: Path) -> None:
    data = read_recipe(recipe_path, data="/data/my: images #1").data
    assert (data.dataset, data.path) == ("imagefolder", "/data/my: images #1")


def test_a_path_alone_is_an_imagefolder(recipe_path: Path) -> None:
    data = read_recipe(recipe_path, ["data.path=/data/photographs"]).data
    assert (data.dataset, data.path) == ("imagefolder", "/data/photographs")


def test_a_path_for_embedded_digits_is_refused(recipe_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"data\.path: digits are built in .* got '/data': set data.dataset: imagefolder"
    ):
        read_recipe(recipe_path, ["data.dataset=digits", "data.path=/data"])


def test_data_is_the_folder_of_a_named_data_set(recipe_path: Path) -> None:
    data = read_recipe(recipe_path, ["data.dataset=cifar10"], data="/data").data
    assert (data.dataset, data.path) == ("cifar10", "/data")


def test_weights_and_out_stand_for_their_fields(recipe_path: Path) -> None:
    recipe = read_recipe(recipe_path, weights="123", out="no")
    assert recipe.model is not None
    assert (recipe.model.weights, recipe.out) == ("123", "no")


def test_a_shorthand_into_a_broken_section_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(HEAD + SOURCE + "data: images")
    with pytest.raises(RecipeError, match="data is 'images' and has no path"):
        read_recipe(path, data="/data")


# --- the reference page


def test_the_reference_page_is_current() -> None:
    renew = "sed -i '/^### Recipe$/,$d' docs/recipe.md && compress schema --markdown >> docs/recipe.md"
    assert (ROOT / "docs" / "recipe.md").read_text().endswith(reference()), f"renew it: {renew}"


def test_every_field_has_a_description() -> None:
    tables = reference().splitlines()
    assert [row for row in tables if row.startswith("| `") and row.endswith("|  |")] == []


PTQ, QAT = "- {stage: ptq}\n", "- {stage: qat}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SOURCE + QAT, "stages.1: qat needs a ptq stage before it"),
        ("stages:\n- {stage: source}\n" + PTQ + QAT, "stages.2.fit: missing, and no float training to derive it from"),
        (SOURCE + PTQ + "target: cuda\n", "target: cuda runs FP16, as ONNX Runtime's CUDA provider has no INT8 convolution: leave out ptq"),
        (SOURCE + "further_targets: [cuda]\n", "further_targets.0: "),
    ],
)  # fmt: skip
def test_int8_that_makes_no_sense_is_refused_before_anything_runs(tmp_path: Path, text: str, words: str) -> None:
    head = HEAD.replace("resnet18'", "resnet18', weights: w.pth") if "{stage: source}" in text else HEAD
    (line,) = mistakes(tmp_path / "a.yaml", head + text)
    assert line.startswith(words)


@pytest.mark.parametrize(
    ("teachers", "sentence"),
    [
        ("[onnx:a.onnx, onnx:b.onnx]", "teacher: 2 for detection, whose predictions cannot be averaged: name one"),
        ("{network: onnx:a.onnx, classes: names.txt}", "teacher.0.classes: a teacher for detection must have the data's classes"),
    ],
)  # fmt: skip
def test_detectors_are_no_ensemble_and_keep_the_order_of_their_classes(
    tmp_path: Path, teachers: str, sentence: str
) -> None:
    text = f"{HEAD}{SOURCE}task: detection\nteacher: {teachers}\n"
    (line,) = mistakes(tmp_path / "a.yaml", text)
    assert line.startswith(sentence)
    assert read(tmp_path / "b.yaml", text.replace(teachers, "onnx:a.onnx")).teacher
    for other in ("segmentation", "multilabel"):
        assert read(tmp_path / "b.yaml", text.replace("detection", other)).teacher


def test_qat_takes_a_tenth_of_the_float_epochs_and_a_hundredth_of_the_rate(tmp_path: Path) -> None:
    distill = "- {stage: distill, fit: {epochs: 24, lr: 0.02, batch_size: 32, warmup_epochs: 1}}\n"
    recipe = read(tmp_path / "a.yaml", HEAD + SOURCE + distill + PTQ + QAT)
    section = recipe.stages[-1]
    assert section.stage == "qat"
    fit = qat_fit(section, recipe)
    assert (fit.epochs, fit.batch_size, fit.warmup_epochs) == (2, 32, 0)
    assert fit.lr == pytest.approx(0.0002)


def test_qat_after_a_training_by_steps_takes_a_cosine(tmp_path: Path) -> None:
    steps = "schedule: step, milestones: [10, 20], decay_vectors: true"
    text = HEAD + SOURCE + f"- {{stage: distill, fit: {{epochs: 24, {steps}}}}}\n" + PTQ + QAT
    recipe = read(tmp_path / "a.yaml", text)
    section = recipe.stages[-1]
    assert section.stage == "qat"
    fit = qat_fit(section, recipe)
    assert (fit.epochs, fit.schedule, fit.milestones, fit.decay_vectors) == (2, "cosine", (), False)


def test_learned_ranges_do_not_decay(tmp_path: Path) -> None:
    (line,) = mistakes(
        tmp_path / "a.yaml",
        HEAD + SOURCE + PTQ + "- {stage: qat, ranges: lsq, fit: {epochs: 1, decay_vectors: true}}\n",
    )
    assert line == "stages.2.fit.decay_vectors: it would shrink the ranges that lsq learns: leave it out"
