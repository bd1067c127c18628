"""Write a network of the run as an ONNX file that says all a server must know about it."""

import json
from pathlib import Path

import torch
from torch import nn

from compress.run import Run
from export.onnx_file.targets import Target
from export.onnx_file.to_onnx import to_onnx


def export_network(model: nn.Module, path: Path, run: Run, *, top1: float, target: Target) -> None:
    """Write `model`, in eval mode on the CPU, whose accuracy in torch is `top1`."""
    metadata = {
        "task": run.recipe.task,
        "classes": json.dumps(run.dataset.classes),
        "preprocess": json.dumps(run.dataset.preprocess.to_json()),
        "recipe": run.recipe.name,
        "top1_torch": f"{top1:.4f}",
        "target": target.name,
    }
    to_onnx(model.eval().to(memory_format=torch.contiguous_format), path, image_size=run.image_size, metadata=metadata)
