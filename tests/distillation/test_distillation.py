"""Distillation as a recipe asks for it: the step, the learner and its features, on plain, pruned and fake-quantized students."""

import copy
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from networks import Mobile, Outlines, Residual, lively
from planning import cuts_to
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, fx, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from compress.data.batches import Batch
from compress.distillation.features import pkt_loss
from compress.distillation.step import (
    LOSSES,
    Learner,
    StudentOutput,
    TeacherOutput,
    check_layers,
    distillation,
    online_teacher,
    weight_of,
)
from compress.distillation.taps import tap
from compress.errors import CompressError, ModelError
from compress.logs.stage_log import StageLog
from compress.pruning.plan import cut_
from compress.quant.graph.trace import trace
from compress.quant.prepare import prepare, set_phase_
from compress.recipe.losses import KD_ONLY, FeatureTerm, LogitTerm, LossTerm
from compress.recipe.stages import Fit
from compress.tasks import TASKS, evaluate
from compress.training import loop as train
from compress.training.loop import Loop, Step, fit
from export.images.preprocess import IGNORED
from export.onnx_file.targets import TARGETS

TASK, TARGET, CPU = TASKS["classification"], TARGETS["cpu_avx2"], torch.device("cpu")
IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(32) % 4
BATCH = Batch(IMAGES[:8], LABELS[:8])
EXAMPLE = torch.zeros(1, 3, 16, 16)
LAYERS = ["block1", "block2"]
LOGIT_TERMS = ["kd", "mse", "dkd", "dist", "nkd"]
FEATURE_TERMS = ["pkt", "cwd", "pkd", "review"]
PATHS = [
    "stem",
    "stem.0",
    "stem.1",
    "pool",
    "block1",
    "block1.bn1",
    "block1.bn2",
    "block1.relu",
    "block2.down",
    "block2",
]


def parse(*terms: dict[str, object]) -> tuple[LossTerm, ...]:
    return TypeAdapter(tuple[LossTerm, ...]).validate_python(terms)


def test_every_loss_of_a_recipe_has_its_row_and_every_field_its_argument() -> None:
    sections = {
        section.model_fields["name"].annotation.__args__[0]: section for section in get_args(get_args(LossTerm)[0])
    }
    assert sections.keys() == LOSSES.keys() | {"cross_entropy", "dice", "boxes"}
    own = {
        name: section.model_fields.keys() - FeatureTerm.model_fields.keys() - LogitTerm.model_fields.keys()
        for name, section in sections.items()
    }
    assert {name: set(loss.fields) for name, loss in LOSSES.items()} == {name: own[name] for name in LOSSES}
    for loss in LOSSES.values():
        assert set(loss.fields) == {
            name for name, given in signature(loss.function).parameters.items() if given.kind is given.KEYWORD_ONLY
        }


