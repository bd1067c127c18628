"""Runs side by side: what is ranked, what is not and why, what differs in the recipes, the tables and the page."""

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from reports import CPU, CUDA, build_recipe, build_report, build_student, compared, printed, slowed, with_row
from test_report import parse

from compress.recipe.read import read_recipe
from compress.report.comparison.compare import RunComparison, compare
from compress.report.comparison.read import FinishedRun, link_to
from compress.report.comparison.recipes import differences
from compress.report.comparison.show import lines, render_comparison
from compress.report.shape import Report

EVIL = "</style><script>alert('x')</script>"


def leader(comparison: RunComparison, title: str) -> tuple[str, ...] | None:
    return next((best.names for best in comparison.best if best.title == title), None)


def cells(comparison: RunComparison, title: str) -> tuple[str, ...]:
    return next(tuple(line.cells) for line in lines(comparison) if line.title == title)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Report, Report]:
    """A large student that answers better, and one half as large and slow."""
    return build_student(tmp_path, "large", score=0.98056), build_student(tmp_path, "small", scale=0.5, score=0.95)


def test_a_candidate_is_its_run_s_deployed_file(tmp_path: Path) -> None:
    (one, _) = compared(build_student(tmp_path, "a"), build_student(tmp_path, "b")).candidates
    assert (one.file, one.score, one.images, one.agreement, one.size_mb) == ("student_int8", 0.97778, 360, 0.9944, 11.3)
    assert (one.macs_m, one.params_m, one.p50_ms, one.image_size) == (156.2, 10.88, 22.1, 224)
    assert one.recommended == "student_int8"
    assert one.speedup is not None
    assert one.speedup["ratio"] == pytest.approx(91.2 / 22.1)
    assert (one.integer_layers, one.float_layers, one.scored_in) == (53, 1, "ONNX Runtime")
    assert one.teacher.score == 0.98333
    assert one.teacher.p50_ms == pytest.approx(91.2)


def test_training_counts_the_stages_that_train_without_the_teacher_s(tmp_path: Path) -> None:
    (one, _) = compared(build_student(tmp_path, "a"), build_student(tmp_path, "b")).candidates
    distill, qat = 7.3 * 2.4**2, 7.3 * 2.4**4
    assert one.training_seconds == pytest.approx(distill + qat)


@pytest.mark.parametrize(("score", "images"), [(352 / 360, 360), (1.0, 50), (0.0, 7), (0.7561, 10_000)])
def test_the_interval_is_clopper_and_pearson_s(tmp_path: Path, score: float, images: int) -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    report = with_row(build_student(tmp_path, "a"), "student_int8", score=score, images=images)
    interval = compared(report, build_student(tmp_path, "b")).candidates[0].score_ci95
    assert interval == pytest.approx(tuple(binomtest(round(score * images), images).proportion_ci(method="exact")))


def test_the_leaders_are_named(pair: tuple[Report, Report]) -> None:
    comparison = compared(*pair)
    assert [(best.title, best.names) for best in comparison.best] == [
        ("Most accurate", ("large",)),
        ("Fastest", ("small",)),
        ("Smallest", ("small",)),
    ]
    assert comparison.speed_by == "latency"
    assert comparison.warnings == ()


def test_a_lead_says_whether_it_is_beyond_the_intervals(tmp_path: Path, pair: tuple[Report, Report]) -> None:
    notes = {best.title: best.note for best in compared(*pair).best}
    assert notes["Most accurate"] == "but the 95 % intervals overlap"
    assert notes["Fastest"] == "8.25× its teacher, beyond all other intervals"
    apart = compared(build_student(tmp_path, "a", score=0.9), build_student(tmp_path, "b", score=0.6))
    assert apart.best[0].note == "beyond all other intervals"


