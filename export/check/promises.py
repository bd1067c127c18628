"""Compare a bundle's model files with its documents: labels, preprocessing, target, grid, float layers, golden outputs.

Digests detect a changed file. If somebody swaps a file and updates the digests, this detects it: every ONNX file contains the
facts of its own export, and the golden outputs were recorded when the bundle was made.
"""

import json
import platform
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto
from onnx.numpy_helper import to_array

from export.bundle.golden import FOLDER, WIDEST, outputs_of, parts, spread, tolerance_of
from export.bundle.inside import Json, brief, contained, get, read_json
from export.bundle.read import Bundle
from export.bundle.sandbox import require_sound
from export.errors import BundleError
from export.names import CLASSES_KEY, LABELS, MANIFEST, PREPROCESS, PREPROCESS_KEY, RECIPE_KEY, SCORE_KEY, TARGET_KEY
from export.onnx_file.model_file import inspect, parse
from export.onnx_file.names import module_of
from export.onnx_file.targets import TARGETS, Target, host_target
from export.onnx_file.uint8_input import with_uint8_input
from export.onnx_file.wiring import Wiring, is_quantized, weights, wire
from export.proof.audit import Audit, audit
from export.runtime.environment import runtime
from export.runtime.native import RUNTIME_ERRORS, first_line
from export.runtime.providers import PLAIN, Runtime
from export.serving.triton import answering_model

ROUNDED = 1.01  # a bundle's tolerances are rounded to three digits
# Between what an export measured and what bundle.json states, for a float network: beyond it the number was made up. A run demands far
# less of its own files (`compress.report.judge.parity`), which were scored on the same machine.
MADE_UP = 0.02
X86 = ("cpu_avx2", "cpu_vnni")

# Errors of adding operators to a graph that uses their names.
UNFIT: tuple[type[Exception], ...] = (ValueError, onnx.checker.ValidationError, *RUNTIME_ERRORS)

Broken = Iterator[BundleError]


def broken_promises(bundle: Bundle, name: str, runs_in: Runtime = PLAIN) -> Broken:
    """Yield every difference between a sound model file and the bundle's documents."""
    path = bundle.files[name]
    file, precision = wire(parse(path)), inspect(path).precision
    listed: Json = get(get(bundle.manifest, MANIFEST, "files", dict), MANIFEST, name, dict)
    metadata = file.model.metadata_props
    target = target_of(bundle, name)
    yield from other_recipe(bundle, path, metadata)
    yield from other_classes(bundle, path, metadata)
    yield from other_preprocessing(bundle, path, metadata)
    if precision == "fp32":
        yield from other_accuracy(path, metadata, listed)
    if target is not None:
        yield from other_target(bundle, path, metadata, target)
    if precision == "int8" and target is not None:
        # Another CPU's kernels leave other layers in float, so the optimized graph is checked only on the target's kind of CPU.
        optimized = audit(path) if runs_as(target) else None
        yield from off_grid(path, file, target, optimized)
        yield from unpromised_float_layers(path, file, optimized, listed)
    # If sums saturate on only one kind of CPU, outputs differ between machines and cannot be checked.
    if precision != "int8" or target in (None, TARGETS["cpu_avx2"], host_target()):
        for place in dict.fromkeys((PLAIN, runs_in)):
            yield from other_outputs(bundle, name, precision, place)


def other_answers(bundle: Bundle) -> Broken:
    """Yield an error if the model that gives predictions is not the served file between pixels and the task's last operators."""
    name = answering_model(bundle.name)
    if not (bundle.path / name).exists():
        return
    found = parse(require_sound(contained(bundle.path, name)))
    served = parse(bundle.files[bundle.served])
    try:
        made = bundle.task.finish(with_uint8_input(served, read_json(bundle.path, PREPROCESS)))
    except UNFIT as error:
        raise BundleError(
            f"{bundle.served}.onnx: cannot get pixels and predictions ({first_line(error)}): export it again"
        ) from error
    if not same_graph(found.graph, made.graph):
        yield BundleError(
            f"{name}: is not what {bundle.served}.onnx gives from pixels to predictions: get the bundle again",
            defect="other_copy",
        )


