"""Open the bundle under judgement, after checking that it is complete, loads, and reproduces its golden outputs."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from export.bundle.golden import outputs_of, tolerance_of
from export.bundle.inside import get
from export.bundle.read import Bundle, read_bundle
from export.bundle.sandbox import vet
from export.errors import BundleError
from export.gate.baseline import Baseline
from export.gate.checks import Check
from export.gate.facts import facts
from export.names import MANIFEST
from export.runtime.environment import environment
from export.runtime.providers import PLAIN, Runtime


class BrokenBundleError(BundleError):
    """Report a broken bundle, which need not be measured."""


@dataclass(frozen=True)
class Subject:
    """A sound bundle, what a baseline of it says before anything is measured, and the checks that it passed."""

    bundle: Bundle
    now: Baseline
    checks: tuple[Check, ...]

    @property
    def served(self) -> Path:
        """The file that is judged."""
        return self.bundle.files[self.bundle.served]


def open_subject(path: Path, runs_in: Runtime = PLAIN, file: str | None = None) -> Subject:
    """Check every digest, let ONNX Runtime optimize every file for the CPU, and run the golden inputs there and in `runs_in`.

    `file` is judged, by default the one that the bundle serves. Model files are opened in the sandbox first. Raises BrokenBundleError if any of it fails.
    """
    try:
        bundle = read_bundle(path, inspect=vet)
        preprocess = json.loads(json.dumps(asdict(bundle.preprocess)))  # as in a baseline
        listed = get(bundle.manifest, MANIFEST, "files", dict)
        files = {name: facts(path, listed[name]) for name, path in bundle.files.items()}
        check_golden(bundle, runs_in)
    except BundleError as error:
        if error.defect == "wrong_runtime":
            raise
        raise BrokenBundleError(str(error)) from error
    bundle = replace(bundle, served=bundle.file(file).stem)
    now = Baseline(
        bundle.name,
        bundle.task.name,
        bundle.served,
        bundle.labels,
        preprocess,
        environment=environment(),
        files=files,
        provider=runs_in.provider.name,
        arithmetic=runs_in.arithmetic,
        outputs=bundle.outputs,
    )
    whole = Check("digests", "pass", limit="whole", detail=f"{len(bundle.files)} files, every digest right")
    golden = Check(
        "golden outputs", "pass", limit="in tolerance", detail=f"{len(bundle.golden.truths)} images in every file"
    )
    return Subject(bundle, now, (whole, golden))


def check_golden(bundle: Bundle, runs_in: Runtime) -> None:
    """Run the golden inputs through every file, on the CPU and in `runs_in`; BundleError if outputs differ from the golden ones."""
    golden, listed = bundle.golden, get(bundle.manifest, MANIFEST, "files", dict)
    for place in dict.fromkeys((PLAIN, runs_in)):
        for name, path in bundle.files.items():
            allowed = golden.tolerance[name] if place == PLAIN else golden.elsewhere.get(place.key, {}).get(name)
            if allowed is None:
                kind, outputs = listed[name]["precision"], golden.outputs[name]
                allowed = tolerance_of(path, kind, golden.inputs, outputs, bundle.preprocess, golden.several, place)
            if differing := golden.differing(name, outputs_of(path, golden.inputs, place), allowed):
                where = "" if place == PLAIN else f" in {place}"
                raise BundleError(
                    f"{name}: golden outputs: {len(differing)} of {len(golden.truths)} images have other outputs{where} than where "
                    f"the bundle was made (first image {differing[0]}): the bundle is for another kind of machine, or the runtime is wrong"
                )
