"""What the prune stage scores by."""

from pathlib import Path

import pytest
import torch
from networks import small
from torch.nn import functional as F

from compress.recipe.schema import Recipe
from compress.recipe.stages import PruneStage
from compress.run import open_run
from compress.stages.prune import _accumulate_gradients_


@pytest.mark.parametrize("images", [24, 40, 10_000])
def test_every_one_of_so_many_images_has_the_same_part_in_the_gradient(images: int) -> None:
    """Also those of the last batch, which is smaller; of fewer images than asked for, all."""
    data = {"image_size": 16, "limit_per_class": 6}
    arch = f"{Path(__file__).parents[1] / 'networks.py'}:small"
    stages = [{"stage": "source", "fit": {"epochs": 1}}]
    run = open_run(
        Recipe.model_validate({"name": "a", "data": data, "model": {"arch": arch}, "stages": stages, "device": "cpu"}),
        trust_code=True,
        verbose=False,
    )
    model = small(10).eval()
    _accumulate_gradients_(model, PruneStage(stage="prune", keep_macs=0.5, score_images=images), run)
    batches = list(run.calibration(images))
    assert sum(len(batch.targets) for batch in batches) == min(images, len(run.dataset.train))
    loss = F.cross_entropy(
        model(torch.cat([batch.images for batch in batches])), torch.cat([batch.targets for batch in batches])
    )
    for name, parameter in model.named_parameters():
        (expected,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        torch.testing.assert_close(parameter.grad, expected, msg=name)
