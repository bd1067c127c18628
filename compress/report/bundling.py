"""Gather the contents of a run's bundle, and publish a finished one."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from compress.artifact import lineage, read_meta, students_of
from compress.data.teachers import foreign
from compress.errors import ArtifactError
from compress.recipe import strict_yaml
from compress.recipe.arguments import as_served
from compress.recipe.schema import Recipe
from compress.report.distribution import own_distribution
from compress.report.page.card import card
from compress.report.page.html import render
from compress.report.shape import Report
from export.bundle.inside import contained, read_sums
from export.bundle.read import preprocess_of, read_bundle
from export.bundle.write import Contents, in_one_step
from export.command.files import json_text
from export.images.size import Written, size_of
from export.names import (
    AUDIT_JSON,
    BUNDLE,
    DECODER,
    GOLDEN_NPZ,
    LABELS,
    PAGE,
    PREPROCESS,
    RECIPE_YAML,
    REPORT_JSON,
    SUMS,
    VALIDATION,
)
from export.onnx_file.model_file import inspect
from export.onnx_file.roles import FP16, FP32, PTQ, QAT, deployed, files_in, name_for
from export.onnx_file.targets import CPU, TARGETS, Target, resolve_target
from export.onnx_file.uint8_input import with_uint8_input
from export.runtime.providers import PROVIDERS
from export.serving.triton import Kind, Serving, answering_repository, share
from export.signature import sign
from export.tasks import task_named
from export.tasks.decoder import Decoder


def contents(recipe: Recipe, name: str, root: Path, exported: Path, report: Report) -> Contents:
    """Return the contents of the bundle `name` for the run in `root`; `exported` is its export stage's folder."""
    files, target = files_in(exported), resolve_target(recipe.target)
    preprocess = json.loads((exported / PREPROCESS).read_text())
    labels = (exported / LABELS).read_text(encoding="utf-8").splitlines()
    with np.load(exported / GOLDEN_NPZ) as golden:
        images, truths = golden["images"], golden["truths"]
    serving = serving_of(report, files, target, size=preprocess["image_size"])
    facts = inspect(files[serving.served])
    outputs = as_served(recipe, facts.signature)
    decoder = (exported / DECODER).read_bytes() if (exported / DECODER).exists() else None
    # Leave out whether a stage was reused, so that running again makes the same bytes.
    report = {**report, "stages": [{**row, "cached": False} for row in report["stages"]]}
    readme = card(
        report,
        name=name,
        served=serving.served,
        classes=len(labels),
        golden=len(images),
        tensors={"input": facts.input, "outputs": facts.outputs},
        outputs=outputs,
        decoder=decoder,
    )
    texts = {
        "README.md": readme,
        RECIPE_YAML: strict_yaml.dump(recipe.model_dump(mode="json")),
        "environment.json": json_text(report["environment"]),
        REPORT_JSON: json_text(report),
        PAGE: render(report, root),
        "LICENSE": own_distribution().read_text("licenses/LICENSE") or "",
        "NOTICE": notice(recipe, name),
    }
    further: dict[str, bytes] = {}
    bits = preprocess_of(preprocess).bits
    if bits == 8 and any(section.stage == "export" and section.uint8_input for section in recipe.stages):
        pixels = with_uint8_input(onnx.load(files[serving.served]), preprocess)
        task = task_named(recipe.task, outputs, Decoder(decoder) if decoder else None)
        further = answering_repository(name, task.finish(pixels), unlike=facts)
    return Contents(
        name=name,
        files=files,
        serving=serving,
        preprocess=preprocess,
        labels=labels,
        images=images,
        truths=truths,
        task=recipe.task,
        target=target.name,
        recipe_digest=read_meta(lineage(exported)[-2]).key,
        metrics=metrics_of(report, files, json.loads((exported / AUDIT_JSON).read_text())),
        documents={name: text.encode() for name, text in texts.items()} | further,
        validation=(exported / VALIDATION).read_text().splitlines(),
        providers=[
            key for key, row in PROVIDERS.items() if any(one["provider"] == row.name for one in report["deployed"])
        ],
        outputs=outputs,
        decoder=decoder,
    )


