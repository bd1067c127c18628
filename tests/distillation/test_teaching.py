"""A teacher that runs once: what is kept of its answers, when they are used, and when never."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_pipeline import recipe
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from compress.data.batches import Batch, Views
from compress.distillation import teacher as teaching
from compress.distillation.logit_cache import Layout, LogitCache
from compress.distillation.teacher import Teaching, teach
from compress.errors import CompressError
from compress.logs.stage_log import StageLog
from compress.pipeline import plan_recipe, run_recipe
from compress.recipe.schema import Recipe
from compress.recipe.stages import DistillStage, Fit
from compress.run import Run, open_run

FIT = Fit(epochs=5, batch_size=32)
CROPS = ("data.augment={crop: pad, flip: true}", "teaching.views=2")


def lesson(run: Run) -> Any:
    section = next(section for section in run.recipe.stages if isinstance(section, DistillStage))
    return section.loss


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    made = recipe(folder, *CROPS)
    assert run_recipe(made, trust_code=True, until="source", verbose=False, command="") == 0
    return folder


@pytest.fixture
def opened(trained: Path, tmp_path: Path) -> tuple[Run, Path, Path]:
    """A run with its trained teacher, in a folder of its own; the teacher's artifact; a folder for logs."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    made = recipe(tmp_path, *CROPS)
    log = tmp_path / "log"
    log.mkdir()
    return open_run(made, trust_code=True, verbose=False), plan_recipe(made)[0].directory, log


def taught(run: Run, source: Path, log: Path, fit: Fit = FIT) -> Teaching:
    with StageLog(log, stage="distill") as stage_log:
        return teach(run, source, lesson(run), fit, stage_log)


