"""`prune`, `quantize` and `export` are the chain in three lines of Python (docs/python.md); the command is in `cli`."""

from typing import TYPE_CHECKING

import export as _export  # noqa: F401 - it switches ONNX Runtime's telemetry off, before anything imports that

if TYPE_CHECKING:
    from compress.api import export, prune, quantize

__all__ = ["export", "prune", "quantize"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    from compress import api  # imports torch, which takes seconds

    return getattr(api, name)