def metrics_of(
    report: Report, files: Mapping[str, Path], audits: Mapping[str, Mapping[str, object]]
) -> dict[str, dict[str, object]]:
    """Return each file's score and, for an INT8 file, its float layers; any other float layer would be a defect."""
    rows = {row["name"]: row for row in report["deployed"]}
    scored = {name: {key: rows[name][key] for key in ("score", "agreement")} for name in files if name in rows}
    in_float = {
        name: {"float_layers": audits[name]["float_layers"]}
        for name, path in files.items()
        if inspect(path).precision == "int8"
    }
    return {name: {**scored.get(name, {}), **in_float.get(name, {})} for name in files}


def serving_of(report: Report, files: Mapping[str, Path], target: Target, *, size: Written) -> Serving:
    """Return the file to serve on each kind of machine, with the threads and the batch of its best throughput in the bench.

    On the recipe's target that is the recommended file, else the one made for it.
    """
    kind: Kind = {"cuda": "cuda", "tensorrt": "tensorrt"}.get(target.name, "cpu")  # type: ignore[assignment]
    recommended = report["recommendation"] and report["recommendation"]["file"]
    half = FP16 if FP16 in files else FP32  # FP16 is missing if its outputs were not finite
    symmetric = [name_for(made, TARGETS["tensorrt"], target) for made in (QAT, PTQ)]
    chosen: dict[Kind, str] = {
        "cpu": FP32,
        "cuda": half,
        "tensorrt": next((name for name in symmetric if name in files), half),
        kind: recommended or deployed(files, target),
    }
    timed = [row for row in report["deployed"] if size_of(row["image_size"]) == size_of(size)]
    on_cpu = [row for row in timed if (row["name"], row["provider"]) == (chosen["cpu"], CPU)]
    fastest = max(on_cpu, key=lambda row: row["throughput_ips"] or 0, default=None)
    batches = [row["batch"] for row in timed if row["name"] == chosen[kind]]
    # The bench ran one session per file, so its numbers hold for one instance.
    return Serving(chosen, kind, fastest and fastest["threads"], instances=1, max_batch_size=max(batches, default=1))


def notice(recipe: Recipe, name: str) -> str:
    """Return the NOTICE text: whose terms hold for which part of the bundle."""
    named = [(one.network, one.weights) for one in recipe.teacher]
    named = [*([] if recipe.model is None else [(recipe.model.arch, recipe.model.weights)]), *named]
    origins = "; ".join(
        f"{arch}, weights: {weights or ('its own' if foreign(arch) else 'none given: trained by this recipe')}"
        for arch, weights in named
    )
    return f"""\
{name}

Made with compress {own_distribution().version}. serving/triton-python/{name}/1/model.py is a part of it, under the Apache License 2.0 (LICENSE).
The weights descend from: {origins}. The images in golden/ and in serving/ are
validation images of: {recipe.data.dataset}. For weights and images the terms of their owners hold.
"""


def publish(run: Path, to: Path, *, key: Path | None) -> None:
    """Copy a finished run's bundle to `to` in one step, signed if a private key is given; replaces only another bundle.

    Raises ArtifactError if the run has no bundle, BundleError if it is damaged or cannot be signed or written.
    """
    source = run / BUNDLE
    if not source.is_dir():
        raise ArtifactError(students_of(run, BUNDLE) or f"{run}: has no bundle; run its recipe up to the export stage")
    read_bundle(source)

    def fill(folder: Path) -> None:
        sums = read_sums(source)
        models = {digest: name for name, digest in sums.items() if name.endswith(".onnx") and "/" not in name}
        for name in sorted([*sums, SUMS], key=lambda name: name not in models.values()):  # the models first
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (model := models.get(sums.get(name, ""), name)) != name:
                share(folder / model, folder / name)
            else:
                shutil.copyfile(contained(source, name), folder / name)
        if key is not None:
            sign(folder, key)

    in_one_step(to, fill)
