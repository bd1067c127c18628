"""Recover a pruned network without training or labels: solve each layer's weights so that they make up for its removed inputs.

Layers are solved in the order they run: from the inputs that the student, solved so far, gives them, to the outputs of the unpruned
network (He et al. 2017, Channel Pruning, sec. 3.2, whole-network form). The reference runs once, and its outputs are kept at some positions;
the student runs once over all images, and each layer is solved just before it runs.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.pruning.costs import one_to_one
from compress.pruning.recovery.gradients import approach_
from compress.pruning.recovery.least_squares import (
    SOLVED,
    image_sizes,
    image_weights,
    layer_rows,
    set_weight_matrix_,
    solve,
    weight_matrix,
)

ROWS = 16384  # output positions that a layer is solved from
CHUNK = 32  # images per run of the reference
CACHED = 4  # images at once of which a batch-norm's statistics are taken: more leave the processor's cache
MAX_BYTES = 4 * 2**30  # the student's activations of all images at one layer
NEGLIGIBLE = 1e-10  # fraction of the outputs' mean square that is only rounding
HELD_OUT = 4  # every fourth image chooses the ridge
OUTLIER = 6.0  # times the median image's root mean square: batch-norm's statistics leave larger images out
JUDGED = 5  # every fifth image chooses the method
Method = Literal["batch_norm", "least_squares", "gradients"]
Norm = nn.modules.batchnorm._BatchNorm


@dataclass
class Sample:
    """The reference's outputs at some positions of one layer."""

    positions: Tensor  # (images, p)
    width: int  # of the output map
    targets: list[Tensor]  # (images * p, kept outputs) in chunks
    norm: str | None  # the batch-norm right after the layer, whose mean can take the offset


def number_outputs(model: nn.Module) -> nn.Module:
    """Return a copy whose weights are their output's index, so that `kept_outputs` can read after pruning which are left."""
    numbered = copy.deepcopy(model)
    for layer in _layers(numbered).values():
        matrix = weight_matrix(layer)
        numbers = torch.arange(matrix.shape[0] * matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        set_weight_matrix_(layer, numbers.view(*matrix.shape[:2], 1).expand_as(matrix))
    return numbered


def kept_outputs(numbered: nn.Module) -> dict[str, Tensor]:
    """Return the original indices of each layer's remaining outputs, (outputs,)."""
    return {name: weight_matrix(layer)[:, :, 0].flatten().long() for name, layer in _layers(numbered).items()}


@torch.no_grad()
def reconstruct(
    student: nn.Module,
    reference: nn.Module,
    kept: Mapping[str, Tensor],
    images: Tensor,
    method: Method,
    *,
    views: Tensor,
    batches: Iterable[Tensor] = (),
    tell: Callable[[str], None] = lambda _: None,
    aligned: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[nn.Module, str]:
    """Return a copy of the student recovered by `method` or a simpler one, and the name of that method.

    `reference` is the unpruned network, `kept` the outputs of its layers that the student still has; both networks are in eval mode. Every
    fifth of the unlabelled images (n, c, h, w) chooses the method with the least squared distance to the reference's outputs, so that no
    method makes the network worse. `views` are augmented views as training will show them; after least squares, batch-norms take their
    statistics from these. `aligned` lays the second outputs in the order of the first's. `batches` of views, one for each step, train the
    solved network on under `gradients`. Raises CompressError if a value is not finite.
    """
    order, norms, _ = _survey(reference, images[:1])
    order = [name for name in order if name in kept]  # the others were removed with their residual block
    judged = torch.arange(len(images), device=images.device) % JUDGED == 0
    candidates = {"none": student}
    if len(images) > 1:
        candidates["batch_norm"] = copy.deepcopy(student)
        estimate_batchnorm_(candidates["batch_norm"], images[~judged])
    if len(images) > 1 and method in {"least_squares", "gradients"}:
        candidates["least_squares"] = copy.deepcopy(student)
        samples = _sample(reference, order, norms, kept, images[~judged])
        solve_layers_(candidates["least_squares"], samples, images[~judged], tell)
    if len(images) > 1 and method == "gradients":
        network = candidates["gradients"] = copy.deepcopy(candidates["least_squares"])
        last = {name: -1 if isinstance(layer, nn.Linear) else 1 for name, layer in _layers(student).items()}
        read = {name: (norms.get(name, name), kept[name].to(images.device), last[name]) for name in order}
        approach_(network, reference, read, batches, aligned)
    wanted = reference(images[judged])
    found = {name: network(images[judged]) for name, network in candidates.items()}
    weights = image_weights(image_sizes(wanted)).square()
    distances = {
        name: float((one - (aligned(one, wanted) if aligned else wanted)).square().flatten(1).mean(1) @ weights)
        for name, one in found.items()
    }
    best = min(distances, key=lambda name: distances[name] if math.isfinite(distances[name]) else math.inf)
    if best in {"least_squares", "gradients"}:
        rebase_batchnorm_(candidates[best], views)
    return candidates[best], best


@torch.no_grad()
def affordable_images(reference: nn.Module, image: Tensor) -> int:
    """Return how many images like `image` (1, c, h, w) `reconstruct` may take: two layers' activations of them all fit into MAX_BYTES."""
    _, _, largest = _survey(reference, image)
    return max(JUDGED, MAX_BYTES // (8 * largest))  # a layer's and a shortcut's, 4 bytes per value


@torch.no_grad()
def solve_layers_(
    student: nn.Module, samples: dict[str, Sample], images: Tensor, tell: Callable[[str], None] = lambda _: None
) -> None:
    """Run the student over all images, and solve each layer in place just before it runs."""
    layers, norms = {layer: name for name, layer in _layers(student).items() if name in samples}, _norms(student)

    def solve_(layer: SOLVED, inputs: tuple[Tensor, ...]) -> None:
        sample = samples.pop(layers[layer])
        tell(f"solves layer {len(layers) - len(samples)} of {len(layers)}")
        _solve_(layers[layer], layer, None if sample.norm is None else norms[sample.norm], sample, inputs[0])

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32's ten bits are too few for second moments
    try:
        _run_with(student, images, dict.fromkeys(layers, solve_))
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def rebase_batchnorm_(student: nn.Module, images: Tensor) -> None:
    """Set batch-norm statistics to the inputs' mean and variance over `images` (n, c, h, w), without changing the function in eval mode.

    Training mode uses the batch's statistics, so training on such images starts at the function that eval mode computes.
    """
    _run_with(student, images, {norm: _own_statistics_ for norm in _norms(student).values() if norm.affine})


@torch.no_grad()
def estimate_batchnorm_(student: nn.Module, images: Tensor) -> None:
    """Set every batch-norm's statistics to its inputs' mean and variance over `images` (n, c, h, w), in the order they run in eval mode.

    Images whose inputs are many times the usual are left out. Source: Wu & Johnson 2021 (Rethinking "Batch" in BatchNorm, section 3).
    """
    training = student.training
    _run_with(student.eval(), images, dict.fromkeys(_norms(student).values(), _take_statistics_))
    student.train(training)


def has_statistics(model: nn.Module) -> bool:
    """Tell whether a network has batch-norms with running statistics."""
    return bool(_norms(model))


def _layers(model: nn.Module) -> dict[str, SOLVED]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SOLVED)}


def _norms(model: nn.Module) -> dict[str, Norm]:
    """Return the batch-norms that have running statistics, by name."""
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, Norm) and module.running_mean is not None}


