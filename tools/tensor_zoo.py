"""Take encoders, networks of maps and networks of several outputs through the chain, and tabulate it in docs/results.md.

`python tools/tensor_zoo.py` goes on where it stopped: a row once made lies in runs/tensor_zoo.jsonl. The networks are built here, small
and with random weights, so the table shows structure, equality and time, no accuracy. transformers is needed for half of them.
"""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from chain import crops, enlivened, snr_db
from networks import TwoHeaded
from torch import Tensor, nn

import compress
from compress.errors import CompressError
from compress.models.architectures import thawed_
from compress.models.detectors import build_yolox
from compress.models.outputs import serve_, signature_of, tensors_of
from compress.models.structure import count
from compress.quant.reference import reference_of
from export.errors import UserError
from export.onnx_file.outputs import Output, columns
from export.proof.verify import verify
from export.runtime.latency import speedup, time_sessions
from export.runtime.own import import_file
from export.runtime.session import bind, infer, open_session
from export.tasks.tensors import TENSORS

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "runs" / "tensor_zoo.jsonl"
DOCUMENT, BEGIN, END = ROOT / "docs" / "results.md", "<!-- table: tensor zoo -->", "<!-- end of tensor zoo -->"
SHARES = (0.6, 0.75, 0.9)  # of the multiply-accumulates, until one can be reached
SECONDS, BLOCKS = 1.0, 8


class Pair(nn.Module):
    """A backbone whose last two levels are returned as a tuple."""

    def __init__(self, name: str = "resnet18") -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(3, 4), pretrained=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.body(images))


def transformer(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return what builds a small network of transformers': its class, and what its configuration says otherwise."""

    def build() -> nn.Module:
        import transformers

        sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
        network = getattr(transformers, kind)
        built: nn.Module = network(network.config_class(**(sizes | settings)))
        return built

    return build


def detr() -> nn.Module:
    import transformers as t

    body = t.ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_features=["stage4"])  # fmt: skip
    layers = {f"{part}_{name}": number for part in ("encoder", "decoder") for name, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 512))}  # fmt: skip
    return t.DetrForObjectDetection(t.DetrConfig(d_model=128, num_queries=20, backbone_config=body, **layers))  # type: ignore[no-any-return]


def detector(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from queried import built

        return built(kind)

    return build


def yolox(name: str) -> Callable[[], nn.Module]:
    return lambda: build_yolox(name, 6)


def timm_encoder(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=0, **settings)


def denoiser() -> nn.Module:
    built: nn.Module = import_file(ROOT / "tools" / "restoration" / "denoiser.py").denoiser()
    return built


# The network, its image size in pixels, and what builds it.
NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "two heads (a dict: embedding, map)": (32, TwoHeaded),
    "two levels of a ResNet-18 (a tuple)": (64, Pair),
    "U-Net for denoising": (64, denoiser),
    "timm ResNet-50 without classifier": (64, timm_encoder("resnet50")),
    "timm ConvNeXt-Atto without classifier": (64, timm_encoder("convnext_atto")),
    "timm DINOv2-S (patch 14)": (56, timm_encoder("vit_small_patch14_dinov2", img_size=56)),
    "timm FastViT-MCi0 (MobileCLIP's hybrid)": (64, timm_encoder("fastvit_mci0")),
    "DINOv2 (tokens, pooled)": (64, transformer("Dinov2Model", image_size=64, patch_size=8)),
    "CLIP's image tower, patch 32": (128, transformer("CLIPVisionModel", image_size=128, patch_size=32)),
    "SigLIP's image tower": (64, transformer("SiglipVisionModel", image_size=64, patch_size=16)),
    "DPT (depth)": (64, transformer("DPTForDepthEstimation", image_size=64, patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[24, 48, 96, 96], fusion_hidden_size=48)),
    "ViTPose (heat maps)": (64, lambda: vitpose()),
    "YOLOS (logits, boxes, tokens)": (64, transformer("YolosForObjectDetection", image_size=[64, 64], patch_size=16, num_detection_tokens=10)),
    "DETR (logits, boxes, tokens)": (64, detr),
    **{f"YOLOX-{name} (rows)": (192, yolox(name)) for name in ("nano", "tiny", "s")},
    **{f"{kind} ({part})": (64, detector(kind)) for kind, part in {"Conditional DETR": "queries", "Deformable DETR": "queries", "Deformable DETR, two stages": "chosen queries", "RT-DETR": "chosen queries", "RT-DETRv2": "chosen queries", "D-FINE": "chosen queries", "RF-DETR": "chosen queries"}.items()},
}  # fmt: skip
# What the networks of queries serve, where they have it: the rest are steps on the way.
QUERIES = ("logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits")


def vitpose() -> nn.Module:
    import transformers as t

    body = t.VitPoseBackboneConfig(image_size=[64, 64], patch_size=[8, 8], hidden_size=192, num_hidden_layers=4, num_attention_heads=3)  # fmt: skip
    return t.VitPoseForPoseEstimation(t.VitPoseConfig(backbone_config=body, num_labels=17))  # type: ignore[no-any-return]


