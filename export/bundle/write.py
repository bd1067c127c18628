"""Write a bundle to a temporary folder, read it back, and move it into place in one step."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from export.bundle.ends import OF_SEVERAL, SCHEMA_VERSION, end
from export.bundle.golden import IMAGES, INPUTS, Golden, make_golden, tolerances_json, write_arrays
from export.bundle.inside import Json
from export.bundle.read import NAME, entry, preprocess_of, read_bundle
from export.command.files import json_text, put_folder, sha256, write_text
from export.errors import BundleError
from export.images.listing import check_lengths, is_label
from export.names import DECODER, LABELS, MANIFEST, PREPROCESS, RECIPE_KEY, SUMS, VALIDATION
from export.onnx_file.model_file import ModelFile, inspect
from export.onnx_file.outputs import Output
from export.runtime.providers import PLAIN, runtimes
from export.serving.protocol import write_kserve, write_requests
from export.serving.triton import Serving, write_repositories
from export.tasks import task_named


@dataclass(frozen=True)
class Contents:
    """The contents of a bundle to write.

    `files` are the models by name; `metrics` has each file's score and agreement. `images` (n, height, width, channels) and `truths`
    (n, ...) are the golden ones, `validation` has the digests of the validation images. `documents` are further files by path,
    `providers` (keys of PROVIDERS) those in which the golden inputs run too, where this machine has them.
    """

    name: str
    files: Mapping[str, Path]
    serving: Serving
    preprocess: Mapping[str, object]
    labels: Sequence[str]
    images: NDArray[Any]
    truths: NDArray[Any]
    task: str
    target: str
    recipe_digest: str
    metrics: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    documents: Mapping[str, bytes] = field(default_factory=dict)
    validation: Sequence[str] = ()
    providers: Sequence[str] = ()
    outputs: Sequence[Output] = ()  # several, with their weights
    decoder: bytes | None = None  # a detector's decode.onnx


def write_bundle(out: Path, contents: Contents) -> None:
    """Write the bundle to `out` in one step, after reading it back; replace only another bundle.

    Raises BundleError for content that no reader would accept, and if the place cannot be written.
    """
    in_one_step(out, lambda folder: fill(folder, contents))


def in_one_step(out: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a bundle into an empty folder beside `out`, read it back, and rename it.

    Raises BundleError if `out` exists and is not a bundle, and if the place cannot be written.
    """
    if not is_replaceable(out):
        raise BundleError(f"{out}: exists and is not a bundle: move it away or name another place")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            aside = Path(folder, "new")
            aside.mkdir()
            fill(aside)
            read_bundle(aside)
            put_in_place(aside, out, old=Path(folder, "old"))
    except OSError as error:
        raise BundleError(
            f"{out}: cannot be written ({error.strerror}): free the disk or name another place"
        ) from error


def is_replaceable(out: Path) -> bool:
    """Tell whether `out` does not exist, is an empty folder, or is a bundle."""
    if out.is_symlink() or not out.is_dir():
        return not out.exists() and not out.is_symlink()
    return (out / MANIFEST).is_file() or not any(out.iterdir())


