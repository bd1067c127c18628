"""Write the names of the installed libraries' networks into compress/models/networks.txt: `make names` does it (20 minutes).

A name may be followed by `=` and a fingerprint of its parameters' names, by which `compress init` recognizes a checkpoint.
"""

import warnings
from collections.abc import Iterable

import timm
import torchvision

from compress.models.architectures import torchvision_names
from compress.models.cifar import CIFAR_NETWORKS
from compress.models.detectors import BUILDERS
from compress.models.known import LIST, OWN
from compress.models.recognize import BUILT, fingerprint, unfilled
from compress.models.segmenters import RESIDUAL


def networks() -> Iterable[tuple[str, str, list[str]]]:
    """Yield each library's name, its version, and its networks' names."""
    yield "torchvision", torchvision.__version__.partition("+")[0], sorted(torchvision_names())
    yield "timm", timm.__version__, sorted(timm.list_models())
    yield "cifar", OWN, sorted(CIFAR_NETWORKS)
    yield "fpn", OWN, sorted(RESIDUAL)
    for kind, (_, backbones) in BUILDERS.items():
        yield kind, OWN, sorted(backbones)


def entry(library: str, name: str) -> str:
    """Return a network's name with its fingerprint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f"{name}={fingerprint(unfilled(f'{library}:{name}', BUILT).state_dict())}"


if __name__ == "__main__":
    lines = (
        f"{library} {version} {' '.join(entry(library, name) for name in names)}\n"
        for library, version, names in networks()
    )
    LIST.write_text("".join(lines), encoding="utf-8")
