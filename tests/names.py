"""Write the names of the installed libraries' networks into compress/models/networks.txt: `make names` does it (20 minutes).

A name may be followed by `=` and a fingerprint of its parameters' names, by which `compress init` recognizes a checkpoint.
"""

import warnings
from collections.abc import Iterable

import timm
import torch
import torchvision

from compress.models.architectures import build, torchvision_names
from compress.models.cifar import CIFAR_NETWORKS
from compress.models.detectors import BUILDERS
from compress.models.known import LIST, OWN
from compress.models.recognize import fingerprint


def listing() -> str:
    """Return a line for each library: its name, its version, its networks."""
    lines = (
        ("torchvision", torchvision.__version__.partition("+")[0], torchvision_names()),
        ("timm", timm.__version__, timm.list_models()),
        ("cifar", OWN, CIFAR_NETWORKS),
        *((kind, OWN, backbones) for kind, (_, backbones) in BUILDERS.items()),
    )  # fmt: skip
    return "".join(f"{name} {version} {' '.join(entries(name, names))}\n" for name, version, names in lines)


def entries(library: str, names: Iterable[str]) -> Iterable[str]:
    """Yield each name, with its fingerprint where the network can be built without memory."""
    for name in sorted(names):
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")
                state = build(f"{library}:{name}", num_classes=1000).state_dict()
        except (RuntimeError, NotImplementedError, ValueError, TypeError):  # its start needs values
            yield name
        else:
            yield f"{name}={fingerprint(state)}"


if __name__ == "__main__":
    LIST.write_text(listing(), encoding="utf-8")
