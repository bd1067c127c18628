"""Open the bundle under judgement: whole, loadable, and answering as it did where it was made."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from export.bundle.golden import answer
from export.bundle.read import Bundle, read_bundle
from export.bundle.sandbox import vet
from export.errors import BundleError
from export.gate.checks import Check
from export.gate.facts import all_facts
from export.gate.hard import Now


class BrokenBundleError(BundleError):
    """Report a bundle that need not be measured."""


@dataclass(frozen=True)
class Subject:
    """A bundle that was found whole, its files' facts, and the checks that say so."""

    bundle: Bundle
    now: Now
    checks: tuple[Check, ...]

    @property
    def served(self) -> Path:
        """The file that the bundle serves."""
        return self.bundle.files[self.bundle.served]


def open_subject(path: Path) -> Subject:
    """Read every digest, let ONNX Runtime optimize every file, run the golden inputs.

    Model files are opened in a guarded process first. Raises BrokenBundleError where any of it fails.
    """
    try:
        bundle = read_bundle(path, inspect=vet)
        preprocess = json.loads(json.dumps(asdict(bundle.preprocess)))  # as a baseline holds it
        now = Now(bundle.served, bundle.labels, preprocess, all_facts(bundle.files))
        check_golden(bundle)
    except BundleError as error:
        raise BrokenBundleError(str(error)) from error
    whole = Check("digests", "pass", limit="whole", detail=f"{len(bundle.files)} files, every digest right")
    golden = Check(
        "golden outputs", "pass", limit="in tolerance", detail=f"{len(bundle.golden.truths)} images in every file"
    )
    return Subject(bundle, now, (whole, golden))


def check_golden(bundle: Bundle) -> None:
    """Run the golden inputs through every file. Raises BundleError where one answers otherwise than where the bundle was made."""
    for name, path in bundle.files.items():
        if differing := bundle.golden.differing(name, answer(path, bundle.golden.inputs)):
            raise BundleError(
                f"{name}: golden outputs: {len(differing)} of {len(bundle.golden.truths)} images get other outputs than where "
                f"the bundle was made (image {differing[0]} first): made for another kind of machine, or the runtime is wrong"
            )
