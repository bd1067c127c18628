"""Go on from the solve by gradients, without labels: the cut network learns the uncut one's outputs, layer by layer and at its end.

Sources: Romero et al. 2015, FitNets (hints from inner layers); Li et al. 2021, BRECQ (outputs of the whole network, reconstructed from unlabelled images).
All layers learn together: blocks one after another gained less (docs/decisions.md).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.pruning.recovery.least_squares import image_sizes, image_weights

STEPS = 150
BATCH = 32  # images
RATE = 3e-4  # Adam's, after a twentieth of the steps; falls by half a cosine
MOST_GRADIENT = 1.0  # its norm


def approach_(
    student: nn.Module,
    reference: nn.Module,
    read: Mapping[str, tuple[str, Tensor, int]],
    batches: Iterable[Tensor],
    aligned: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Train the student in eval mode, one step for each of STEPS batches of images (n, c, h, w).

    `read` maps a layer to the module whose output counts for it (its batch-norm or itself), the channels that are left, and their dimension. The loss
    is the outputs' squared distance as a fraction of their variance: of the networks, plus the layers' mean. Where an activation works in place, its
    outputs count.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
    paths = {path for path, *_ in read.values()}
    with torch.enable_grad(), _outputs(student, paths) as mine, _outputs(reference, paths) as its:
        for step, images in enumerate(batches):
            with torch.no_grad():
                wanted = reference(images)
            outputs = student(images)
            loss = _distance(outputs, aligned(outputs.detach(), wanted) if aligned else wanted)
            layers = [_distance(mine[path], its[path].index_select(axis, kept)) for path, kept, axis in read.values()]
            (loss + torch.stack(layers).mean()).backward()
            nn.utils.clip_grad_norm_(parameters, MOST_GRADIENT)
            rate = RATE * min(1.0, 20 * (step + 1) / STEPS) * 0.5 * (1 + math.cos(math.pi * min(step / STEPS, 1.0)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _distance(outputs: Tensor, wanted: Tensor) -> Tensor:
    weights = image_weights(image_sizes(wanted)).square()
    shares = weights / weights.sum()
    variance = (wanted - wanted.flatten(1).mean(1) @ shares).square().flatten(1).mean(1) @ shares
    return ((outputs - wanted).square().flatten(1).mean(1) @ shares) / variance.clamp(min=1e-12)


@contextmanager
def _outputs(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Give a dictionary with the modules' outputs of the latest run."""
    found: dict[str, Tensor] = {}

    def keep(path: str, output: Tensor) -> None:
        found[path] = output

    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: keep(path, output))
        for path in paths
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