def _run_with(model: nn.Module, images: Tensor, before: Mapping[nn.Module, Callable[..., None]]) -> None:
    """Run a network once, calling each module's hook in `before` just before the module runs."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in before.items()]
    try:
        model(images.contiguous(memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()


def _survey(model: nn.Module, image: Tensor) -> tuple[list[str], dict[str, str], int]:
    """Return the layers that run once and share no weights, each one's batch-norm, and the most inputs plus outputs of a layer."""
    layers: dict[nn.Module, str] = {layer: name for name, layer in _layers(model).items()}
    norms: dict[nn.Module, str] = {norm: name for name, norm in _norms(model).items()}
    calls: dict[str, int] = {}
    behind: dict[str, str] = {}
    outputs: dict[int, tuple[str, Tensor]] = {}  # by id; keeping the tensor keeps its id unique
    largest = 1

    def note_layer(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        if (tensors := one_to_one(inputs, output)) is not None:
            calls[layers[module]] = calls.get(layers[module], 0) + 1
            outputs[id(output)] = (layers[module], tensors[1])
            largest = max(largest, tensors[0].numel() + tensors[1].numel())

    def note_norm(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if inputs and id(inputs[0]) in outputs:
            behind[outputs[id(inputs[0])][0]] = norms[module]

    handles = [module.register_forward_hook(note_layer) for module in layers]
    handles += [norm.register_forward_hook(note_norm) for norm in norms]
    model(image)
    for handle in handles:
        handle.remove()
    own = _layers(model)
    users = Counter(id(layer.weight) for layer in own.values())
    order = [name for name, layer in own.items() if calls.get(name) == 1 and users[id(layer.weight)] == 1]
    return order, behind, largest


def _sample(
    reference: nn.Module, order: Sequence[str], norms: Mapping[str, str], kept: Mapping[str, Tensor], images: Tensor
) -> dict[str, Sample]:
    """Run the reference over the images and keep its outputs at random positions, the same number for each image."""
    samples: dict[str, Sample] = {}
    start = 0

    def keep(name: str, linear: bool, output: Tensor, count: int) -> None:
        flat = output.reshape(count, -1, output.shape[-1]) if linear else output.permute(0, 2, 3, 1).flatten(1, 2)
        if name not in samples:
            generator = torch.Generator().manual_seed(order.index(name))
            positions = _positions(len(images), flat.shape[1], generator).to(output.device)
            samples[name] = Sample(positions, flat.shape[1] if linear else output.shape[-1], [], norms.get(name))
        positions = samples[name].positions[start : start + count]
        rows = flat[torch.arange(count, device=output.device)[:, None], positions].flatten(0, 1)
        samples[name].targets.append(rows[:, kept[name].to(rows.device)])

    handles = []
    for name in order:

        def after(layer: nn.Module, _: object, output: Tensor, name: str = name) -> None:
            keep(name, isinstance(layer, nn.Linear), output, min(CHUNK, len(images) - start))

        handles.append(reference.get_submodule(name).register_forward_hook(after))
    for part in images.split(CHUNK):
        reference(part)
        start += len(part)
    for handle in handles:
        handle.remove()
    return samples


def _positions(images: int, size: int, generator: torch.Generator) -> Tensor:
    """Return random positions (images, p) below `size`, one from each of p equal parts of the map."""
    count = min(size, -(-ROWS // images))
    draws = (torch.arange(count) + torch.rand(images, count, generator=generator)) * (size / count)
    return draws.long().clamp(max=size - 1)


def _solve_(name: str, layer: SOLVED, norm: Norm | None, sample: Sample, inputs: Tensor) -> None:
    """Add the least-squares correction to a layer's weights, and the offset to its bias or its batch-norm's mean."""
    rows = layer_rows(layer, inputs, sample.positions, sample.width)  # (rows, groups, d)
    matrix = weight_matrix(layer)
    given = (rows.transpose(0, 1) @ matrix.transpose(1, 2)).transpose(0, 1)
    if layer.bias is not None:
        given = given + layer.bias.view(given.shape[1:])
    targets = torch.cat(sample.targets).view_as(given)
    missing = targets - given
    if not bool(missing.isfinite().all()):
        raise CompressError(
            f"{name}: its inputs or outputs are not finite, so its weights cannot be solved for: check the network's weights and the images"
        )
    if float(missing.square().mean()) <= NEGLIGIBLE * float(targets.square().mean()):
        return
    per_image = sample.positions.shape[1]
    held_out = torch.arange(len(rows), device=rows.device) // per_image % HELD_OUT == 0
    weights = image_weights(image_sizes(targets.unflatten(0, (-1, per_image)))).repeat_interleave(per_image)
    found = solve(rows, missing, held_out, weights, offset=layer.bias is not None or norm is not None)
    if found is None:
        return
    correction, shift = found
    set_weight_matrix_(layer, matrix + correction)
    if layer.bias is not None:
        layer.bias.add_(shift.flatten())
    elif norm is not None and norm.running_mean is not None:
        norm.running_mean.sub_(shift.flatten())


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel in each image, both (n, channels), of values (n, channels, positions)."""
    values = values.float()
    means = values.mean(2, keepdim=True)
    return means[..., 0], (values - means).square_().mean(2)


def _own_statistics_(norm: Norm, inputs: tuple[Tensor, ...]) -> None:
    """Set a batch-norm's statistics to its inputs', and adapt scale and shift so that it computes the same."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, scale = norm.running_mean.clone(), norm.weight / (norm.running_var + norm.eps).sqrt()
    _take_statistics_(norm, inputs)
    norm.bias.add_(scale * (norm.running_mean - mean))
    norm.weight.copy_(scale * (norm.running_var + norm.eps).sqrt())


def _take_statistics_(norm: Norm, inputs: tuple[Tensor, ...]) -> None:
    """Set a batch-norm's statistics to variance and mean of each channel over the images that are no outliers."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    values = inputs[0].flatten(2) if inputs[0].ndim > 2 else inputs[0][..., None]
    means, variances = (torch.cat(found) for found in zip(*map(_moments, values.split(CACHED)), strict=True))
    sizes = (variances + means.square()).mean(1).sqrt()
    usual = ~(sizes > OUTLIER * sizes.median())  # with values that are not finite, all
    norm.running_mean.copy_(means[usual].mean(0))
    norm.running_var.copy_(variances[usual].mean(0) + means[usual].var(0, correction=0))