def fill(folder: Path, contents: Contents) -> None:
    """Write every file of the bundle into the empty `folder`, SHA256SUMS last."""
    if not NAME.fullmatch(contents.name):
        raise BundleError(f"name: must be lower-case letters, digits, - and _, got {contents.name!r}: rename the run")
    if bad := [label for label in contents.labels if not is_label(label)]:
        raise BundleError(f"labels: must be one printable line each, got {bad[0]!r}: rename the class")
    check_lengths("labels", contents.labels)
    facts = copy_models(folder, contents.files)
    write_text(folder / PREPROCESS, json_text(contents.preprocess))
    if contents.decoder is not None:
        (folder / DECODER).write_bytes(contents.decoder)
    write_text(folder / LABELS, "".join(f"{label}\n" for label in contents.labels))
    if contents.validation:
        write_text(folder / VALIDATION, "".join(f"{digest}\n" for digest in contents.validation))
    preprocess = preprocess_of(contents.preprocess)
    inputs = preprocess.normalize(contents.images)
    models = {name: (folder / f"{name}.onnx", fact.precision) for name, fact in facts.items()}
    golden = make_golden(
        models,
        contents.images,
        inputs,
        contents.truths,
        preprocess,
        [one for one in runtimes(contents.providers) if one != PLAIN],
        contents.outputs,
    )
    write_arrays(folder, golden)
    write_text(folder / MANIFEST, json_text(manifest(folder, contents, facts, golden)))
    write_serving(folder, contents, facts, golden)
    for name, content in contents.documents.items():
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute() or (folder / name).exists():
            raise BundleError(f"documents: {name!r}: must be a new file inside the bundle")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    write_text(folder / SUMS, "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths))


def copy_models(folder: Path, files: Mapping[str, Path]) -> dict[str, ModelFile]:
    """Copy the model files and return their facts; all must have the same input and outputs."""
    facts: dict[str, ModelFile] = {}
    for name, source in files.items():
        taken = (IMAGES, INPUTS, DECODER.removesuffix(".onnx"))
        if not NAME.fullmatch(name) or name in taken:
            raise BundleError(
                f"files: {name!r}: must be lower-case letters, digits, - and _, and not {' or '.join(taken)}"
            )
        shutil.copyfile(source, folder / f"{name}.onnx")
        facts[name] = inspect(folder / f"{name}.onnx")
    kinds = {(fact.input, fact.outputs) for fact in facts.values()}
    if len(kinds) != 1:
        raise BundleError(
            f"files: must have the same input and outputs, got {len(kinds)} kinds: export them from one run"
        )
    return facts


def manifest(folder: Path, contents: Contents, facts: Mapping[str, ModelFile], golden: Golden) -> Json:
    """Return the content of bundle.json."""
    served = contents.serving.served
    output, *more = map(end, facts[served].outputs)
    outputs = [
        {**one, "weight": of.weight, **({"unordered": True} if of.unordered else {})}
        for one, of in zip((output, *more), contents.outputs, strict=bool(more))
    ]
    return {
        "schema_version": OF_SEVERAL if more else SCHEMA_VERSION,
        "name": contents.name,
        "task": contents.task,
        **({} if contents.decoder is None else {"decode": DECODER}),
        "target": contents.target,
        RECIPE_KEY: contents.recipe_digest,
        "input": end(facts[served].input),
        **({"outputs": outputs} if more else {"output": output}),
        "served": served,
        "serving": asdict(contents.serving),
        "files": {
            name: entry(folder / f"{name}.onnx", fact) | dict(contents.metrics.get(name, {}))
            for name, fact in facts.items()
        },
        "golden": {
            "truths": task_named(contents.task).truths_json(golden.truths),
            "tolerance": tolerances_json(golden.tolerance),
            "made_with": golden.made_with,
            **(
                {"elsewhere": {place: tolerances_json(found) for place, found in golden.elsewhere.items()}}
                if golden.elsewhere
                else {}
            ),
        },
    }


def write_serving(folder: Path, contents: Contents, facts: Mapping[str, ModelFile], golden: Golden) -> None:
    """Write the folder serving/ from the files already in the bundle."""
    served = facts[contents.serving.served]
    image, found = golden.inputs[0].astype(served.input.dtype), golden.outputs[contents.serving.served][:1]
    write_repositories(folder, contents.name, facts, contents.serving, sample=image.tobytes())
    write_requests(folder, contents.name, served, image, found)
    write_kserve(folder, contents.name, contents.serving)


def put_in_place(new: Path, out: Path, *, old: Path) -> None:
    """Move `new` to `out`; a bundle already there is moved to `old` first, and back if that fails."""
    replaced = out.exists()
    if replaced:
        out.rename(old)
    try:
        put_folder(new, out)
    except OSError:
        if replaced:
            old.rename(out)
        raise