def network(width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lively(Residual(4, width), seed)


def pruned(model: nn.Module) -> nn.Module:
    """Return the model with about half of its multiply-accumulates."""
    cuts = cuts_to(model, 0.5, IMAGES.shape[-1], scope="local", round_to=4)
    cut_(model, IMAGES, cuts)
    return model


def fake_quantized(model: nn.Module) -> nn.Module:
    """Return the model on the target's grid, its ranges set by one batch."""
    prepared = prepare(model, TARGET, IMAGES)
    set_phase_(prepared.train(), "observe")
    with torch.no_grad():
        prepared(IMAGES)
    set_phase_(prepared, "adapt")
    return prepared.eval()


STUDENTS = {
    "plain": lambda: network(seed=1),
    "pruned": lambda: pruned(network(seed=1)),
    "fake-quantized": lambda: fake_quantized(network(seed=1)),
    "pruned and fake-quantized": lambda: fake_quantized(pruned(network(seed=1))),
}


def lesson(*terms: dict[str, object], student: nn.Module, teacher: nn.Module | None = None) -> tuple[Learner, Step]:
    parsed = parse(*terms)
    taught_by = online_teacher(network() if teacher is None else teacher, parsed)
    return distillation(parsed, TASK, student=student, teacher=taught_by, images=EXAMPLE, seed=0)


def batches(epoch: int) -> Iterator[Batch]:
    order = torch.randperm(32, generator=torch.Generator().manual_seed(epoch))
    for part in order.split(8):
        yield Batch(IMAGES[part], LABELS[part])


def loop(out: Path) -> Loop:
    out.mkdir(exist_ok=True)
    return Loop(
        batches=batches,
        steps_per_epoch=4,
        evaluate=lambda model: evaluate(model, [Batch(IMAGES, LABELS)], TASK),
        metric="score",
        log=StageLog(out, stage="test"),
        checkpoint=out / "checkpoint.pt",
        summary=out / "training.json",
        device=CPU,
        ranks=1,
        seed=0,
        phase="test",
    )


# The step


def test_a_step_adds_its_terms_by_weight_and_reports_each() -> None:
    learner, step = lesson(
        {"name": "cross_entropy", "weight": 0.25},
        {"name": "kd", "weight": 3.0},
        {"name": "kd", "weight": 2.0, "temperature": 4.0},
        {"name": "pkd", "layers": ["block2"], "weight": 5.0},
        student=network(seed=1),
    )
    measured = step(learner.train(), BATCH, 0.0)
    assert list(measured) == ["loss", "cross_entropy", "kd", "kd_2", "pkd"]
    expected = 0.25 * measured["cross_entropy"] + 3.0 * measured["kd"] + 2.0 * measured["kd_2"] + 5.0 * measured["pkd"]
    assert torch.allclose(measured["loss"], expected)
    assert measured["kd"] != measured["kd_2"]


def test_a_batch_in_which_no_pixel_counts_teaches_nothing() -> None:
    """A mean over no pixel would be no number, and end the training."""
    teaching, student, images = Outlines(3, width=8).eval(), Outlines(3, width=4), IMAGES[:2]
    losses: list[dict[str, object]] = [{"name": name} for name in ("cross_entropy", "dice", *LOGIT_TERMS)]
    learner, step = distillation(
        parse(*losses),
        TASKS["segmentation"],
        student=student,
        teacher=online_teacher(teaching, ()),
        images=images,
        seed=0,
    )
    measured = step(learner.train(), Batch(images, torch.full((2, 16, 16), IGNORED, dtype=torch.uint8)), 0.0)
    measured["loss"].backward()
    assert {name: value.item() for name, value in measured.items()} == dict.fromkeys(measured, 0.0)
    assert all(not parameter.grad.any() for parameter in student.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", (1, 1, 1)),
        ("linear_up", (0, 0.25, 0.5)),
        ("linear_down", (1, 0.75, 0.5)),
        ("cosine_down", (1, 0.853553, 0.5)),
    ],
)
def test_a_schedule_changes_the_weight_over_the_training(schedule: str, factors: tuple[float, ...]) -> None:
    learner, step = lesson({"name": "mse", "weight": 2.0, "schedule": schedule}, student=network(seed=1))
    for done, factor in zip((0.0, 0.25, 0.5), factors, strict=True):
        measured = step(learner.train(), BATCH, done)
        assert measured["loss"].item() == pytest.approx(2.0 * factor * measured["mse"].item(), rel=1e-5)


def test_a_warm_up_raises_the_weight_and_leaves_the_schedule_as_it_is() -> None:
    (term,) = parse({"name": "mse", "weight": 2.0, "warmup": 0.25, "schedule": "linear_down"})
    found = [weight_of(term, done) for done in (0.0, 0.125, 0.25, 0.5, 0.75)]
    assert found == pytest.approx([0.0, 2 * 0.5 * 0.875, 2 * 0.75, 2 * 0.5, 2 * 0.25])
    learner, step = lesson({"name": "mse", "weight": 2.0, "warmup": 0.5}, student=network(seed=1))
    measured = step(learner.train(), BATCH, 0.125)
    assert measured["loss"].item() == pytest.approx(2.0 * 0.25 * measured["mse"].item(), rel=1e-5)
    assert "warmup" in term.model_dump()


def test_the_teacher_does_not_run_when_no_loss_asks_for_it() -> None:
    class Forbidden(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError("the teacher ran")

    learner, step = lesson({"name": "cross_entropy"}, student=network(), teacher=Forbidden())
    assert step(learner.train(), BATCH, 0.0).keys() == {"loss", "cross_entropy"}


def test_the_teacher_stays_in_eval_mode_and_gets_no_gradient() -> None:
    teacher = network().train()
    before = copy.deepcopy(teacher.state_dict())
    learner, step = lesson({"name": "pkd", "layers": LAYERS}, {"name": "kd"}, student=network(seed=1), teacher=teacher)
    step(learner.train(), BATCH, 0.0)["loss"].backward()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values(), strict=True))


