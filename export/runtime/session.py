"""Open ONNX Runtime sessions, bind their inputs and outputs, and change a network's image size."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export.errors import BundleError
from export.images.size import Size, said
from export.onnx_file.model_file import parse
from export.onnx_file.operators import INTEGER, Q
from export.onnx_file.outputs import packed
from export.onnx_file.targets import host_instruction_sets
from export.runtime.environment import usable_cores
from export.runtime.faults import fault_of
from export.runtime.native import RUNTIME_ERRORS, first_line
from export.runtime.providers import PLAIN, Runtime, configure, provider_named, require

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}

BATCH = "batch"  # the free dimension of every exported file
Run = Callable[[], None]


def open_session(
    model: Path | bytes,
    *,
    runs_in: Runtime = PLAIN,
    threads: int = 0,
    batch: int | None = None,
    provider_options: Mapping[str, str] | None = None,
    optimize: bool = True,
    optimized_file: Path | None = None,
    profile_prefix: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open `model` in a provider with `threads` intra-op threads (0 is all cores), fully optimized or not at all, for one `batch` or any.

    Writes the graph that will run to `optimized_file`, and node times to a file that starts with `profile_prefix`.
    Raises BundleError if the file or the provider cannot be loaded, and if this ONNX Runtime would compute the file wrongly on this
    processor; never falls back to another provider.
    """
    name = model.name if isinstance(model, Path) else "the model"
    require(runs_in)
    provider, arithmetic = runs_in
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if optimized_file is not None:
        options.optimized_model_filepath = str(optimized_file)
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_prefix)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if batch is not None:
        options.add_free_dimension_override_by_name(BATCH, batch)
    # Stop workers from spinning after a run: interleaved files would take each other's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider.plugin is not None:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    own = provider.options(threads or usable_cores(), arithmetic) if provider.options else {}
    built_in = configure(options, provider, own | dict(provider_options or {}))
    source = str(model) if isinstance(model, Path) else model
    try:
        session = onnxruntime.InferenceSession(source, options, providers=built_in, enable_fallback=0)
    except RUNTIME_ERRORS as error:
        raise BundleError(
            f"{name}: ONNX Runtime cannot load it ({first_line(error)}): export it again", defect="cannot_run"
        ) from error
    if session.get_providers()[0] != provider.name:
        raise BundleError(f"{provider.name}: did not start: install {provider.libraries}")
    require_right(model, name, optimize=optimize)
    return session


def require_right(model: Path | bytes, name: str, *, optimize: bool) -> None:
    """Raise BundleError if this ONNX Runtime computes the model's integers wrongly here; unoptimized, Q/DQ layers compute in float."""
    fault = fault_of(onnxruntime.__version__, host_instruction_sets())
    if fault is None:
        return
    network = parse(model) if isinstance(model, Path) else onnx.load_model_from_string(model)
    if any(node.op_type in INTEGER or (optimize and node.op_type == Q) for node in network.graph.node):
        raise BundleError(
            f"{name}: ONNX Runtime {onnxruntime.__version__} computes INT8 wrongly on {fault.processors} ({fault.instruction_set}): "
            f"{fault.repair}",
            defect="wrong_runtime",
        )


def bind(session: onnxruntime.InferenceSession, images: NDArray[np.generic]) -> Run:
    """Return a function that runs `session` on `images` once, with buffers that stay on the device, and waits for it.

    Raises BundleError if the network cannot run on this shape.
    """
    device = provider_named(session.get_providers()[0]).device
    (given,) = session.get_inputs()
    binding = session.io_binding()
    inputs = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(images, DTYPES[given.type]), device, 0)
    binding.bind_ortvalue_input(given.name, inputs)
    for wanted in session.get_outputs():
        shape = [len(images), *wanted.shape[1:]]
        output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, DTYPES[wanted.type], device, 0)
        binding.bind_ortvalue_output(wanted.name, output)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    try:
        run()
    except RUNTIME_ERRORS as error:
        raise BundleError(f"input {images.shape}: the network cannot run on it ({first_line(error)})") from error
    return run


def infer(session: onnxruntime.InferenceSession, images: NDArray[Any]) -> NDArray[Any]:
    """Return the output (n, ...) for images (n, c, h, w); several outputs lie side by side, (n, values)."""
    given = session.get_inputs()[0]
    return packed(session.run(None, {given.name: images.astype(DTYPES[given.type], copy=False)}))


def resize_input(model: bytes, size: Size) -> bytes:
    """Return the fully convolutional `model` with an input of this height and width.

    Raises BundleError if its size is fixed.
    """
    proto = onnx.load_model_from_string(model)
    (value,) = proto.graph.input
    _, channels, *sides = value.type.tensor_type.shape.dim
    for dim, side in zip(sides, size, strict=True):
        dim.dim_value = side
    del proto.graph.value_info[:]
    resized: bytes = proto.SerializeToString()
    try:
        bind(open_session(resized, threads=1), np.zeros((1, channels.dim_value, *size), np.float32))
    except BundleError as error:
        raise BundleError(f"image size {said(size)}: the network's size is fixed, time it at that size") from error
    return resized
