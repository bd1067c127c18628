"""Small detection networks of transformers with random weights, built in code."""

from typing import Any

import transformers as t
from torch import nn

WIDTHS = [32, 64, 128, 256]


def residual(kind: Any, **outputs: Any) -> Any:
    """Return the settings of a residual network of eight convolutions."""
    return kind(embedding_size=32, hidden_sizes=WIDTHS, depths=[1, 1, 1, 1], layer_type="basic", **outputs)


def stepped(**settings: Any) -> dict[str, Any]:
    """Return the settings of a small RT-DETR and its kin; of a small RT-DETR itself with `settings` of its own."""
    return {
        "backbone_config": residual(t.RTDetrResNetConfig, out_indices=[2, 3, 4]),
        "encoder_in_channels": WIDTHS[1:],
        "encoder_hidden_dim": 64,
        "encoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        "hidden_expansion": 0.5,
        "d_model": 64,
        "num_queries": 20,
        "decoder_in_channels": [64] * 3,
        "decoder_ffn_dim": 128,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "num_labels": 6,
        **settings,
    }


def built(kind: str) -> nn.Module:
    """Return one of transformers' detection classes, small: a residual network or a transformer below, two layers each of encoder and decoder."""
    resnet = residual(t.ResNetConfig, out_features=["stage2", "stage3", "stage4"])
    one = residual(t.ResNetConfig, out_features=["stage4"])
    labels = {"num_labels": 6}
    layers = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    }
    detr = {"d_model": 64, "num_queries": 20, **layers, **labels}
    makers: dict[str, Any] = {
        "DETR": lambda: t.DetrForObjectDetection(t.DetrConfig(backbone_config=one, **detr)),
        "Conditional DETR": lambda: t.ConditionalDetrForObjectDetection(
            t.ConditionalDetrConfig(backbone_config=one, **detr)
        ),
        "Deformable DETR": lambda: t.DeformableDetrForObjectDetection(
            t.DeformableDetrConfig(backbone_config=resnet, num_feature_levels=3, disable_custom_kernels=True, **detr)
        ),
        "Deformable DETR, two stages": lambda: t.DeformableDetrForObjectDetection(
            t.DeformableDetrConfig(
                backbone_config=resnet,
                num_feature_levels=3,
                two_stage=True,
                with_box_refine=True,
                two_stage_num_proposals=20,
                disable_custom_kernels=True,
                **detr,
            )
        ),
        "RT-DETR": lambda: t.RTDetrForObjectDetection(t.RTDetrConfig(**stepped())),
        "RT-DETRv2": lambda: t.RTDetrV2ForObjectDetection(t.RTDetrV2Config(**stepped())),
        "D-FINE": lambda: t.DFineForObjectDetection(
            t.DFineConfig(
                **stepped(
                    backbone_config=t.HGNetV2Config(
                        stem_channels=[3, 16, 16],
                        stage_in_channels=[16, 32, 64, 128],
                        stage_mid_channels=[16, 16, 32, 32],
                        stage_out_channels=WIDTHS,
                        stage_num_blocks=[1, 1, 1, 1],
                        stage_numb_of_layers=[2, 2, 2, 2],
                        stage_light_block=[False, False, True, True],
                        stage_kernel_size=[3, 3, 5, 5],
                        stage_downsample=[False, True, True, True],
                        hidden_sizes=WIDTHS,
                        depths=[1, 1, 1, 1],
                        embedding_size=16,
                        out_features=["stage2", "stage3", "stage4"],
                    ),
                    layer_scale=1,
                    depth_mult=0.5,
                )
            )
        ),
        "RF-DETR": lambda: t.RfDetrForObjectDetection(
            t.RfDetrConfig(
                backbone_config=t.RfDetrDinov2Config(
                    image_size=64,
                    patch_size=8,
                    hidden_size=96,
                    num_hidden_layers=4,
                    num_attention_heads=3,
                    num_windows=2,
                    out_indices=[2, 4],
                ),
                d_model=64,
                num_queries=20,
                group_detr=3,
                decoder_layers=2,
                decoder_ffn_dim=128,
                decoder_self_attention_heads=4,
                decoder_cross_attention_heads=4,
                **labels,
            )
        ),
        "YOLOS": lambda: t.YolosForObjectDetection(
            t.YolosConfig(
                image_size=[64, 64],
                patch_size=8,
                hidden_size=96,
                num_hidden_layers=4,
                num_attention_heads=3,
                intermediate_size=384,
                num_detection_tokens=20,
                **labels,
            )
        ),
    }
    network: nn.Module = makers[kind]()
    return network
