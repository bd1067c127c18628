"""A bundle's statement of its files' input and outputs, and of the file to serve."""

from export.bundle.inside import Json, brief, get, is_number
from export.errors import BundleError, ContentError
from export.names import MANIFEST
from export.onnx_file.model_file import ModelFile, Value
from export.onnx_file.outputs import Output

SCHEMA_VERSION, OF_SEVERAL = 3, 4  # the second for files of several outputs, in `outputs` instead of `output`
LARGEST = 1e6  # weight


def check_ends(manifest: Json, file: str, facts: ModelFile) -> None:
    """Raise BundleError if bundle.json's input and outputs differ from a model's."""
    ends: dict[str, object] = {"input": end(facts.input), "output": end(facts.outputs[0])}
    several = get({"outputs": []} | manifest, MANIFEST, "outputs", list)
    if several or facts.signature:
        ends = {"input": ends["input"], "outputs": [*map(end, facts.outputs)]}
        named = [{key: one[key] for key in one if key not in ("weight", "unordered")} for one in several]
        manifest = {**manifest, "outputs": named}
    for key, found in ends.items():
        if (stated := manifest.get(key)) != found:
            raise BundleError(
                f"{MANIFEST}: {key}: {file} has {found!r:.200}, got {stated!r:.200}: get the bundle again",
                defect="wrong_facts",
            )


def end(value: Value) -> Json:
    """Return an input or output as bundle.json has it."""
    return {"name": value.name, "shape": list(value.shape), "dtype": value.dtype}


def outputs_of(manifest: Json) -> tuple[Output, ...]:
    """Return the outputs where there are several, with their weights; empty for a single one."""
    found = get({"outputs": []} | manifest, MANIFEST, "outputs", list)
    if not found and manifest["schema_version"] == SCHEMA_VERSION:
        return ()
    for one in found:
        shape = one.get("shape") if isinstance(one, dict) else None
        sound = isinstance(shape, list) and len(shape) > 0 and all(type(size) is int and size > 0 for size in shape[1:])
        if (
            not sound
            or not isinstance(one.get("name"), str)
            or not is_number(weight := one.get("weight"))
            or not 0 < weight <= LARGEST
            or type(one.get("unordered", False)) is not bool
        ):
            raise ContentError(
                f"{MANIFEST}: outputs: must each have a name, a shape and a weight, got {brief(one)}: get the bundle again"
            )
    if len({one["name"] for one in found}) != len(found) or len(found) < 2:
        raise ContentError(
            f"{MANIFEST}: outputs: must be several with different names, got {brief(found)}: get the bundle again"
        )
    return tuple(
        Output(one["name"], tuple(one["shape"][1:]), float(one["weight"]), one.get("unordered", False)) for one in found
    )


def served_of(manifest: Json) -> str:
    """Return the name of the model to serve."""
    served, files = get(manifest, MANIFEST, "served", str), get(manifest, MANIFEST, "files", dict)
    if served not in files:
        raise ContentError(
            f"{MANIFEST}: served: must be one of {', '.join(files)}, got {brief(served)}: get the bundle again"
        )
    return served