def test_equals_share_the_lead_and_nobody_leads_among_equals(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    twins = [build_student(tmp_path, name, scale=0.5 if name != "c" else 1.0) for name in names]
    assert leader(compared(*twins), "Smallest") == ("a", "b")
    assert compared(*twins[:2]).best == ()


@pytest.mark.parametrize("seed", range(20))
def test_the_best_trade_offs_are_those_that_nobody_beats_in_both(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    planted = {f"s{i}": (draw.choice((0.9, 0.92, 0.94, 0.96)), draw.choice((0.5, 0.7, 1.0, 1.3))) for i in range(6)}
    base = build_student(tmp_path, "base")
    reports = []
    for name, (score, scale) in planted.items():
        report = copy.deepcopy(base)
        report["recipe"]["name"] = name
        reports.append(with_row(report, "student_int8", score=score, p50_ms=22.1 * scale))
    efficient = {one.name for one in compared(*reports).candidates if one.is_efficient}
    beaten = {
        loser
        for winner, loser in itertools.permutations(planted, 2)
        if planted[winner] != planted[loser]
        and planted[winner][0] >= planted[loser][0]
        and planted[winner][1] <= planted[loser][1]
    }
    assert efficient == set(planted) - beaten


def test_other_machines_are_ranked_by_the_ratio_each_measured_within_itself(pair: tuple[Report, Report]) -> None:
    large, small = pair
    small = slowed(small, 10)
    small["environment"]["cpu"] = "Old Atom"
    comparison = compared(large, small)
    assert comparison.speed_by == "speedup"
    assert leader(comparison, "Fastest") == ("small",)
    assert comparison.warnings[0] == "The machines differ (large: AMD EPYC 7B13; small: Old Atom)."
    assert "are not comparable, only ratios" in comparison.warnings[1]


def test_on_other_machines_with_other_teachers_no_time_is_ranked(pair: tuple[Report, Report]) -> None:
    large, small = pair
    small["environment"]["cores"] = 64
    small["recipe"]["model"]["arch"] = "torchvision:resnet18"
    comparison = compared(large, small)
    assert (comparison.speed_by, leader(comparison, "Fastest")) == (None, None)
    assert {one.is_efficient for one in comparison.candidates} == {None}
    assert "The machines differ (large: 2 cores; small: 64 cores)." in comparison.warnings
    assert any(
        warning.startswith("The teachers differ (large: torchvision:resnet50") for warning in comparison.warnings
    )


def test_another_runtime_is_another_machine(pair: tuple[Report, Report]) -> None:
    pair[1]["environment"]["versions"]["onnxruntime"] = "1.15.1"
    comparison = compared(*pair)
    assert comparison.warnings[0] == "onnxruntime differs (large: 1.32.0; small: 1.15.1)."
    assert comparison.speed_by == "speedup"


@pytest.mark.parametrize(("factor", "speed_by"), [(1.04, "latency"), (1.06, "speedup"), (0.94, "speedup")])
def test_a_busy_machine_shows_in_the_teacher_s_time(pair: tuple[Report, Report], factor: float, speed_by: str) -> None:
    large, small = pair
    comparison = compared(large, slowed(small, factor))
    assert comparison.speed_by == speed_by
    assert len(comparison.warnings) == (speed_by == "speedup")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"dataset": "digits", "image_size": 64}}, "data.image_size: large: null; small: 64"),
        ({"data": {"dataset": "cifar10", "image_size": None}}, 'data.dataset: large: "digits"; small: "cifar10"'),
    ],
)
def test_top1_on_other_images_is_not_ranked(pair: tuple[Report, Report], change: dict[str, Any], sentence: str) -> None:
    large, small = pair
    small["recipe"]["data"] = small["recipe"]["data"] | change["data"]
    comparison = compared(large, small)
    assert leader(comparison, "Most accurate") is None
    assert sentence in comparison.warnings[0]
    assert {one.is_efficient for one in comparison.candidates} == {None}


def test_another_number_of_images_is_told(pair: tuple[Report, Report]) -> None:
    comparison = compared(pair[0], with_row(pair[1], "student_int8", images=1000))
    assert "large: 360 images; small: 1,000 images" in comparison.warnings[0]
    assert leader(comparison, "Most accurate") is None


def test_another_content_under_the_same_settings_is_told_by_the_digest(pair: tuple[Report, Report]) -> None:
    pair[1]["data_digest"] = "f" * 64
    comparison = compared(*pair)
    assert "the folders' contents differ" in comparison.warnings[0]
    assert leader(comparison, "Most accurate") is None


