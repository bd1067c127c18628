"""Every architecture of the matrix through the whole chain: docs/models.md must be true."""

import pytest
from matrix import BEGIN, DOCUMENT, END, IMAGE_SIZES, KEEP_MACS, examine

QUICK = ("torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small",
         "torchvision:shufflenet_v2_x1_0", "cifar:resnet8x4")  # fmt: skip
# How many products (two in each attention) ONNX Runtime computes in float, and why; 0 for all others.
FLOAT = {
    "torchvision:swin_t": (24, "no integer kernel for matmul"),
    "timm:vit_tiny_patch16_224": (24, "no integer kernel for scaled_dot_product_attention"),
}


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch in QUICK else pytest.mark.slow) for arch in IMAGE_SIZES]
)
def test_the_chain_from_pruning_to_integers_works(arch: str) -> None:
    row = examine(arch, IMAGE_SIZES[arch])
    count, reason = FLOAT.get(arch, (0, ""))
    assert KEEP_MACS - 0.03 < row.kept_macs <= KEEP_MACS
    assert len(row.float_layers) == count, row.float_layers
    assert all(reason in row.float_reasons[name] for name in row.float_layers)
    assert row.on_grid
    assert row.first_divergence is None
    assert row.agreement >= 0.97  # at most one of 40, although random weights make much of a tie
    assert row.snr_db > max(10.0, row.rounding_snr_db)  # what the runtime adds is less than what rounding costs


def test_the_documented_table_has_a_row_for_every_architecture() -> None:
    table = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    assert [line.split("`")[1] for line in table.splitlines() if "`" in line] == list(IMAGE_SIZES)
