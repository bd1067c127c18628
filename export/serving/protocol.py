"""Write an example request and response of the Open Inference Protocol (v2), and KServe's configuration."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.command.files import write_text
from export.onnx_file.model_file import ModelFile
from export.onnx_file.outputs import unpacked
from export.serving.triton import DATATYPES, Serving

Floats = NDArray[np.floating[Any]]


def write_requests(folder: Path, name: str, facts: ModelFile, image: Floats, found: Floats) -> None:
    """Write request.json with one input (channels, height, width), and response.json with the model's outputs for it (1, ...)."""
    given, by_name = facts.input, unpacked(found, facts.signature)
    wanted = [{"name": one.name} for one in facts.outputs]
    request = {"id": "golden", "inputs": [tensor(given.name, given.dtype, image)], "outputs": wanted}
    outputs = [tensor(one.name, one.dtype, by_name.get(one.name, found)[0]) for one in facts.outputs]
    response = {"id": "golden", "model_name": name, "model_version": "1", "outputs": outputs}
    for file, document in (("request.json", request), ("response.json", response)):
        write_text(folder / "serving" / file, json.dumps(document, allow_nan=False) + "\n")


def tensor(name: str, dtype: str, values: Floats) -> dict[str, object]:
    """Return one image's values in the protocol's JSON: a batch of one, each number with only the digits float32 needs."""
    data = [float(str(value)) for value in values.ravel()]
    return {"name": name, "datatype": DATATYPES[dtype], "shape": [1, *values.shape], "data": data}


def write_kserve(folder: Path, name: str, serving: Serving) -> None:
    """Write kserve.yaml, an InferenceService that runs the Triton repository."""
    needs = {"cpu": str(serving.threads * serving.instances)} if serving.kind == "cpu" and serving.threads else {}
    if serving.kind != "cpu":
        needs = {"nvidia.com/gpu": str(serving.instances)}
    limits = "".join(f'          {key}: "{value}"\n' for key, value in needs.items())
    resources = f"      resources:\n        requests:\n{limits}        limits:\n{limits}" if limits else ""
    write_text(
        folder / "serving" / "kserve.yaml",
        f"""\
# Copy the folder triton/ to a store that the cluster reads, and name it in storageUri (pvc://, s3://, gs://, https://).
# Requests: POST /v2/models/{name}/infer with request.json; the response is response.json.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {dns_name(name)}
spec:
  predictor:
    model:
      modelFormat:
        name: triton
      runtime: kserve-tritonserver
      protocolVersion: v2
      storageUri: pvc://models/{name}/serving/triton
{resources}""",
    )


def dns_name(name: str) -> str:
    """Return the name in the form that Kubernetes allows: letters, digits and hyphens, a letter first, no hyphen last."""
    plain = name.replace("_", "-").strip("-")
    return plain if re.match("[a-z]", plain) else f"model-{plain}"[:63].strip("-")