def test_other_images_without_labels_are_told_and_accuracy_is_still_ranked(pair: tuple[Report, Report]) -> None:
    for report, more in zip(pair, ("a" * 64, "b" * 64), strict=True):
        report["data_digest"] += f"-{more}"
    comparison = compared(*pair)
    assert comparison.warnings[0].startswith("The images without labels differ (data.unlabelled)")
    assert leader(comparison, "Most accurate") == ("large",)


def test_another_seed_is_a_warning_and_accuracy_is_still_ranked(pair: tuple[Report, Report]) -> None:
    pair[1]["recipe"]["seed"], pair[1]["data_digest"] = 1, "f" * 64
    comparison = compared(*pair)
    assert comparison.warnings[0].startswith("The seeds differ (large: seed 0; small: seed 1)")
    assert leader(comparison, "Most accurate") == ("large",)


def test_fewer_training_images_are_a_difference_and_no_warning(pair: tuple[Report, Report]) -> None:
    pair[1]["data_digest"] = "f" * 64
    pair[1]["recipe"]["data"] = pair[1]["recipe"]["data"] | {"limit_per_class": 20}
    comparison = compared(*pair)
    assert comparison.warnings == ()
    assert [(found.path, found.values) for found in comparison.differences] == [
        ("data.limit_per_class", ("null", "20"))
    ]


def test_the_times_are_of_the_largest_image_that_all_timed(pair: tuple[Report, Report]) -> None:
    large, small = pair
    large["deployed"] = [row for row in large["deployed"] if row["image_size"] == 32]
    comparison = compared(large, small)
    assert comparison.conditions == "CPU · 1 thread · batch 1 · 32 px"
    assert {one.image_size for one in comparison.candidates} == {32}


def test_without_a_setting_that_all_timed_no_time_is_ranked(pair: tuple[Report, Report]) -> None:
    large, small = pair
    large["deployed"] = [row for row in large["deployed"] if row["image_size"] == 32]
    small["deployed"] = [row for row in small["deployed"] if row["image_size"] == 224]
    comparison = compared(large, small)
    assert (comparison.conditions, comparison.speed_by) == (None, None)
    assert [one.image_size for one in comparison.candidates] == [32, 224]
    assert comparison.warnings == (
        "The runs were timed under different settings (large: 32 px, target cpu_avx2; small: 224 px, target cpu_avx2): times are not ranked.",
    )


def test_gpu_and_cpu_runs_meet_on_the_cpu(tmp_path: Path) -> None:
    gpu = build_report(tmp_path / "gpu", providers=(CPU, CUDA), target="tensorrt")
    gpu["recipe"]["name"] = "gpu"
    gpu["environment"] = build_student(tmp_path, "cpu")["environment"]
    comparison = compared(gpu, build_student(tmp_path / "b", "cpu"))
    assert comparison.conditions == "CPU · 1 thread · batch 1 · 224 px"


@pytest.mark.parametrize(
    "setting",
    [
        "seed=3",
        "target=tensorrt",
        "data.augment.flip=true",
        "model.reset_head=true",
        "prune.keep_macs=0.3",
        "qat.fit.epochs=7",
        "ptq.score_images=64",
        "targets.max_macs_ratio=0.5",
    ],
)
def test_a_difference_has_the_path_that_set_takes(recipe_path: Path, setting: str) -> None:
    if setting.startswith("model.reset"):
        recipe_path.write_text(
            recipe_path.read_text().replace("fit: {epochs: 1}", "fit: {epochs: 1}\n    fine_tune: true")
        )
    before, after = (read_recipe(recipe_path, overrides).model_dump(mode="json") for overrides in ((), (setting,)))
    (found,) = differences([before, after])
    path, _, value = setting.partition("=")
    assert (found.path, found.values[1]) == (path, value)


def test_names_and_folders_are_no_difference() -> None:
    recipe = build_recipe().model_dump(mode="json")
    assert list(differences([recipe, recipe | {"name": "other", "out": "/elsewhere"}])) == []