def row_of(name: str, size: int, build: Callable[[], nn.Module], *, timed: bool = True) -> dict[str, Any]:
    """Return what became of a network for images of `size` pixels: cut, quantized, compared by output, perhaps timed."""
    torch.manual_seed(0)
    images, shape = crops(40, size, seed=0)[0], (3, size, size)
    network = enlivened(thawed_(build()).eval(), images)
    with torch.no_grad():
        named = [one for one, _ in tensors_of(network(images[:1]))] if "queries" in name else []
    network = serve_(network, [one for one in QUERIES if one in named])
    outputs = signature_of(network, shape)
    full, kept, why = count(network, shape).macs, 1.0, ""
    student: nn.Module = network
    for share in SHARES:
        try:
            student = compress.prune(network, images, keep_macs=share)
        except CompressError as error:
            why = str(error)
            continue
        kept, why = count(student, shape).macs / full, ""
        break
    prepared = compress.quantize(student, images)
    with tempfile.TemporaryDirectory() as folder:
        whole, file = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        found = compress.export(prepared, file, images=images[:8], task="tensors")
        unseen = crops(20, size, seed=1)[0]
        verified = verify(file, [(unseen[:4].numpy(), None)], reference_of(prepared), task=TENSORS.of(outputs))
        got = infer(open_session(file, threads=1), unseen.numpy())
        with torch.no_grad():
            expected, real = prepared(unseen).numpy(), student(unseen).numpy()
        times: dict[str, Any] = {}
        if timed:
            compress.export(network, whole, images=images, task="tensors")
            sessions = {one: open_session(path, threads=1) for one, path in (("fp32", whole), ("int8", file))}
            runs = {one: bind(session, images[:1].numpy()) for one, session in sessions.items()}
            clocked = time_sessions(runs, seconds=SECONDS, blocks=BLOCKS, clock=time.thread_time)
            faster = speedup(clocked["fp32"], clocked["int8"])
            times = {
                "ms": [float(np.median(clocked[one].block_ms)) for one in ("fp32", "int8")],
                "faster": [faster.ratio, faster.low, faster.high],
            }
    places = columns(outputs or [Output("output", tuple(expected.shape[1:]))])
    flat = [part.reshape(len(part), -1) for part in (expected, got, real)]
    return {
        "pixels": size,
        "outputs": [one.name for one in outputs] or ["one"],
        "kept": kept,
        "why": why,
        "integer": len(found["integer_layers"]),
        "float": len(found["float_layers"]),
        "by_runtime": found["quantized_by_runtime"],
        "equal": verified["first_divergence"] is None,
        "snr": {one: [snr_db(flat[0][:, at], flat[1][:, at]), snr_db(flat[2][:, at], flat[0][:, at])] for one, at in places.items()},
        **times,
    }  # fmt: skip


def as_markdown(rows: dict[str, dict[str, Any]], known: str) -> str:
    """Return the table; what was not made here keeps its line of the known one."""
    titles = ("network, pixels", "outputs", "MACs kept", "layers in integers", "equal; SNR by output (rounding), dB", "FP32, INT8 ms", "faster")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    before = {line.split(" | ")[0].removeprefix("| ").rsplit(", ", 1)[0]: line for line in known.splitlines()}
    for name in NETWORKS:
        row = rows.get(name)
        if row is None:
            lines += [before[name]] if name in before else []
            continue
        if "failed" in row:
            lines.append(f"| {name} | – | – | – | {row['failed']} | – | – |")
            continue
        snr = ", ".join(
            f"{min(one, 99):.0f} ({other:.0f})" if one > -99 else "all 0" for one, other in row["snr"].values()
        )
        kept = f"{row['kept']:.2f}" if not row["why"] else f"1: {row['why']}"
        ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*row["faster"])
        layers = f"{row['integer']} of {row['integer'] + row['float']}"
        cells = (f"{name}, {row['pixels']}", ", ".join(row["outputs"]), kept, layers, f"{'yes' if row['equal'] else 'no'}; {snr}", "{:.2f}, {:.2f}".format(*row["ms"]), ratio)  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Make the rows that are missing, and write the table where docs/results.md has its marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="parts of names; all by default")
    chosen = parser.parse_args().networks
    ROWS.parent.mkdir(exist_ok=True)
    done = dict(json.loads(line) for line in ROWS.read_text().splitlines()) if ROWS.exists() else {}
    for name in NETWORKS:
        if name in done or (chosen and not any(part in name for part in chosen)):
            continue
        try:
            row = row_of(name, *NETWORKS[name])
        except ImportError as error:
            print(f"{name}: {error}")  # noqa: T201
            continue
        except UserError as error:
            row = {"failed": str(error)}
        except Exception:  # noqa: BLE001 (the table says it)
            row = {"failed": traceback.format_exc().strip().splitlines()[-1][:300]}
            traceback.print_exc()
        done[name] = row
        with ROWS.open("a") as file:
            file.write(json.dumps([name, row]) + "\n")
        print(name, json.dumps(row), flush=True)  # noqa: T201
    text = DOCUMENT.read_text()
    if BEGIN in text:
        head, rest = text.split(BEGIN)
        known, tail = rest.split(END)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{as_markdown(done, known)}\n{END}{tail}")


if __name__ == "__main__":
    main()
