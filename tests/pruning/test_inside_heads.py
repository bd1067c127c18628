"""Dimensions inside heads: the same function before a cut, the least error after it, and what is saved comes back."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from planning import options_of
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import compress
from compress.errors import CompressError
from compress.models.saved import Architecture, load_float, save_network
from compress.models.structure import count
from compress.pruning.inside_heads import HeadAttention, cut_side_, open_heads_, rotate_
from compress.pruning.plan import Cut, cut_, find_groups
from compress.pruning.surgeon import input_covariances

SIZE = 32
IMAGES = torch.randn(24, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def vit() -> nn.Module:
    return VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=5)


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=SIZE, patch_size=4, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=5
    )


def clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=8)
    network = transformers.CLIPVisionModelWithProjection(config)
    return Logits(network)


class Logits(nn.Module):
    """The embedding that a network of transformers returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.network(x).image_embeds
        return embedding


NETWORKS = {"vit": vit, "swin": swin, "clip": clip}


@cache
def lively(name: str) -> nn.Module:
    """Return a network in eval mode whose biases and tables are not zero."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


@cache
def opened(name: str) -> nn.Module:
    """Return the network with opened heads, sorted on IMAGES."""
    network = copy.deepcopy(lively(name))
    assert open_heads_(network, IMAGES[:1])
    rotate_(network, IMAGES.split(8))
    return network


def attentions(network: nn.Module) -> dict[str, HeadAttention]:
    return {path: module for path, module in network.named_modules() if isinstance(module, HeadAttention)}


@torch.no_grad()
@pytest.mark.parametrize(("name", "number"), [("vit", 2), ("swin", 4), ("clip", 1)])
def test_opened_and_sorted_heads_compute_the_same(name: str, number: int) -> None:
    network = opened(name)
    assert len(attentions(network)) == number
    assert network.state_dict().keys() == lively(name).state_dict().keys()
    torch.testing.assert_close(network(IMAGES), lively(name)(IMAGES), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_head_equals_one_whose_dimensions_are_zero(name: str) -> None:
    masked, cut = copy.deepcopy(opened(name)), copy.deepcopy(opened(name))
    for path, module in attentions(masked).items():
        width = module.widths["value"]
        gone = [head * width + place for head in range(module.heads) for place in (0, width - 1)]
        for side, layer, rows in module.places():
            for tensor in module.get_submodule(layer).parameters() if side == "query_key" else ():
                tensor[[rows[index] for index in gone]] = 0
        module.get_parameter(f"{module.output}.weight")[:, gone] = 0
        cut_side_(cut, path, "query_key", gone)
        cut_side_(cut, path, "value", gone)
    torch.testing.assert_close(cut(IMAGES), masked(IMAGES), rtol=1e-4, atol=1e-5)
    assert count(cut, (3, SIZE, SIZE)).macs < count(masked, (3, SIZE, SIZE)).macs


@torch.no_grad()
def test_the_last_dimensions_are_those_whose_fold_leaves_the_least_error() -> None:
    module = attentions(opened("vit"))["blocks.1.attn"]
    given: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    opened("vit")(IMAGES)
    handle.remove()
    queries, keys, values = module.parts(given[0])
    attended = module.attend(queries, keys, values)
    keys = keys - keys.mean(2, keepdim=True)
    query, key, attention = (rows.transpose(0, 1).flatten(1, 2).double().numpy() for rows in (queries, keys, attended))
    kept, columns = 8, module.get_parameter("proj.weight").double().view(96, 3, 32).numpy()
    for head in range(3):
        whole = query[head] @ key[head].T
        error = np.square(query[head][:, :kept] @ key[head][:, :kept].T - whole).sum()
        assert error == pytest.approx(alternating(whole, query[head], key[head], kept), rel=0.02)
        centered = (attention[head] - attention[head].mean(0)) @ columns[:, head].T  # (tokens, outputs)
        least = np.square(np.linalg.svd(centered, compute_uv=False)[kept:]).sum()
        rest = (attention[head] - attention[head].mean(0))[:, kept:] @ columns[:, head, kept:].T
        assert np.square(rest).sum() == pytest.approx(least, rel=1e-3)


def alternating(whole: NDArray[np.float64], query: NDArray[np.float64], key: NDArray[np.float64], kept: int) -> float:
    """Return the least squared error of (query a)(key b)ᵀ, by least squares for a and b in turn."""
    left = np.random.default_rng(0).normal(size=(query.shape[1], kept))
    for _ in range(60):
        narrow = query @ left
        right = np.linalg.lstsq(key, np.linalg.lstsq(narrow, whole, rcond=None)[0].T, rcond=None)[0]
        narrow = key @ right
        left = np.linalg.lstsq(query, np.linalg.lstsq(narrow, whole.T, rcond=None)[0].T, rcond=None)[0]
    return float(np.square(query @ left @ (key @ right).T - whole).sum())


@torch.no_grad()
def test_scores_are_the_errors_that_a_cut_leaves() -> None:
    network = opened("vit")
    groups = find_groups(
        network, IMAGES[:1], "obs", exclude=["head"], covariances=input_covariances(network, [IMAGES[:16]])
    )
    scores = next(group.scores for group in groups if group.root == "blocks.0.attn[query_key]")
    outputs: dict[int, Tensor] = {}
    for kept in (32, 9):
        cut = copy.deepcopy(network)
        gone = [head * 32 + place for head in range(3) for place in range(kept, 32)]
        cut_side_(cut, "blocks.0.attn", "query_key", gone)
        module = cut.get_submodule("blocks.0.attn")
        module.register_forward_hook(lambda _, __, output, kept=kept: outputs.update({kept: output}))
        cut(IMAGES[:16])
    variance = (outputs[32] - outputs[32].mean((0, 1))).square().sum()
    error = float((outputs[9] - outputs[32]).square().sum() / variance)
    assert float(scores[9]) == pytest.approx(error, rel=0.2)
    assert scores[:31].tolist() == sorted(scores[:31].tolist(), reverse=True)


def test_a_network_of_three_heads_loses_a_fifth_of_its_attention() -> None:
    whole = lively("vit")
    others = ("patch_embed.proj", "blocks.*.mlp.fc1")
    pruned = compress.prune(whole, IMAGES, keep_macs=0.93, exclude=others, inside_heads=True)
    sizes = [
        sum(parameter.numel() for name, parameter in network.named_parameters() if ".attn." in name)
        for network in (pruned, whole)
    ]
    assert sizes[0] <= 0.8 * sizes[1]
    assert {module.heads for module in attentions(pruned).values()} == {3}
    assert all(width % 8 == 0 for module in attentions(pruned).values() for width in module.widths.values())
    with pytest.raises(CompressError, match="cannot be reached"):
        compress.prune(whole, IMAGES, keep_macs=0.5, exclude=others, inside_heads=True)


@pytest.mark.slow
def test_a_saved_network_comes_back_with_its_widths_and_serves(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=5).eval()
    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    open_heads_(network, images[:1])
    rotate_(network, [images])
    cuts = tuple(
        Cut(f"blocks.{block}.attn[{side}]", tuple(head * 32 + place for head in range(2) for place in range(8, 32)))
        for block, side in ((0, "query_key"), (0, "value"), (3, "value"))
    )
    cut_(network, images[:1], cuts)
    save_network(network, Architecture("timm:test_vit", 5, (3, 160, 160)).pruned(cuts), tmp_path)
    loaded = load_float(tmp_path, trust_code=False)
    torch.testing.assert_close(loaded(images), network.eval()(images))
    compress.export(loaded, tmp_path / "vit.onnx", images=images)  # raises where the file differs


def test_weights_that_are_not_finite_are_a_sentence() -> None:
    network = copy.deepcopy(opened("vit"))
    with torch.no_grad():
        network.get_parameter("blocks.1.attn.qkv.weight")[0] = torch.nan
    with pytest.raises(CompressError, match=r"blocks\.1\.attn: its inputs are not finite"):
        rotate_(network, [IMAGES])


def test_attention_of_another_kind_keeps_its_heads_closed() -> None:
    normed = VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=32, depth=1, num_heads=2, qk_norm=True)
    dropped = VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=32, depth=1, num_heads=2, attn_drop_rate=0.1)
    for network in (normed, dropped):
        assert not open_heads_(network, IMAGES[:1])
    roots = {group.root for group in options_of(normed, SIZE).groups}
    assert "blocks.0.attn" in roots  # whole heads can go still
