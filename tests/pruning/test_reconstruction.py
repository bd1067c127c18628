"""Recovery without training against independent computations: the layers themselves, lstsq, channels that others make."""

import copy
import math

import numpy as np
import pytest
import torch
from networks import Mobile, Residual, lively
from numpy.typing import NDArray
from planning import cuts_to
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import CompressError
from compress.pruning.plan import Cut, cut_
from compress.pruning.recovery import gradients
from compress.pruning.recovery.least_squares import RIDGES, SOLVED, layer_rows, set_weight_matrix_, solve, weight_matrix
from compress.pruning.recovery.reconstruction import (
    Method,
    kept_outputs,
    number_outputs,
    rebase_batchnorm_,
    reconstruct,
)

IMAGE = torch.zeros(1, 3, 16, 16)
LAYERS = {
    "strided": nn.Conv2d(8, 12, 3, 2, 1),
    "grouped and dilated": nn.Conv2d(8, 12, (3, 5), (2, 1), (0, 2), groups=4, dilation=2),
    "depthwise, same": nn.Conv2d(8, 8, (3, 5), padding="same", groups=8),
    "reflected": nn.Conv2d(8, 6, 5, padding=2, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(8, 12, 4, 2, 1),
    "transposed, grouped": nn.ConvTranspose2d(8, 12, 3, 2, 1, output_padding=1, groups=4, dilation=2),
    "linear": nn.Linear(11, 5),
}


def pruned(whole: nn.Module, cuts: list[Cut]) -> tuple[nn.Module, dict[str, Tensor]]:
    student, numbered = copy.deepcopy(whole), number_outputs(whole)
    cut_(student, IMAGE, cuts)
    cut_(numbered, IMAGE, cuts)
    return student, kept_outputs(numbered)


def halved(whole: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    return pruned(whole, cuts_to(whole, 0.5, IMAGE.shape[-1], round_to=4))


@torch.no_grad()
def squared(network: nn.Module, whole: nn.Module, images: Tensor) -> float:
    return float((network(images) - whole(images)).square().mean())


@torch.no_grad()
def distance(network: nn.Module, whole: nn.Module, images: Tensor) -> float:
    """Return the squared distance of the outputs as a part of their variance."""
    return squared(network, whole, images) / float(whole(images).var(0).mean())


def recovered(whole: nn.Module, images: Tensor, method: Method = "least_squares") -> tuple[nn.Module, nn.Module, str]:
    student, kept = halved(whole)
    network, chosen = reconstruct(student, whole, kept, images, method, views=images)
    return student, network, chosen


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_rows_times_weights_are_the_layers_outputs(layer: SOLVED) -> None:
    images = torch.randn(3, 8, 9, 11)
    outputs = layer(images)
    linear = isinstance(layer, nn.Linear)
    flat = outputs.flatten(1, 2) if linear else outputs.flatten(2).transpose(1, 2)  # (n, positions, outputs)
    positions = torch.stack([torch.randperm(flat.shape[1])[:7] for _ in images])
    rows, matrix = layer_rows(layer, images, positions, outputs.shape[-1]), weight_matrix(layer)
    assert layer.bias is not None
    given = torch.einsum("rgd,god->rgo", rows, matrix).flatten(1) + layer.bias
    assert torch.allclose(given, flat[torch.arange(3)[:, None], positions].flatten(0, 1), atol=1e-5)
    before = layer.weight.clone()
    set_weight_matrix_(layer, matrix.clone())
    assert torch.equal(layer.weight, before)


def ridge_by_lstsq(inputs: NDArray[np.float64], missing: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """Solve the least squares with the ridge as further rows, (inputs, outputs)."""
    delta = ridge * np.square(inputs).mean(0).sum() / inputs.shape[1] * len(inputs)
    padded = np.vstack([inputs, np.sqrt(delta) * np.eye(inputs.shape[1])])
    wanted = np.vstack([missing, np.zeros((inputs.shape[1], missing.shape[1]))])
    return np.asarray(np.linalg.lstsq(padded, wanted, rcond=None)[0])


@pytest.mark.parametrize("rows", [40, 400], ids=["fewer rows than inputs", "more rows"])
@pytest.mark.parametrize("offset", [True, False])
def test_the_solution_is_weighted_lstsqs_under_the_ridge_that_the_held_out_rows_choose(rows: int, offset: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 2, 60, generator=generator) + 0.5
    truth = torch.randn(2, 3, 60, generator=generator)
    noise = 4 * torch.randn(rows, 2, 3, generator=generator)
    missing = torch.einsum("rgd,god->rgo", inputs, truth) + noise + (2.0 if offset else 0.0)
    held_out, weights = torch.arange(rows) % 4 == 0, 0.2 + torch.rand(rows, generator=generator)
    found = solve(inputs, missing, held_out, weights, offset=offset)
    assert found is not None
    x, y, judged, w = inputs.double().numpy(), missing.double().numpy(), held_out.numpy(), weights.double().numpy()
    mean_x, mean_y = (np.average(values, axis=0, weights=w**2) * offset for values in (x, y))
    x, y = (x - mean_x) * w[:, None, None], (y - mean_y) * w[:, None, None]
    errors = [
        sum(
            np.square(y[judged, g] - x[judged, g] @ ridge_by_lstsq(x[~judged, g], y[~judged, g], ridge)).sum()
            for g in (0, 1)
        )
        for ridge in RIDGES
    ]
    for group in (0, 1):
        expected = ridge_by_lstsq(x[:, group], y[:, group], RIDGES[int(np.argmin(errors))]).T
        assert np.allclose(found[0][group].numpy(), expected, atol=1e-3)
        assert np.allclose(found[1][group].numpy(), mean_y[group] - expected @ mean_x[group], atol=1e-3)


def test_noise_is_not_fitted() -> None:
    inputs, missing = torch.randn(200, 1, 30), torch.randn(200, 1, 4)
    found = solve(inputs, missing, torch.arange(200) % 4 == 0, torch.ones(200), offset=True)
    assert found is None or float(found[0].abs().max()) < 0.2


@pytest.mark.parametrize("factory", [Residual, Mobile])
def test_kept_outputs_are_those_that_the_cut_left(factory: type[nn.Module]) -> None:
    whole = lively(factory(5))
    student, kept = halved(whole)
    before, after = whole.state_dict(), student.state_dict()
    assert any(len(numbers) < len(before[f"{name}.weight"]) for name, numbers in kept.items())
    for name in kept.keys() & {key.removesuffix(".bias") for key in before}:
        assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"][kept[name]])
    assert torch.equal(after["stem.1.running_mean"], before["stem.1.running_mean"][kept["stem.0"]])


class Upward(nn.Module):
    """A transposed and a grouped convolution, with no batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 16, 4, 2, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 5)."""
        x = torch.relu(self.grouped(torch.relu(self.up(torch.relu(self.first(x))))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_what_others_can_say_is_restored() -> None:
    """The removed half of the channels are copies of the other half, whose weights behind the transposed convolution only have to double."""
    torch.manual_seed(0)
    whole = Upward().eval()
    for tensor in (state := whole.state_dict())["first.weight"], state["first.bias"]:
        tensor[8:] = tensor[:8]
    student, kept = pruned(whole, [Cut("first", tuple(range(8, 16)))])
    network, _ = reconstruct(
        student, whole, kept, (images := torch.randn(60, 3, 16, 16)), "least_squares", views=images
    )
    fresh = torch.randn(20, 3, 16, 16)
    assert distance(student, whole, fresh) > 0.1
    assert distance(network, whole, fresh) < 1e-4


def test_groups_behind_a_transposed_convolution_are_solved_each_for_itself() -> None:
    torch.manual_seed(0)
    whole = Upward().eval()
    student, kept = pruned(whole, [Cut("up", (2, 3, 6, 7, 10, 11, 14, 15))])
    network, chosen = reconstruct(
        student, whole, kept, (images := torch.randn(200, 3, 16, 16)), "least_squares", views=images
    )
    fresh = torch.randn(40, 3, 16, 16)
    assert chosen == "least_squares"
    assert distance(network, whole, fresh) < 0.5 * distance(student, whole, fresh)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    images = F.interpolate(torch.tensor(load_digits().images[:600, None] / 8 - 1, dtype=torch.float32), 16)
    return images.expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def trained(digits: Tensor) -> nn.Module:
    torch.manual_seed(0)
    network, labels = Residual(10), torch.tensor(load_digits().target[:600])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for step in range(60):
        part = torch.arange(step * 32, step * 32 + 32) % 400
        optimizer.zero_grad()
        F.cross_entropy(network(digits[part]), labels[part]).backward()
        optimizer.step()
    return network.eval()


def test_a_trained_networks_outputs_come_back_and_each_method_beats_the_simpler(
    trained: nn.Module, digits: Tensor
) -> None:
    student, solved, chosen = recovered(trained, digits[:400])
    _, measured, simple = recovered(trained, digits[:400], "batch_norm")
    assert (chosen, simple) == ("least_squares", "batch_norm")
    cut, norms, squares = (distance(network, trained, digits[400:]) for network in (student, measured, solved))
    assert squares < 0.5 * norms < 0.5 * cut


def test_a_few_images_of_huge_outputs_do_not_decide_the_solve(trained: nn.Module, digits: Tensor) -> None:
    images = digits[:400].clone()
    images[7::40] *= 100.0  # 99 % of all squared outputs
    (_, clean, _), (_, solved, chosen) = recovered(trained, digits[:400]), recovered(trained, images)
    assert chosen == "least_squares"
    assert distance(solved, trained, digits[400:]) < 1.3 * distance(clean, trained, digits[400:])


def test_gradients_bring_the_outputs_nearer_than_the_solve_and_wreck_nothing(
    trained: nn.Module, digits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, kept = halved(trained)
    before = copy.deepcopy([student.state_dict(), trained.state_dict()])
    order = torch.randint(400, (150, 32), generator=torch.Generator().manual_seed(0))

    def by(method: Method) -> tuple[float, str]:
        batches = (digits[part] for part in order)
        network, chosen = reconstruct(student, trained, kept, digits[:400], method, views=digits, batches=batches)
        return distance(network, trained, digits[400:]), chosen

    (solve, _), (further, chosen) = by("least_squares"), by("gradients")
    assert chosen == "gradients"
    assert further < 0.95 * solve
    for state, old in zip([student.state_dict(), trained.state_dict()], before, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)
    monkeypatch.setattr(gradients, "RATE", 1.0)
    assert by("gradients") == (solve, "least_squares")


def test_the_head_is_what_lstsq_makes_of_the_students_own_features(trained: nn.Module, digits: Tensor) -> None:
    _, solved, _ = recovered(trained, digits[:200])
    used = digits[:200][torch.arange(200) % 5 != 0]  # every fifth judges
    features: list[Tensor] = []
    handle = solved.get_submodule("head").register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        solved(used)
        wanted = trained(used).double().numpy()
    handle.remove()
    x, state, cut = features[0].double().numpy(), solved.state_dict(), halved(trained)[0].state_dict()
    weight, bias = (cut[f"head.{name}"].double().numpy() for name in ("weight", "bias"))
    missing, sizes = wanted - x @ weight.T - bias, np.sqrt(np.square(wanted).mean(1))
    w = np.minimum(1.0, np.sort(sizes)[(len(sizes) - 1) // 2] / sizes)  # an image counts as the median one at most
    mean_x, mean_y = (np.average(values, axis=0, weights=w**2) for values in (x, missing))
    solutions = [
        ridge_by_lstsq((x - mean_x) * w[:, None], (missing - mean_y) * w[:, None], ridge).T for ridge in RIDGES
    ]
    distances = [float(np.abs(weight + found - state["head.weight"].numpy()).max()) for found in solutions]
    assert min(distances) < 1e-3
    found = solutions[int(np.argmin(distances))]
    assert np.allclose(bias + mean_y - found @ mean_x, state["head.bias"].numpy(), atol=1e-3)


def test_depthwise_grouped_and_joined_channels_are_solved() -> None:
    whole, images = lively(Mobile(5)), torch.randn(200, 3, 16, 16)
    student, solved, chosen = recovered(whole, images)
    fresh = torch.randn(100, 3, 16, 16)
    assert chosen == "least_squares"
    assert distance(solved, whole, fresh) < 0.5 * distance(student, whole, fresh)


def test_training_goes_on_from_the_solution(trained: nn.Module, digits: Tensor) -> None:
    """Batch-norm in training mode uses the batch's statistics: of the views that a training shows, as the solved network holds them."""
    student, kept = halved(trained)
    views = 0.5 * digits[:400] - 0.5
    solved, _ = reconstruct(student, trained, kept, digits[:400], "least_squares", views=views)
    moved = [distance(copy.deepcopy(network).train(), network, views) for network in (student, solved)]
    assert moved[1] < 1e-6 < 0.01 < moved[0]


def test_a_few_images_of_huge_outputs_do_not_decide_the_statistics_of_a_training(
    trained: nn.Module, digits: Tensor
) -> None:
    views = digits[:400].clone()
    views[7::40] *= 100.0
    rebased = copy.deepcopy(trained)
    rebase_batchnorm_(rebased, views)
    assert distance(copy.deepcopy(rebased).train(), trained, digits[:400]) < 0.01


def test_the_statistics_that_a_training_wants_change_nothing_else(trained: nn.Module, digits: Tensor) -> None:
    rebased = copy.deepcopy(trained)
    rebase_batchnorm_(rebased, 0.5 * digits[:40] - 0.5)
    assert distance(rebased, trained, digits) < 1e-9


def test_the_student_and_the_reference_stay_as_they_are(trained: nn.Module, digits: Tensor) -> None:
    student, kept = halved(trained)
    before = copy.deepcopy([student.state_dict(), trained.state_dict()])
    reconstruct(student, trained, kept, digits[:50], "least_squares", views=digits[:50])
    for state, old in zip([student.state_dict(), trained.state_dict()], before, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)


@pytest.mark.parametrize("images", [1, 2, 3, 7])
def test_few_images_make_nothing_worse(trained: nn.Module, digits: Tensor, images: int) -> None:
    student, network, _ = recovered(trained, digits[:images])
    judges = digits[:images:5]
    assert squared(network, trained, judges) <= squared(student, trained, judges)
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_dead_channels_and_equal_images_leave_finite_weights(trained: nn.Module, digits: Tensor) -> None:
    whole = copy.deepcopy(trained)
    state = whole.state_dict()
    for name in ("stem.1", "block1.bn1"):
        state[f"{name}.weight"][:3] = state[f"{name}.bias"][:3] = 0.0
        state[f"{name}.running_var"][3] = 0.0
    _, network, _ = recovered(whole, torch.cat([digits[:1].expand(40, -1, -1, -1), torch.zeros(40, 3, 16, 16)]))
    assert all(value.isfinite().all() for value in network.state_dict().values())
    assert math.isfinite(distance(network, whole, digits[400:]))


def test_a_weight_that_is_not_finite_is_named(trained: nn.Module, digits: Tensor) -> None:
    whole = copy.deepcopy(trained)
    whole.state_dict()["block1.conv1.weight"][5] = math.nan
    with pytest.raises(CompressError, match=r"^block1\.conv1: its inputs or outputs are not finite"):
        recovered(whole, digits[:40])


class Twice(nn.Module):
    """One layer that runs twice, and two that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.again, self.one, self.other = (nn.Conv2d(16, 16, 1) for _ in range(3))
        self.other.weight = self.one.weight
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 5)."""
        x = self.again(torch.relu(self.again(torch.relu(self.first(x)))))
        out: Tensor = self.head((self.one(x) + self.other(x)).mean((2, 3)))
        return out


def test_layers_that_serve_twice_stay_as_they_are() -> None:
    torch.manual_seed(0)
    whole = Twice().eval()
    student = copy.deepcopy(whole)
    student.first.weight.data[:4] = 0.0  # as if they had been cut
    kept = kept_outputs(number_outputs(whole))
    network, chosen = reconstruct(
        student, whole, kept, (images := torch.randn(100, 3, 16, 16)), "least_squares", views=images
    )
    assert chosen == "least_squares"
    before, after = whole.state_dict(), network.state_dict()
    solved = [name for name in before if name.endswith("weight") and not torch.equal(after[name], before[name])]
    assert solved == ["first.weight", "head.weight"]  # the first comes back but for the ridge
