"""What ONNX Runtime raises, and the first line of it."""

from onnxruntime.capi import onnxruntime_pybind11_state as native

# ONNX Runtime's exceptions have no common base class; pybind turns the rest into RuntimeError.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    native.EPFail, native.Fail, native.InvalidArgument, native.InvalidGraph, native.InvalidProtobuf, native.NoSuchFile,
    native.NotImplemented, native.RuntimeException, RuntimeError,
)  # fmt: skip


def first_line(error: Exception) -> str:
    """Return the first line of an ONNX Runtime error, at most 200 characters."""
    return str(error).strip().partition("\n")[0][:200]