def test_losses_are_compared_by_name_and_stages_by_their_order() -> None:
    kd, dkd = {"name": "kd", "weight": 1.0, "temperature": 2.0}, {"name": "dkd", "weight": 0.5}
    first = {"stages": [{"stage": "source"}, {"stage": "distill", "loss": [kd]}]}
    second = {"stages": [{"stage": "source"}, {"stage": "distill", "loss": [dkd, {**kd, "temperature": 4.0}]}]}
    third = {"stages": [{"stage": "source"}]}
    assert [(found.path, found.values) for found in differences([first, second, third])] == [
        ("stages", ("source → distill", "source → distill", "source")),
        ("distill.loss.kd.temperature", ("2.0", "4.0", "–")),
        ("distill.loss.dkd", ("–", "weight 0.5", "–")),
    ]


def test_a_stage_that_comes_twice_is_compared_with_its_own_place() -> None:
    recipes = [{"stages": [{"stage": "prune", "keep": 1}, {"stage": "prune", "keep": keep}]} for keep in (2, 3)]
    assert [found.path for found in differences(recipes)] == ["prune_2.keep"]


def students(root: Path, count: int) -> list[Report]:
    return [
        build_student(
            root,
            f"student_number_{index}_of_the_sweep",
            scale=0.5 + 0.1 * index,
            score=0.9 + 0.005 * index,
            prune={"keep_macs": round(0.2 + 0.1 * index, 1)},
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_the_tables_fit_80_columns(tmp_path: Path, count: int) -> None:
    text = printed(compared(*students(tmp_path, count)))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "prune.keep_macs" in text


@pytest.mark.parametrize("count", [2, 4, 5, 8])
def test_no_number_is_lost_between_the_tables(tmp_path: Path, count: int) -> None:
    comparison = compared(*students(tmp_path, count))
    text = printed(comparison, width=80 if count <= 4 else 10_000)
    for line in lines(comparison):
        assert (line.title if count <= 4 or len(set(line.cells)) == 1 else line.short) in text
        assert all(cell in text for cell in line.cells)


def test_the_terminal_ends_with_what_stands_against_the_comparison(pair: tuple[Report, Report]) -> None:
    pair[1]["environment"]["cpu"] = "[red]Old Atom[/red]"
    text = printed(compared(*pair), width=400)
    assert "warning The machines differ (large: AMD EPYC 7B13; small: [red]Old Atom[/red])." in text.splitlines()


@pytest.mark.parametrize("count", [2, 4, 5, 10])
def test_the_page_is_well_formed_and_self_contained(tmp_path: Path, count: int) -> None:
    page = render_comparison(compared(*students(tmp_path, count)))
    tags = parse(page)
    assert (tags.open, tags.links) == ([], [])
    assert not tags.seen & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in page
    assert page.count("<circle") == count + 1


def test_each_student_s_page_is_linked_from_where_the_page_lies(tmp_path: Path) -> None:
    page = tmp_path / "runs/many/report/index.html"
    own = {name: tmp_path / f"runs/many/students/{name}/report/index.html" for name in ("a", "b")}
    subjects = {name: FinishedRun(build_student(tmp_path, name), link=link_to(own[name], page)) for name in own}
    text = render_comparison(compare(subjects))
    assert set(parse(text).links) == {f"../students/{name}/report/index.html" for name in own}
    assert "<title>a · b" in text


def test_a_link_is_never_a_scheme(tmp_path: Path) -> None:
    assert link_to(tmp_path / 'javascript:alert("x")', tmp_path / "page.html") == "javascript%3Aalert%28%22x%22%29"


def test_the_page_escapes_what_strangers_wrote(tmp_path: Path) -> None:
    first, second = build_student(tmp_path, "a"), build_student(tmp_path, "b")
    first["recipe"]["model"]["arch"] = first["environment"]["cpu"] = first["recipe"]["data"]["dataset"] = EVIL
    first["recipe"][EVIL] = EVIL
    page = render_comparison(compare({EVIL: FinishedRun(first, link=f'"{EVIL}'), "b": FinishedRun(second)}))
    assert "<script" not in page
    assert parse(page).open == []


def test_a_teacher_of_several_is_one_point(tmp_path: Path) -> None:
    (teacher,) = compared(*students(tmp_path, 3)).teachers
    assert len(teacher.of) == 3