def same_graph(first: GraphProto, second: GraphProto) -> bool:
    """Tell whether two graphs compute the same: their nodes, ends and constants are equal, however these are stored."""
    if any(list(getattr(first, part)) != list(getattr(second, part)) for part in ("node", "input", "output")):
        return False
    tensors = [{one.name: to_array(one) for one in graph.initializer} for graph in (first, second)]
    return tensors[0].keys() == tensors[1].keys() and all(
        values.dtype == tensors[1][name].dtype
        and np.array_equal(values, tensors[1][name], equal_nan=values.dtype.kind == "f")
        for name, values in tensors[0].items()
    )


def target_of(bundle: Bundle, name: str) -> Target | None:
    """Return the target of a file: the one in its name, else the bundle's."""
    named = [target for target in TARGETS if name.endswith(f"_{target}")]
    return TARGETS.get(named[0] if named else bundle.target or "")


def runs_as(target: Target) -> bool:
    """Tell whether this machine's CPU leaves the same layers in float as the target's."""
    on_arm = platform.machine() in ("aarch64", "arm64")
    return target.name == "cpu_arm" if on_arm else target.name in X86


def stated(metadata: Mapping[str, str], key: str, path: Path) -> object:
    """Return a JSON value from a file's metadata, or None."""
    try:
        return json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path.name}: metadata: {key}: must be JSON ({error}): export it again", defect="wrong_facts"
        ) from error


def other_recipe(bundle: Bundle, path: Path, metadata: Mapping[str, str]) -> Broken:
    """Yield an error if the file is from another run than the bundle."""
    made, stated = metadata.get(RECIPE_KEY), bundle.manifest.get(RECIPE_KEY)
    if made is not None and made != stated:
        yield BundleError(
            f"{MANIFEST}: recipe_digest: {path.name} was made by {brief(made)}, got {brief(stated)}: get the bundle again",
            defect="wrong_facts",
        )


def other_classes(bundle: Bundle, path: Path, metadata: Mapping[str, str]) -> Broken:
    """Yield an error if labels.txt differs from the classes that the network was trained with."""
    classes = stated(metadata, CLASSES_KEY, path)
    if not isinstance(classes, list) or classes == list(bundle.labels):
        return
    for line, (label, name) in enumerate(zip_longest(bundle.labels, classes), 1):
        if label != name:
            yield BundleError(
                f"{LABELS}: line {line}: {path.name} was trained with {brief(name)} there, got {brief(label)}: "
                "get the bundle again",
                defect="labels_differ" if len(classes) == len(bundle.labels) else "missing_class",
            )
            return


def other_preprocessing(bundle: Bundle, path: Path, metadata: Mapping[str, str]) -> Broken:
    """Yield an error for the first value of preprocess.json that differs from the network's training."""
    trained = stated(metadata, PREPROCESS_KEY, path)
    if not isinstance(trained, dict):
        return
    document = read_json(bundle.path, PREPROCESS)
    if wrong := [key for key in trained if trained[key] != document.get(key)]:
        key = wrong[0]
        yield BundleError(
            f"{PREPROCESS}: {key}: {path.name} was trained with {trained[key]!r:.100}, got {document.get(key)!r:.100}: "
            "get the bundle again",
            defect="preprocess_differs",
        )


def other_accuracy(path: Path, metadata: Mapping[str, str], listed: Json) -> Broken:
    """Yield an error if bundle.json has another score for a float file than its export measured."""
    exported, measured = stated(metadata, SCORE_KEY, path), listed.get("score")
    if not isinstance(exported, float | int) or not isinstance(measured, float | int):
        return
    if not abs(exported - measured) <= MADE_UP:
        yield BundleError(
            f"{MANIFEST}: files.{path.stem}.score: {path.name} was exported with {exported}, got {measured}: "
            "get the bundle again",
            defect="accuracy_differs",
        )


def other_target(bundle: Bundle, path: Path, metadata: Mapping[str, str], target: Target) -> Broken:
    """Yield an error if a file was exported for another target than the bundle's."""
    exported = metadata.get(TARGET_KEY)
    # A calibrated file copies its metadata from the float file, which has the run's first target.
    if exported is not None and exported not in (target.name, bundle.target):
        yield BundleError(
            f"{MANIFEST}: target: {path.name} was exported for {brief(exported)}, got {target.name}: get the bundle again",
            defect="target_differs",
        )


