"""Serve an ONNX file by the Open Inference Protocol (v2), with KServe's endpoints and codecs and strict checks.

KServe's Python SDK implements the protocol, in JSON and with binary tensor data. Added here: a request that does not fit the
network gets a 4xx with one sentence, the body's size is limited, and clients cannot load or unload models.
"""

import asyncio
import math
import struct
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import NoReturn
from uuid import uuid4

import numpy as np
import onnxruntime
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelRepository
from kserve.errors import InvalidInput, ModelNotFound
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v2_datamodels import InferenceRequest
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from export.onnx_file.model_file import ModelFile
from export.serving.requests import StatedLengthLimit, error, misfit, not_text
from export.serving.triton import DATATYPES

BYTES_PER_NUMBER = 32  # JSON writes a float32 with at most 24 characters, and a separator
HEADER_BYTES = 2**16
# Exceptions of KServe's decoding for an invalid body.
DECODING_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error)
# KServe raises NotImplementedError for a model version in the path: not found, as there is only one version.
STATUS = {
    InvalidInput: HTTPStatus.BAD_REQUEST,
    ModelNotFound: HTTPStatus.NOT_FOUND,
    NotImplementedError: HTTPStatus.NOT_FOUND,
}


class SessionModel(Model):  # type: ignore[misc] # KServe is not typed
    """The network as a KServe model; a request runs in the session with the fewest running ones."""

    def __init__(
        self, name: str, sessions: Sequence[onnxruntime.InferenceSession], facts: ModelFile, *, max_batch: int
    ) -> None:
        super().__init__(name)
        self.sessions, self.facts, self.max_batch = sessions, facts, max_batch
        self.running = [0] * len(sessions)
        self.ready = True

    def get_input_types(self) -> list[dict[str, object]]:
        """Return name, datatype and shape of the images; the batch is -1."""
        return [tensor(self.facts.input.name, self.facts.input.dtype, self.facts.input.shape)]

    def get_output_types(self) -> list[dict[str, object]]:
        """Return name, datatype and shape of the outputs; the batch is -1."""
        return [tensor(one.name, one.dtype, one.shape) for one in self.facts.outputs]

    async def predict(self, payload: InferRequest, _: Mapping[str, str] | None = None) -> InferResponse:
        """Run the network in a thread, so that health checks get responses meanwhile."""
        images = self.images(payload)
        least = min(range(len(self.running)), key=self.running.__getitem__)
        self.running[least] += 1
        try:
            found = await asyncio.to_thread(self.sessions[least].run, None, {self.facts.input.name: images})
        finally:
            self.running[least] -= 1
        outputs = []
        for wanted, values in zip(self.get_output_types(), found, strict=True):
            if not np.isfinite(values).all():
                raise InvalidInput(f"{wanted['name']}: not finite for this input: send normalized images")
            outputs.append(InferOutput(**{**wanted, "shape": list(values.shape)}, data=values))
        return InferResponse(
            response_id=payload.id or str(uuid4()),
            model_name=self.name,
            infer_outputs=outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )

    def images(self, payload: InferRequest) -> NDArray[np.generic]:
        """Return the request's tensor; raise InvalidInput if it does not fit the network."""
        (known,) = self.get_input_types()
        if [given.name for given in payload.inputs] != [known["name"]]:
            raise InvalidInput(f"inputs: must be one tensor, {known['name']}")
        (given,) = payload.inputs
        if given.datatype != known["datatype"]:
            raise InvalidInput(f"{given.name}: datatype: must be {known['datatype']}, got {str(given.datatype)[:20]}")
        if not self.takes(given.shape):
            raise InvalidInput(
                f"{given.name}: shape: must be {known['shape']} with 1 to {self.max_batch} images, got {str(given.shape)[:60]}"
            )
        try:
            images: NDArray[np.generic] = given.as_numpy()
        except DECODING_ERRORS as error:
            raise InvalidInput(f"{given.name}: data: {error}") from error
        if not np.isfinite(images).all():
            raise InvalidInput(f"{given.name}: data: must be finite")
        return images

    def takes(self, shape: object) -> bool:
        """Tell whether the shape is that of 1 to `max_batch` images."""
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            return False
        return tuple(shape[1:]) == self.facts.input.shape[1:] and 1 <= shape[0] <= self.max_batch


class StrictDataPlane(DataPlane):  # type: ignore[misc]
    """KServe's decoding, but with status 400 for all broken requests; KServe itself responds to half of them with 500."""

    def metadata(self) -> dict[str, object]:
        """Return the metadata, with the supported extensions."""
        return {**super().metadata(), "extensions": ["binary_tensor_data"]}

    def decode(
        self,
        body: InferenceRequest | bytes,
        headers: Mapping[str, str],
        protocol_version: str,
        model_name: str | None = None,
    ) -> tuple[InferRequest, dict[str, object]]:
        """Decode a request; KServe checks the fields of a JSON body, and here those of a binary body are checked too."""
        try:
            request, attributes = super().decode(body, headers, protocol_version, model_name)
            wanted = [{"name": one.name, "parameters": one.parameters} for one in request.request_outputs or ()]
            InferenceRequest(id=request.id, parameters=request.parameters, inputs=[], outputs=wanted)
            wrong = misfit(body, headers) if isinstance(body, bytes) else ""
        except InvalidInput:
            raise
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        except DECODING_ERRORS as error:
            raise InvalidInput(f"the body is not an inference request ({type(error).__name__}: {error})") from error
        if not_text(request.id):
            wrong = "id: must be text, got half of a surrogate pair"
        if wrong:
            raise InvalidInput(wrong)
        return request, attributes


class FixedModels(ModelRepositoryExtension):  # type: ignore[misc]
    """A repository whose models clients cannot change."""

    async def load(self, model_name: str) -> NoReturn:
        """Refuse with status 403."""
        raise HTTPException(HTTPStatus.FORBIDDEN, f"{model_name}: models are not loaded over the network")

    async def unload(self, model_name: str) -> NoReturn:
        """Refuse with status 403."""
        raise HTTPException(HTTPStatus.FORBIDDEN, f"{model_name}: models are not unloaded over the network")


def application(model: SessionModel) -> FastAPI:
    """Return KServe's v2 endpoints for one model as an ASGI application."""
    models = ModelRepository()
    models.update(model)
    app = FastAPI(title="Open Inference Protocol", docs_url=None, redoc_url=None, openapi_url=None)
    register_v2_endpoints(app, StrictDataPlane(models), FixedModels(models))
    for kind in (*STATUS, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, refuse)
    most = model.max_batch * math.prod(model.facts.shape) * BYTES_PER_NUMBER + HEADER_BYTES
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=most)
    app.add_middleware(StatedLengthLimit, most=most)  # Starlette refuses such a body as plain text
    return app


async def refuse(_: Request, reason: Exception) -> JSONResponse:
    """Return the protocol's error response, without echoing the request."""
    if isinstance(reason, RequestValidationError):
        first = reason.errors()[0]
        status, sentence = int(HTTPStatus.BAD_REQUEST), f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    elif isinstance(reason, HTTPException):
        status, sentence = reason.status_code, reason.detail
    else:
        status, sentence = STATUS[type(reason)], str(reason)
    return JSONResponse(error(sentence), status)


def tensor(name: str, dtype: str, shape: tuple[int | None, ...]) -> dict[str, object]:
    """Return a tensor's metadata in the protocol's form."""
    return {"name": name, "datatype": DATATYPES[dtype], "shape": [-1 if size is None else size for size in shape]}
