"""Serve model.onnx with ONNX Runtime from Triton's Python backend, for Triton images that lack the ONNX Runtime backend.

A copy of this file is beside model.onnx in the repository; Triton's images contain `triton_python_backend_utils`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton  # type: ignore[import-not-found]


class TritonPythonModel:
    """The model class, of which Triton creates one object per instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session with the threads from config.pbtxt."""
        parameters = json.loads(args["model_config"])["parameters"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"]["string_value"])
        options.inter_op_num_threads = 1
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input, self.outputs = self.session.get_inputs()[0].name, [one.name for one in self.session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests from the dynamic batcher as one batch, and return each request's part."""
        images = [triton.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        found = self.session.run(None, {self.input: np.concatenate(images)})  # (batch, ...) each
        ends = np.cumsum([len(image) for image in images])[:-1]
        shares = zip(*(np.split(values, ends) for values in found), strict=True)  # each request's part of every output
        return [
            triton.InferenceResponse([triton.Tensor(*one) for one in zip(self.outputs, share, strict=True)])
            for share in shares
        ]