def test_logits_from_a_file_can_take_the_teachers_place() -> None:
    stored = network()(IMAGES[:8]).detach()
    learner, step = distillation(
        KD_ONLY, TASK, student=network(seed=1), teacher=lambda _: TeacherOutput(stored, {}), images=EXAMPLE, seed=0
    )
    online, online_step = lesson({"name": "kd"}, student=network(seed=1))
    assert torch.equal(step(learner.train(), BATCH, 0.0)["loss"], online_step(online.train(), BATCH, 0.0)["loss"])


@pytest.mark.parametrize("name", LOGIT_TERMS)
@pytest.mark.parametrize("standardize", [False, True])
def test_every_logit_loss_takes_mixed_targets(name: str, standardize: bool) -> None:
    mixed = Batch(BATCH.images, torch.softmax(torch.randn(8, 4), 1))
    learner, step = lesson({"name": name, "standardize": standardize}, student=network(seed=1))
    measured = step(learner.train(), mixed, 0.0)["loss"]
    measured.backward()
    gradients = [parameter.grad for parameter in learner.student.parameters()]
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients)


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_every_logit_loss_reads_logits_that_numpy_has_standardized(name: str) -> None:
    """Standardized by numpy and handed to the loss as it is, the logits give the value of `standardize: true`."""
    student, teacher = network(seed=1).train(), network()
    measured = lesson({"name": name, "standardize": True}, student=copy.deepcopy(student), teacher=teacher)
    value = measured[1](measured[0].train(), BATCH, 0.0)[name]

    def standardized(network: nn.Module) -> Tensor:
        logits = network(BATCH.images).detach().numpy()
        return torch.from_numpy((logits - logits.mean(1, keepdims=True)) / logits.std(1, ddof=1, keepdims=True))

    class Stored(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, images: Tensor) -> Tensor:
            return self.logits

    learner, step = lesson({"name": name}, student=Stored(standardized(student)), teacher=Stored(standardized(teacher)))
    assert step(learner.train(), BATCH, 0.0)[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", FEATURE_TERMS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_feature_loss_trains_every_student(name: str, student: str) -> None:
    learner, step = lesson({"name": name, "layers": LAYERS}, student=STUDENTS[student]())
    step(learner.train(), BATCH, 0.0)["loss"].backward()
    first = dict(learner.student.named_parameters())["stem.0.weight"]
    assert first.grad is not None
    assert float(first.grad.abs().max()) > 0
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in learner.adapters.parameters())


