"""Quantize a network without training or labels: every method of calibration, of which the nearest to the float network is kept."""

import copy

import torch
from torch import Tensor, fx, nn

from compress.quant.bias_correction import corrected, float_means, images_to_correct_with
from compress.quant.calibrate import METHODS, collect, set_ranges_
from compress.quant.outliers import outliers
from compress.quant.prepare import prepare
from export.onnx_file.targets import Target

BATCH = 32
HELD_OUT = 4  # every fourth image chooses the ranges
SHOWN = "images"  # where the network keeps these images, on which its file is compared with it


@torch.no_grad()
def quantized(model: nn.Module, target: Target, images: Tensor) -> fx.GraphModule:
    """Return a copy fake-quantized for the target, calibrated on images (n, channels, height, width), its biases corrected.

    Outliers are left out. Ranges are by the method whose outputs for every fourth image have the least squared distance to the float
    network's.
    """
    whole = copy.deepcopy(model).cpu().eval()
    images = images[~outliers(whole, images.split(BATCH))]
    judged = torch.arange(len(images)) % HELD_OUT == 0
    prepared = prepare(whole, target, images[:1]).eval()
    histograms = collect(prepared, images[~judged if len(images) > 1 else judged].split(BATCH))
    few = images_to_correct_with(images.split(BATCH))
    means, wanted = float_means(prepared, few), whole(images[judged])
    found: list[tuple[float, fx.GraphModule]] = []
    for method in METHODS:
        set_ranges_(prepared, histograms, method)
        network = corrected(prepared, few, means)
        found.append((float((network(images[judged]) - wanted).square().mean()), network))
    best = min(found, key=lambda one: one[0])[1]
    best.meta[SHOWN] = images[judged]
    return best
