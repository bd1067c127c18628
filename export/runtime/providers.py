"""The execution providers of ONNX Runtime in which files are scored, timed and served: one row each.

A file's float parts are computed in an arithmetic: f32, or bf16 where the provider and the processor have it. INT8 parts stay INT8.
"""

import argparse
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import onnx
import onnxruntime

from export.errors import BundleError
from export.onnx_file.targets import CPU, CUDA, OPENVINO, TENSORRT, host_instruction_sets, provider_title
from export.runtime.native import RUNTIME_ERRORS, first_line

Arithmetic = Literal["f32", "bf16"]
Options = Callable[[int, Arithmetic], dict[str, str]]
BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # processors' flags, as Linux names them on x86-64 and Arm
PLUGINS_SINCE = "1.25"  # of ONNX Runtime, which loads the plugins of this table and says which nodes they take


def openvino_options(threads: int, arithmetic: Arithmetic) -> dict[str, str]:
    """Return `load_config`, the only option that the plugin heeds.

    It ignores the session's threads, and without a hint it computes float files in bf16 wherever the processor has it. With one stream
    and one thread it runs in the caller's thread (openvino's pull request 29777).
    """
    asked = {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": arithmetic}
    return {"load_config": json.dumps({"CPU": asked})}


@dataclass(frozen=True)
class Provider:
    """How one provider is found, and what it is told."""

    key: str  # the user's word for it
    name: str  # ONNX Runtime's
    title: str
    package: str  # that pip installs
    device: Literal["cpu", "cuda"] = "cpu"  # in whose memory inputs and outputs lie
    plugin: str | None = None  # the module with its library; None: built into ONNX Runtime's package
    device_facts: Mapping[str, str] = field(default_factory=dict, hash=False)  # which of the plugin's devices to take
    needs: str = ""  # what the plugin offers that device on
    libraries: str = "the CUDA and cuDNN versions that onnxruntime-gpu requires"  # without which it does not start
    options: Options | None = None  # from threads and arithmetic; None: the session's own say all
    float_bits: int = 24  # of a significand in its f32; CUDA's and TensorRT's products are TF32 unless told otherwise
    bf16: frozenset[str] = frozenset()  # it computes float files in bf16 on processors with one of these flags

    @property
    def arithmetics(self) -> tuple[Arithmetic, ...]:
        """In which arithmetics it computes a file's float parts on this machine."""
        return ("f32", "bf16") if self.bf16 & host_instruction_sets() else ("f32",)


ROWS = (
    Provider("cpu", CPU, "CPU", "onnxruntime"),
    Provider("openvino", OPENVINO, "OpenVINO", "onnxruntime-ep-openvino", plugin="onnxruntime_ep_openvino",
             device_facts={"ov_device": "CPU"}, needs="version 1.8 takes Intel's only", options=openvino_options, bf16=BF16),
    Provider("cuda", CUDA, "CUDA", "onnxruntime-gpu", device="cuda", float_bits=11),
    Provider("tensorrt", TENSORRT, "TensorRT", "onnxruntime-gpu", device="cuda", float_bits=11,
             libraries="TensorRT, CUDA and cuDNN in the versions that onnxruntime-gpu requires"),
)  # fmt: skip
PROVIDERS = {row.key: row for row in ROWS}


class Runtime(NamedTuple):
    """A provider, and the arithmetic in which it computes float parts."""

    provider: Provider
    arithmetic: Arithmetic

    @property
    def bits(self) -> int:
        """The significand's bits of what it multiplies."""
        return 8 if self.arithmetic == "bf16" else self.provider.float_bits

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.provider.name} {self.arithmetic}"

    def __str__(self) -> str:
        """Return for example CPU, OpenVINO, OpenVINO bf16."""
        return self.provider.title if self.arithmetic == "f32" else f"{self.provider.title} {self.arithmetic}"


PLAIN = Runtime(PROVIDERS["cpu"], "f32")


def provider_named(name: str) -> Provider:
    """Return the row of ONNX Runtime's name; of one that only another version's report knows, a row that says nothing."""
    unknown = Provider(name, name, provider_title(name), "onnxruntime", device="cuda")
    return next((row for row in PROVIDERS.values() if row.name == name), unknown)


def runtime_named(name: str, arithmetic: Arithmetic = "f32") -> Runtime:
    """Return the provider of ONNX Runtime's name with an arithmetic."""
    return Runtime(provider_named(name), arithmetic)


@cache
def available_providers() -> tuple[str, ...]:
    """Return the providers that are built into this ONNX Runtime, after loading CUDA's libraries if CUDA is one of them."""
    providers = tuple(onnxruntime.get_available_providers())
    if CUDA in providers:
        onnxruntime.preload_dlls()
    return providers


