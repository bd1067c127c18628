"""The libraries' networks by name, without importing the libraries: `networks.txt` lists those of the tested versions.

`make names` renews the list from the installed libraries.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from compress.errors import ModelError
from export.errors import did_you_mean

LIST = Path(__file__).with_name("networks.txt")
OWN = "-"  # the version of networks that are part of this package
LACKS = {
    "torchvision": "torchvision has no network",
    "timm": "timm has no model",
    "cifar": "there is no network for CIFAR",
    "yolox": "pixeltable-yolox has no network",
    "smp": "segmentation-models-pytorch has no decoder",
    **dict.fromkeys(("fpn", "ssd", "ssdlite", "retinanet", "fcos"), "there is no backbone"),
}


@dataclass(frozen=True)
class Library:
    """The networks of one version of a library: `fingerprints` of their parameters' names, by network ("" if unknown)."""

    version: str
    fingerprints: Mapping[str, str]

    def is_installed(self, name: str) -> bool:
        """Tell whether the library is installed in this version."""
        try:
            return self.version == OWN or self.version == metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            return False


@cache
def libraries() -> dict[str, Library]:
    """Return the listed libraries that are installed in the listed version."""
    lines = [line.split() for line in LIST.read_text(encoding="utf-8").splitlines()]
    found = {
        name: Library(version, {entry.partition("=")[0]: entry.partition("=")[2] for entry in entries})
        for name, version, *entries in lines
    }
    return {name: library for name, library in found.items() if library.is_installed(name)}


def check_listed(arch: str) -> None:
    """Raise ModelError for a network that is not in the list of its library, if the library is listed."""
    library, _, name = arch.rpartition(":")
    if library in libraries():
        check_name(library, name, libraries()[library].fingerprints)


def check_name(library: str, name: str, known: Iterable[str]) -> None:
    """Raise ModelError, with the nearest names, for a network that the library does not have."""
    if name not in (names := tuple(known)):
        raise ModelError(f"{library}:{name}: {LACKS[library]} of this name; {suggestion(name, names)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a did-you-mean for an unknown name."""
    known = sorted(known)
    return did_you_mean(name, known, f"known are {', '.join(known[:8])}{', …' if len(known) > 8 else ''}", most=3)
