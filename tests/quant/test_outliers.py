"""A few images of outlying values set no range."""

from collections.abc import Sequence

import pytest
import torch
from networks import Mobile, lively
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quant.outliers import outliers, without
from compress.quant.post_training import quantized
from export.onnx_file.targets import TARGETS


def shown(n: int, blown_up: Sequence[int] = (), times: float = 100.0) -> Tensor:
    images = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[list(blown_up)] *= times
    return images


class Windows(nn.Module):
    """A layer that sees each image as four windows, and one of a fixed number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.prompt = nn.Linear(3, 4), nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return (n, 4)."""
        windows = F.avg_pool2d(images, 8).permute(0, 2, 3, 1).reshape(-1, 3)
        out: Tensor = self.window(windows).reshape(len(images), 4, 4).mean(1) + self.prompt(torch.ones(1, 2)).sum()
        return out


@pytest.mark.parametrize("network", [lively(Mobile(4)), Windows()])
@pytest.mark.parametrize("blown_up", [[], [3], [0, 17, 39]])
def test_images_that_blow_a_network_up_are_found_in_any_batches(network: nn.Module, blown_up: list[int]) -> None:
    images = shown(64, blown_up)
    for size in (64, 24, 7):
        assert outliers(network, images.split(size)).nonzero().flatten().tolist() == blown_up
    kept = torch.cat([*without(images.split(7), outliers(network, images.split(24)))])
    assert torch.equal(kept, images[[n for n in range(64) if n not in blown_up]])


@pytest.mark.parametrize(
    "images", [shown(64, range(5)), shown(64, [3], times=4), shown(7, [3]), torch.zeros(16, 3, 16, 16)]
)
def test_what_many_images_do_is_usual_and_so_are_few_images(images: Tensor) -> None:
    assert not outliers(lively(Mobile(4)), images.split(16)).any()


def test_a_layer_that_one_image_alone_wakes_is_no_reason() -> None:
    """Eleven of its layers see the same in every image, and the last one sees something in one of them alone."""
    plain = nn.Sequential(*[nn.Conv2d(3, 3, 1, bias=False) for _ in range(11)])
    for layer in plain:
        assert isinstance(layer, nn.Conv2d)
        layer.weight.data = torch.eye(3)[..., None, None]
    images = shown(64).clamp(-1, 1)
    images[5, 0, 0, 0] = 2
    assert not outliers(nn.Sequential(plain, nn.Threshold(1.99, 0.001), nn.Conv2d(3, 3, 1)), images.split(16)).any()


def test_one_image_does_not_ruin_the_ranges_of_all_others() -> None:
    torch.manual_seed(0)
    network = lively(Mobile(4))
    images = shown(64, [6], times=1000)
    usual = torch.arange(64) != 6
    with torch.no_grad():
        wanted = network(images[usual])
        found = quantized(network, TARGETS["cpu_vnni"], images)(images[usual])
        alone = quantized(network, TARGETS["cpu_vnni"], images[usual])(images[usual])
    assert torch.equal(found, alone)
    assert float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()) < 0.02
