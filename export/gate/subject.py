"""Open the bundle under judgement, after checking that it is complete, loads, and reproduces its golden outputs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from export.bundle.golden import outputs_of
from export.bundle.inside import get
from export.bundle.read import Bundle, read_bundle
from export.bundle.sandbox import vet
from export.errors import BundleError
from export.gate.baseline import Baseline
from export.gate.checks import Check
from export.gate.facts import facts
from export.names import MANIFEST
from export.runtime.environment import environment


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
        """The file that the bundle serves."""
        return self.bundle.files[self.bundle.served]


def open_subject(path: Path) -> Subject:
    """Check every digest, let ONNX Runtime optimize every file, and run the golden inputs.

    Model files are opened in the sandbox first. Raises BrokenBundleError if any of it fails.
    """
    try:
        bundle = read_bundle(path, inspect=vet)
        preprocess = json.loads(json.dumps(asdict(bundle.preprocess)))  # as in a baseline
        listed = get(bundle.manifest, MANIFEST, "files", dict)
        files = {name: facts(path, listed[name]) for name, path in bundle.files.items()}
        check_golden(bundle)
    except BundleError as error:
        if error.defect == "wrong_runtime":
            raise
        raise BrokenBundleError(str(error)) from error
    now = Baseline(
        bundle.name, bundle.task.name, bundle.served, bundle.labels, preprocess, environment=environment(), files=files
    )
    whole = Check("digests", "pass", limit="whole", detail=f"{len(bundle.files)} files, every digest right")
    golden = Check(
        "golden outputs", "pass", limit="in tolerance", detail=f"{len(bundle.golden.truths)} images in every file"
    )
    return Subject(bundle, now, (whole, golden))


def check_golden(bundle: Bundle) -> None:
    """Run the golden inputs through every file; BundleError if outputs differ from the golden ones."""
    for name, path in bundle.files.items():
        if differing := bundle.golden.differing(name, outputs_of(path, bundle.golden.inputs)):
            raise BundleError(
                f"{name}: golden outputs: {len(differing)} of {len(bundle.golden.truths)} images have other outputs than where "
                f"the bundle was made (first image {differing[0]}): the bundle is for another kind of machine, or the runtime is wrong"
            )
