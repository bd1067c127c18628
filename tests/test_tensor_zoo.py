"""Small networks of the zoo of tensors: a dict, a tuple, a hybrid and vision transformers of two packages, cut, quantized and compared by output."""

from collections.abc import Callable

import pytest
from networks import TwoHeaded
from tensor_zoo import SHARES, Pair, row_of, timm_encoder, transformer
from torch import nn

HYBRID = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}  # of convolutions, and attention in the last stage
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "outputs"),
    [
        (TwoHeaded, ["embedding", "heat"]),
        (lambda: Pair("test_resnet"), ["output_0", "output_1"]),
        (timm_encoder("fastvit_mci0", **HYBRID), ["one"]),
        (timm_encoder("vit_small_patch14_dinov2", **VIT), ["one"]),
        (transformer("Dinov2Model", **TOWER), ["last_hidden_state", "pooler_output"]),
    ],
    ids=["dict", "tuple", "hybrid", "vit", "transformer"],
)
def test_outputs_of_a_cut_network_in_int8_are_those_it_was_trained_with(
    build: Callable[[], nn.Module], outputs: list[str]
) -> None:
    if "last_hidden_state" in outputs:
        pytest.importorskip("transformers")
    row = row_of("", 32, build, timed=False)
    assert row["outputs"] == outputs
    assert row["kept"] <= max(SHARES)
    assert row["equal"]
    assert row["integer"] > row["float"]
    assert row["by_runtime"] == []  # weights that are float in the file
    for runtime, rounding in row["snr"].values():
        assert runtime > max(10.0, rounding)  # what the runtime adds is less than what rounding costs