@pytest.mark.parametrize("name", FEATURE_TERMS)
@pytest.mark.parametrize("student", ["pruned", "pruned and fake-quantized"])
def test_feature_losses_fall_on_students_with_fewer_channels(name: str, student: str) -> None:
    learner, step = lesson({"name": name, "layers": LAYERS, "weight": 1.0}, student=STUDENTS[student]())
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = step(learner.train(), BATCH, 0.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_losses_stay_in_float32_under_autocast() -> None:
    student, teacher = network(seed=1), network()
    learner, step = lesson({"name": "pkt", "layers": ["block2"]}, student=student, teacher=teacher)
    with torch.autocast("cpu", torch.bfloat16):
        measured = step(learner.train(), BATCH, 0.0)["pkt"]
        answer = learner(BATCH.images)
    taught = tap(teacher, ["block2"])(BATCH.images)[1]["block2"].detach()
    assert answer.features[0][0].dtype == torch.bfloat16
    assert measured.dtype == torch.float32
    assert torch.allclose(measured, pkt_loss(answer.features[0][0].float(), taught.float()), rtol=1e-5)


# Features by module path


def on_the_grid(model: nn.Module) -> nn.Module:
    """Round the weights to the target's levels, so that fake-quantization leaves them as they are."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            shape = (-1, *[1] * (layer.weight.dim() - 1))
            scale = (layer.weight.detach().flatten(1).abs().amax(1) / TARGET.weight_scale_divisor).view(shape)
            layer.weight.data = (layer.weight.data / scale).round() * scale
    return model


def test_features_are_what_the_module_returned_also_where_the_next_writes_over_it() -> None:
    model = network()
    with torch.no_grad():
        x = model.get_submodule("stem.1")(model.get_submodule("stem.0")(IMAGES))
        assert float(x.min()) < 0  # the ReLU behind it works in place
        output, found = tap(model, ["stem.1", "stem"])(IMAGES)
    assert torch.equal(found["stem.1"], x)
    assert torch.equal(found["stem"], x.relu())
    assert torch.equal(output, model(IMAGES))


@pytest.mark.parametrize("path", PATHS)
def test_a_graphs_features_are_the_float_modules_own(path: str) -> None:
    model = on_the_grid(network())
    with torch.no_grad():
        output, found = tap(model, [path])(IMAGES)
        prepared = prepare(model, TARGET, IMAGES).eval()
        set_phase_(prepared, "observe")
        for graph in (trace(model, IMAGES), prepared):
            same_output, same = tap(graph, [path])(IMAGES)
            assert torch.allclose(same[path], found[path], atol=1e-5)
            assert torch.allclose(same_output, output, atol=1e-5)


@pytest.mark.parametrize("path", ["stem", "grouped", "project", "depth"])
def test_a_graphs_features_hold_with_other_operators_too(path: str) -> None:
    model = on_the_grid(lively(Mobile(3)))
    with torch.no_grad():
        prepared = prepare(model, TARGET, IMAGES).eval()
        set_phase_(prepared, "observe")
        assert torch.allclose(tap(prepared, [path])(IMAGES)[1][path], tap(model, [path])(IMAGES)[1][path], atol=1e-5)


def test_fake_quantized_features_are_what_the_next_layer_reads() -> None:
    prepared = fake_quantized(network())
    read: list[Tensor] = []
    handle = prepared.get_submodule("block2.conv1").register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))
    with torch.no_grad():
        output, found = tap(prepared, ["block1"])(IMAGES)
        handle.remove()
        assert torch.equal(found["block1"], read[0])
        assert torch.equal(output, prepared(IMAGES))
    assert len(found["block1"].unique()) <= 256


@pytest.mark.parametrize("make", [network, lambda: fake_quantized(network())], ids=["plain", "graph"])
def test_an_unknown_layer_is_one_sentence_with_the_nearest_name(make: object) -> None:
    with pytest.raises(ModelError, match=r"^layer 'blokc2': \w+ has no module of that path; did you mean block2\?$"):
        lesson({"name": "pkt", "layers": ["blokc2"], "teacher_layers": ["block2"]}, student=make())  # type: ignore[operator]


def test_layers_can_be_checked_before_any_training() -> None:
    terms = parse({"name": "pkt", "layers": ["block1"], "teacher_layers": ["block9"]})
    with pytest.raises(ModelError, match="layer 'block9'"):
        check_layers(terms, student=network(), teacher=network())
    check_layers(parse({"name": "pkt", "layers": ["block1"]}, {"name": "kd"}), student=network(), teacher=network())


def test_a_layer_that_returns_no_map_is_refused_where_the_loss_needs_one() -> None:
    with pytest.raises(
        CompressError,
        match=r"cwd: layer head of the student returns \(n, 4\); name one that returns \(n, channels, height",
    ):
        lesson({"name": "cwd", "layers": ["head"]}, student=network())
    lesson({"name": "pkt", "layers": ["head"]}, student=network())


def test_pairs_may_differ_in_path_channels_and_size() -> None:
    terms: dict[str, object] = {"name": "pkd", "layers": ["block1", "stem"], "teacher_layers": ["block2", "block2"]}
    learner, step = lesson(terms, student=network(width=12, seed=1))
    step(learner.train(), BATCH, 0.0)["loss"].backward()
    assert [len(layer.weight) for layer in learner.adapters[0].layers] == [32, 32]  # type: ignore[union-attr]


# The learner


@pytest.mark.parametrize("student", ["plain", "fake-quantized"])
def test_the_learner_is_the_student_in_eval_mode(student: str) -> None:
    learner, _ = lesson({"name": "review", "layers": LAYERS}, student=STUDENTS[student]())
    learner.eval()
    assert torch.equal(learner(IMAGES), learner.student(IMAGES))
    assert isinstance(learner.train()(IMAGES), StudentOutput)


@pytest.mark.parametrize("student", ["plain", "fake-quantized"])
def test_a_copy_reads_its_own_features(student: str) -> None:
    """A moving average is a copy: nothing of it may lead back to the first."""
    learner, _ = lesson({"name": "pkd", "layers": LAYERS}, student=STUDENTS[student]())
    for module in learner.modules():
        module.training = isinstance(module, Learner)  # batch-norms and ranges stay as they are
    twin = copy.deepcopy(learner)
    before = [feature.clone() for feature in twin(IMAGES).features[0]]
    for parameter in learner.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(a, b) for a, b in zip(before, twin(IMAGES).features[0], strict=True))
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not any(torch.equal(a, b) for a, b in zip(before, twin(IMAGES).features[0], strict=True))


@pytest.mark.parametrize("student", ["plain", "fake-quantized"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_lesson_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str, ema: float
) -> None:
    settings = Fit.model_validate({"epochs": 3, "batch_size": 8, "lr": 0.01, "ema_decay": ema})
    terms: Sequence[dict[str, object]] = (
        {"name": "review", "layers": LAYERS},
        {"name": "kd", "schedule": "cosine_down"},
    )
    learner, step = lesson(*terms, student=STUDENTS[student]())
    fresh = copy.deepcopy(learner)
    whole = fit(learner, step, settings, loop(tmp_path / "whole"))
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", -1.0)
    calls = 0

    def killed(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 7:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return step(model, batch, done)

    with pytest.raises(KeyboardInterrupt):
        fit(copy.deepcopy(fresh), killed, settings, loop(tmp_path / "killed"))
    again, step = lesson(*terms, student=STUDENTS[student]())  # the seed starts the adapters
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fresh.parameters(), strict=True))
    for parameter in again.parameters():
        nn.init.zeros_(parameter)  # all must come from the checkpoint
    resumed = fit(again, step, settings, loop(tmp_path / "killed"))
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(whole.adapters.parameters(), fresh.adapters.parameters(), strict=True)
    )


@pytest.mark.parametrize("student", ["plain", "fake-quantized"])
def test_adapters_are_not_part_of_the_student(tmp_path: Path, student: str) -> None:
    model = STUDENTS[student]()
    names = list(model.state_dict())
    learner, step = lesson({"name": "pkd", "layers": LAYERS}, student=model)
    trained = fit(learner, step, Fit(epochs=1, batch_size=8, ema_decay=0.9), loop(tmp_path))
    assert isinstance(trained, Learner)
    assert list(trained.student.state_dict()) == names
    assert isinstance(trained.student, fx.GraphModule) == isinstance(model, fx.GraphModule)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["plain", "fake-quantized"])
def test_a_compiled_learner_gives_the_same_gradients(student: str) -> None:
    learner, step = lesson({"name": "review", "layers": LAYERS}, {"name": "kd"}, student=STUDENTS[student]())
    twin = copy.deepcopy(learner)
    torch._dynamo.reset()
    for model in (learner.train(), torch.compile(twin.train(), backend="eager", fullgraph=True)):
        step(model, BATCH, 0.0)["loss"].backward()  # type: ignore[arg-type]
    for a, b in zip(learner.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for student in ("plain", "fake-quantized"):
        learner, step = lesson({"name": "review", "layers": LAYERS}, {"name": "kd"}, student=STUDENTS[student]())
        wrapped = DistributedDataParallel(learner.train())
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
        for index in range(3):
            share = IMAGES[rank::2].roll(index, 0)[:8], LABELS[rank::2].roll(index, 0)[:8]
            step(wrapped, Batch(*share), 0.0)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save(dict(learner.named_parameters()), f"{folder}/{student}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.acceptance
def test_two_processes_keep_one_student_and_one_set_of_adapters(tmp_path: Path) -> None:
    spawn(_rank, (str(tmp_path),), nprocs=2)
    for student in ("plain", "fake-quantized"):
        first, second = (torch.load(tmp_path / f"{student}-{rank}.pt", weights_only=True) for rank in (0, 1))
        learner, _ = lesson({"name": "review", "layers": LAYERS}, student=STUDENTS[student]())
        start = dict(learner.named_parameters())
        assert all(torch.equal(first[name], second[name]) for name in start)
        assert any(not torch.equal(first[name], start[name]) for name in start if name.startswith("adapters."))


# The recipe's sections


def test_layers_and_the_teachers_layers_go_in_pairs() -> None:
    with pytest.raises(ValidationError, match="must name one layer for each of the 2 in layers, got 1"):
        parse({"name": "pkt", "layers": LAYERS, "teacher_layers": ["block1"]})
    with pytest.raises(ValidationError, match="at least 2"):
        parse({"name": "review", "layers": ["block2"]})


def test_a_module_that_never_runs_is_refused() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.unused = network(), nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images)  # type: ignore[no-any-return]

    with pytest.raises(CompressError, match="pkt: layer unused of the student returns no tensor, or never runs"):
        lesson({"name": "pkt", "layers": ["unused"], "teacher_layers": ["block1"]}, student=Spare())
