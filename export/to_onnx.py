"""Write a torch module as one ONNX file that servers in the field can read.

The only file of `export` that imports torch.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from export.graph import INPUT, OUTPUT, finish, save_model

OPSET = 18


def to_onnx(model: nn.Module, path: Path, *, image_size: int, metadata: Mapping[str, str]) -> None:
    """Export `model` (in eval mode, on the CPU) with input (batch, 3, image_size, image_size), the batch dynamic.

    The file has opset 18 and IR 9, holds its own weights, and carries `metadata`; it has passed ONNX's checker.
    """
    # Batch 2: torch.export would specialise a batch of 1.
    images = torch.zeros(2, 3, image_size, image_size)
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[INPUT],
        output_names=[OUTPUT],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    save_model(finish(program.model_proto, opset=OPSET, metadata=metadata), path)
