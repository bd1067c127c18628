"""Segmentation networks: a pyramid of torchvision's parts, and segmentation-models-pytorch's."""

from collections.abc import Sequence

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.misc import Conv2dNormActivation

from compress.errors import ModelError
from compress.models.known import check_name

RESIDUAL: Sequence[str] = ("resnet18", "resnet34", "resnet50")
STAGES = ("layer1", "layer2", "layer3", "layer4")
WIDTH = 128


class SemanticPyramid(nn.Module):
    """A feature pyramid on a residual network, summed at 1/4 of the image size (Kirillov 2019, Panoptic Feature Pyramid Networks, 3.1).

    The paper upsamples each level by several convolutions; here a single one per level saves time on a CPU.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        """Take torchvision's classifier without its head."""
        super().__init__()
        widths = [_width(getattr(network, stage)[-1]) for stage in STAGES]
        self.backbone = IntermediateLayerGetter(network, {stage: stage for stage in STAGES})
        self.pyramid = FeaturePyramidNetwork(widths, WIDTH, norm_layer=nn.BatchNorm2d)
        self.mix = Conv2dNormActivation(WIDTH, WIDTH)
        self.classifier = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, classes, height, width) for images (n, c, height, width)."""
        finest, *coarser = self.pyramid(self.backbone(images)).values()
        for level in coarser:
            finest = finest + _resized(level, finest)
        return _resized(self.classifier(self.mix(finest)), images)


def _width(block: nn.Module) -> int:
    """Return the number of a residual block's output channels."""
    last = getattr(block, "bn3", None) or block.bn2
    assert isinstance(last, nn.BatchNorm2d)
    return last.num_features


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, size=like.shape[2:], mode="bilinear", align_corners=False)


def build_pyramid(backbone: str, classes: int) -> nn.Module:
    """Return a semantic pyramid with random weights on one of torchvision's residual networks."""
    check_name("fpn", backbone, RESIDUAL)
    return SemanticPyramid(torchvision.models.get_model(backbone, weights=None), classes)


def build_smp(name: str, classes: int, in_channels: int = 3) -> nn.Module:
    """Return segmentation-models-pytorch's `DECODER/ENCODER`, such as `unet/resnet18`, with random weights.

    `tu-` before an encoder's name means timm's. Raises ModelError where the package is missing, has no such network, or
    refuses the encoder.
    """
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
        raise ModelError(f"smp:{name}: cannot be built ({error}); pip install 'prune-distill-quantize[smp]'") from error
    decoder, _, encoder = name.partition("/")
    check_name("smp", decoder, smp.MODEL_ARCHITECTURES_MAPPING)
    try:
        model: nn.Module = smp.create_model(
            decoder, encoder_name=encoder, encoder_weights=None, in_channels=in_channels, classes=classes
        )
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"smp:{name}: {error.args[0]}") from error
    return model
