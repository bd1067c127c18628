"""Open the bundle under judgement: whole, loadable, and answering as it did where it was made."""

from dataclasses import dataclass
from pathlib import Path

from export.bundle import Bundle, read_bundle
from export.errors import BundleError
from export.gate.checks import Check
from export.gate.facts import all_facts
from export.gate.golden import golden_check, served
from export.gate.hard import Now


class BrokenBundleError(BundleError):
    """Report a bundle that no gate needs to measure."""


@dataclass(frozen=True)
class Subject:
    """A bundle that was found whole, its files' facts, and the checks that say so."""

    bundle: Bundle
    now: Now
    checks: tuple[Check, ...]

    @property
    def served(self) -> Path:
        """The file that the bundle serves."""
        return self.bundle.files[self.now.served]


def open_subject(path: Path) -> Subject:
    """Read every digest, optimize every file, run the golden inputs. Raises BrokenBundleError where any of it fails."""
    try:
        bundle = read_bundle(path)
        preprocess = {
            key: list(value) if isinstance(value, tuple) else value for key, value in vars(bundle.preprocess).items()
        }
        now = Now(served(bundle), bundle.labels, preprocess, all_facts(bundle.files))
        golden = golden_check(bundle)
    except BundleError as error:
        raise BrokenBundleError(str(error)) from error
    if golden.status == "broken":
        raise BrokenBundleError(f"{golden.name}: {golden.detail}")
    return Subject(
        bundle,
        now,
        (Check("bundle", "pass", limit="whole", detail=f"{len(bundle.files)} files, every digest right"), golden),
    )