def notes(log: Path) -> list[str]:
    """What was said, but for the progress."""
    said = [json.loads(line)["note"] for line in (log / "log.jsonl").read_text().splitlines()]
    return [note for note in said if " done, " not in note]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each teacher that is loaded sees."""
    found: list[int] = []
    real = Run.teacher

    def teacher(self: Run, directory: Path) -> nn.Module:
        number, network = len(found), real(self, directory)
        found.append(0)

        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[number] += len(inputs[0])

        network.register_forward_pre_hook(count)
        return network

    monkeypatch.setattr(Run, "teacher", teacher)
    return found


def test_all_logits_survive_in_half_precision() -> None:
    layout, logits = Layout(6, 10, None), 5 * torch.randn(6, 10)
    assert layout.bytes_per_view == 6 * 10 * 2
    assert torch.equal(layout.unpack(layout.pack(logits)), logits.half().float())


def test_the_largest_logits_are_kept_and_the_rest_of_the_probability_is_spread_evenly() -> None:
    layout, logits = Layout(6, 100, 4), 3 * torch.randn(6, 100)
    assert layout.bytes_per_view == 6 * (4 * 2 + 4 * 4 + 2)
    found, expected = (F.softmax(one, dim=1) for one in (layout.unpack(layout.pack(logits)), logits))
    kept = logits.topk(4, dim=1).indices
    torch.testing.assert_close(found.gather(1, kept), expected.gather(1, kept), rtol=0.02, atol=1e-4)
    others = found.scatter(1, kept, 0)
    torch.testing.assert_close(others.sum(1), 1 - expected.gather(1, kept).sum(1), rtol=0.02, atol=1e-3)
    assert float((others.amax(1) - others.sum(1) / 96).abs().max()) < 1e-6


def test_a_view_is_there_only_once_it_is_finished(tmp_path: Path) -> None:
    cache, logits = LogitCache(tmp_path, Layout(4, 3, None)), torch.randn(4, 3).half().float()
    cache.begin(1)
    with cache.writing(1) as records:
        records[:] = cache.layout.pack(logits)
    assert not cache.has(1)
    cache.finish(1)
    assert cache.has(1)
    assert torch.equal(cache.logits(Views(torch.tensor([2, 0]), 1)), logits[[2, 0]])


def test_a_cut_off_view_is_not_there(tmp_path: Path) -> None:
    cache = LogitCache(tmp_path, Layout(4, 3, None))
    cache.begin(0)
    cache.finish(0)
    next(tmp_path.glob("view-*")).write_bytes(b"short")
    assert not cache.has(0)


def test_a_cached_teacher_says_what_the_online_one_says_on_the_same_views(opened: tuple[Run, Path, Path]) -> None:
    run, source, log = opened
    cached, network = taught(run, source, log), run.teacher(source)
    assert cached.views == 2
    for epoch in range(3):
        for batch in run.feed.training(FIT.batch_size, epoch=epoch, view=epoch % 2):
            with torch.no_grad():
                torch.testing.assert_close(cached.teacher(batch).logits, network(batch.images), rtol=2e-3, atol=2e-3)


def test_the_teacher_runs_once_for_all_stages(opened: tuple[Run, Path, Path], seen: list[int]) -> None:
    run, source, log = opened
    images = len(run.dataset.train)
    taught(run, source, log)
    probe = min(run.recipe.data.eval_batch_size, images)
    assert seen[0] == 2 * images + 2 * probe
    taught(run, source, log, FIT.model_copy(update={"epochs": 9}))
    assert seen[1] == teaching.PROBE_IMAGES
    assert len(notes(log)) == 1


def test_more_views_are_added_to_those_that_are_there(opened: tuple[Run, Path, Path], seen: list[int]) -> None:
    run, source, log = opened
    taught(run, source, log, FIT.model_copy(update={"epochs": 1}))
    taught(run, source, log)
    assert "logits for 2 views of 400 images, computed once; 1 views missing" in notes(log)[-1]


def test_the_cost_is_told_before_it_starts(opened: tuple[Run, Path, Path]) -> None:
    run, source, log = opened
    taught(run, source, log)
    size = 2 * 400 * 10 * 2 / 1e6
    assert notes(log)[0].startswith(
        f"teacher: logits for 2 views of 400 images, computed once; 2 views missing: {size:.1f} MB, about"
    )


def test_no_room_is_one_sentence_before_anything_runs(
    opened: tuple[Run, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source, log = opened
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(CompressError, match=r"the teacher's logits need .* teaching.mode: online"):
        taught(run, source, log)


def change_weights(source: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(source / "weights.safetensors")
    save_file(
        {name: value + 0.01 * (value.is_floating_point()) for name, value in state.items()},
        source / "weights.safetensors",
    )


@pytest.mark.parametrize(
    "change",
    ["data.augment.flip=false", "data.limit_per_class=30", "seed=1", "teaching.top_k=3", "data.mean=[0.4,0.4,0.4]"],
)
def test_any_change_of_what_answers_depend_on_has_a_cache_of_its_own(
    opened: tuple[Run, Path, Path], change: str
) -> None:
    run, source, log = opened
    taught(run, source, log)
    changed = open_run(recipe(Path(run.recipe.out), *CROPS, change), trust_code=True, verbose=False)
    taught(changed, source, log)
    assert len(list((Path(run.recipe.out) / "teacher-logits").iterdir())) == 2
    assert len(notes(log)) == 2


def test_another_teacher_has_a_cache_of_its_own(opened: tuple[Run, Path, Path]) -> None:
    run, source, log = opened
    taught(run, source, log)
    change_weights(source)
    cached, network = taught(run, source, log), run.teacher(source)
    batch = next(run.feed.training(FIT.batch_size, epoch=0, view=0))
    with torch.no_grad():
        torch.testing.assert_close(cached.teacher(batch).logits, network(batch.images), rtol=2e-3, atol=2e-3)


def test_answers_that_are_stale_all_the_same_are_found_and_made_again(opened: tuple[Run, Path, Path]) -> None:
    run, source, log = opened
    taught(run, source, log)
    for path in (Path(run.recipe.out) / "teacher-logits").glob("*/view-*"):
        content = bytearray(path.read_bytes())
        path.write_bytes(bytes(content[20:] + content[:20]))  # every image has its neighbour's
    cached, network = taught(run, source, log), run.teacher(source)
    assert "teacher: the cached logits are not what the network computes now; they are made again" in notes(log)
    batch = next(run.feed.training(FIT.batch_size, epoch=0, view=0))
    with torch.no_grad():
        torch.testing.assert_close(cached.teacher(batch).logits, network(batch.images), rtol=2e-3, atol=2e-3)


def test_a_recipe_may_ask_online(opened: tuple[Run, Path, Path], seen: list[int]) -> None:
    run, source, log = opened
    online = open_run(recipe(Path(run.recipe.out), *CROPS, "teaching.mode=online"), trust_code=True, verbose=False)
    found = taught(online, source, log)
    assert found.views is None
    assert seen[0] == 0
    assert not (Path(run.recipe.out) / "teacher-logits").exists()


@pytest.mark.parametrize("loss", ["[{name: pkt, layers: [block1]}, {name: kd}]", "[{name: cross_entropy}]"])
def test_losses_on_features_ask_online_and_labels_ask_nobody(
    opened: tuple[Run, Path, Path], seen: list[int], loss: str
) -> None:
    run, source, log = opened
    found = taught(
        open_run(recipe(Path(run.recipe.out), f"distill.loss={loss}"), trust_code=True, verbose=False), source, log
    )
    assert found.views is None
    assert len(seen) == ("pkt" in loss)


def test_an_image_that_could_not_be_read_has_no_answer(tmp_path: Path, opened: tuple[Run, Path, Path]) -> None:
    run, source, log = opened
    real = teaching._CachedTeacher.batches

    def without_the_first(*arguments: Any) -> Iterator[Batch]:
        for batch in real(*arguments):
            assert batch.views is not None
            kept = batch.views.indices != 0
            yield Batch(batch.images[kept], batch.targets[kept], Views(batch.views.indices[kept], batch.views.view))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching._CachedTeacher, "batches", without_the_first)
        found = taught(run, source, log)
    logits = found.teacher(Batch(torch.zeros(2, 3, 16, 16), torch.zeros(2), Views(torch.tensor([0, 1]), 0))).logits
    assert bool(logits[0].isnan().all())
    assert bool(logits[1].isfinite().all())


def _rank(rank: int, out: str, store: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    made = recipe(Path(out), *CROPS) if rank == 0 else None
    dist.barrier()
    made = made or recipe(Path(out), *CROPS)
    run = open_run(made, trust_code=True, verbose=False)
    with StageLog(Path(out), stage=f"distill{rank}", enabled=rank == 0) as log:
        teach(run, plan_recipe(made)[0].directory, lesson(run), FIT, log)
    dist.destroy_process_group()


@pytest.mark.acceptance
def test_two_ranks_answer_half_each_and_the_whole_is_the_same(opened: tuple[Run, Path, Path], tmp_path: Path) -> None:
    run, source, log = opened
    taught(run, source, log)
    cache = next((tmp_path / "teacher-logits").iterdir())
    alone = {path.name: path.read_bytes() for path in cache.glob("view-*")}
    shutil.rmtree(tmp_path / "teacher-logits")
    spawn(_rank, (str(tmp_path), str(tmp_path / "store")), nprocs=2)
    assert {path.name: path.read_bytes() for path in cache.glob("view-*")} == alone


def test_top_k_is_refused_for_losses_that_need_every_logit(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"teaching.top_k: mse in distill needs all logits"):
        recipe(tmp_path, "teaching.top_k=3", "distill.loss=[{name: mse}]")
    assert isinstance(recipe(tmp_path, "teaching.top_k=3"), Recipe)