def off_grid(path: Path, file: Wiring, target: Target, optimized: Audit | None) -> Broken:
    """Yield errors for layers whose integer weights are off the target's grid, in the file or after optimization."""
    grid = f"{target.name}'s grid [{target.weight_min}, {target.weight_max}]"
    wide: dict[str, int] = {}
    for layer in file.layers():
        tensor = weights(layer)
        levels = np.zeros(1) if tensor is None else tensor.numpy()
        if levels.dtype == np.int8 and (levels.min() < target.weight_min or levels.max() > target.weight_max):
            wide[module_of(layer.name)] = max(int(levels.max()), int(levels.min()), key=abs)
    if wide:
        shown = ", ".join(f"{name} ({level})" for name, level in list(wide.items())[:5])
        yield BundleError(
            f"{path.name}: {len(wide)} layers have weights off {grid}, where sums may saturate: {shown}: export it again",
            defect="saturating_weights",
        )
    if optimized is not None and optimized["quantized_by_runtime"] and target.weight_max < np.iinfo(np.int8).max:
        shown = ", ".join(optimized["quantized_by_runtime"][:5])
        yield BundleError(
            f"{path.name}: ONNX Runtime quantizes float weights by itself, off {grid}: {shown}: export it again",
            defect="saturating_weights",
        )


def unpromised_float_layers(path: Path, file: Wiring, optimized: Audit | None, listed: Json) -> Broken:
    """Yield an error for layers that compute in float but are not in bundle.json's `float_layers`."""
    in_file = {module_of(layer.name) for layer in file.layers() if not is_quantized(layer)}
    in_float = in_file if optimized is None else in_file.union(optimized["float_layers"])
    promised = listed.get("float_layers", [])
    known = {one for one in promised if isinstance(one, str)} if isinstance(promised, list) else set()
    if extra := sorted(in_float - known):
        yield BundleError(
            f"{path.name}: {len(extra)} layers compute in float that {MANIFEST} does not name: {', '.join(extra[:5])}: "
            "export it again",
            defect="float_layers",
        )


def other_outputs(bundle: Bundle, name: str, precision: str, runs_in: Runtime) -> Broken:
    """Yield an error if a file's outputs for the golden inputs differ in a provider from the golden ones."""
    golden, file, where = bundle.golden, f"{FOLDER}/{name}.npy", "" if runs_in == PLAIN else f" in {runs_in}"
    for output, part in parts(golden.outputs[name], golden.several).items():
        most, promised = WIDEST[precision] * spread(part) * ROUNDED, golden.tolerance[name][output]
        if not promised <= most:
            yield BundleError(
                f"{MANIFEST}: golden.tolerance.{name}{output and f'.{output}'}: must be at most {most:.3g}, got {promised}: "
                "get the bundle again",
                defect="wrong_facts",
            )
    outputs, expected = outputs_of(bundle.files[name], golden.inputs, runs_in), golden.outputs[name]
    if outputs.shape != expected.shape:
        yield BundleError(
            f"{name}.onnx: its outputs have the shape {outputs.shape}, {file} has {expected.shape}: get the bundle again",
            defect="golden_differs",
        )
        return
    # Measured again: an older bundle states a wider one, and none for a provider that was not where it was made.
    stated = golden.tolerance if runs_in == PLAIN else golden.elsewhere.get(runs_in.key, {})
    known = outputs if runs_in == PLAIN else expected
    here = tolerance_of(bundle.files[name], precision, golden.inputs, known, bundle.preprocess, golden.several, runs_in)
    allowed = {one: min(stated.get(name, here)[one], value * ROUNDED) for one, value in here.items()}
    if different := golden.differing(name, outputs, allowed):
        apart, most = float(np.abs(outputs - expected).max()), max(allowed.values())
        yield BundleError(
            f"{name}.onnx: its outputs for {len(different)} of {len(golden.inputs)} golden inputs differ{where} from {file} by up to {apart:.3g} "
            f"(at most {most:.3g}), first image {different[0]} (made with ONNX Runtime "
            f"{brief(golden.made_with.get('onnxruntime'))}, here {runtime()['onnxruntime']}): get the bundle again; if this stays, "
            "python -m export.verify tells whether ONNX Runtime computes it rightly here",
            defect="golden_differs",
        )