def missing(row: Provider) -> str | None:
    """Return a sentence with the repair if this machine lacks the provider, or None if it is here."""
    if row.plugin is None:
        if row.name in available_providers():
            return None
        return (
            f"{row.name}: not available, ONNX Runtime has {', '.join(available_providers())}: pip install {row.package}"
        )
    if find_spec(row.plugin) is None:
        return f"{row.name}: not installed: pip install {row.package}"
    if not hasattr(onnxruntime, "get_ep_devices"):
        return f"{row.name}: ONNX Runtime {onnxruntime.__version__} loads no plugins: pip install 'onnxruntime>={PLUGINS_SINCE}'"
    try:
        found = plugin_devices(row.name)
    except BundleError as error:
        return str(error)
    if not found:
        return f"{row.name}: {row.package} is installed, and offers nothing on this processor ({row.needs}): use another provider"
    return None


def present(providers: Literal["auto"] | Sequence[str]) -> list[str]:
    """Return the table's keys that are meant, in its order: those asked for, with the CPU's own beside its plugins, or all that start here."""
    if providers != "auto":
        on_cpu = any(PROVIDERS[key].device == "cpu" for key in providers)
        return [key for key in PROVIDERS if key in providers or (key == "cpu" and on_cpu)]
    return [key for key, row in PROVIDERS.items() if missing(row) is None and starts(row)]


@cache
def starts(row: Provider) -> bool:
    """Tell whether a session of one node runs in the provider: TensorRT is built into ONNX Runtime's package and needs libraries of its own."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "one", [value], [
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])])  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        built_in = configure(options, row, row.options(1, "f32") if row.options else {})
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=built_in, enable_fallback=0
        )
    except RUNTIME_ERRORS:
        return False
    return bool(session.get_providers()[0] == row.name)


def runtimes(providers: Sequence[str]) -> list[Runtime]:
    """Return the given providers that this machine has, each in all of its arithmetics."""
    rows = [PROVIDERS[key] for key in providers if missing(PROVIDERS[key]) is None]
    return [Runtime(row, arithmetic) for row in rows for arithmetic in row.arithmetics]


def require(runtime: Runtime) -> None:
    """Raise BundleError if the provider is not installed, or does not compute in this arithmetic on this machine."""
    row, arithmetic = runtime
    if sentence := missing(row):
        raise BundleError(sentence)
    if arithmetic not in row.arithmetics:
        raise BundleError(
            f"{row.title} does not compute in {arithmetic} here: leave it out, or use {row.arithmetics[0]}"
        )


def configure(
    options: onnxruntime.SessionOptions, row: Provider, settings: Mapping[str, str]
) -> list[tuple[str, dict[str, str]]] | None:
    """Give a session's options the plugin's device; return what InferenceSession takes as `providers`, None for a plugin.

    `providers` would override the plugin.
    """
    if row.plugin is None:
        return [(row.name, dict(settings))]
    options.add_provider_for_devices(plugin_devices(row.name), dict(settings))
    return None


@cache
def plugin_devices(name: str) -> list[onnxruntime.OrtEpDevice]:
    """Register a plugin's library, once in a process, and return the device to run on; none if it offers no such device.

    Raises BundleError if the library cannot be loaded.
    """
    row = provider_named(name)
    assert row.plugin is not None
    try:
        onnxruntime.register_execution_provider_library(name, importlib.import_module(row.plugin).get_library_path())
    except RUNTIME_ERRORS as error:
        raise BundleError(
            f"{name}: its library does not load ({first_line(error)}): pip install -U {row.package}"
        ) from error
    found = [
        device
        for device in onnxruntime.get_ep_devices()
        if device.ep_name == name and row.device_facts.items() <= dict(device.ep_metadata).items()
    ]
    return found[:1]


def left_to_others(session: onnxruntime.InferenceSession, row: Provider) -> list[str]:
    """Return the nodes, as "operator name", that a session's provider left to another one; asked of plugins only."""
    if row.plugin is None:
        return []
    return sorted(
        f"{node.op_type} {node.name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != row.name
        for node in part.get_nodes()
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --provider and --arithmetic to a command."""
    parser.add_argument("--provider", choices=PROVIDERS, default="cpu", help="ONNX Runtime's execution provider")
    parser.add_argument(
        "--arithmetic",
        choices=("f32", "bf16"),
        default="f32",
        help="in which the provider computes float parts; bf16 needs a processor that has it",
    )


def asked(arguments: argparse.Namespace) -> Runtime:
    """Return what --provider and --arithmetic say. Raises BundleError if this machine lacks it."""
    found = Runtime(PROVIDERS[arguments.provider], arguments.arithmetic)
    require(found)
    return found
