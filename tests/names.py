"""Write the names of the installed libraries' networks into compress/models/networks.txt: `make names` does it."""

import timm
import torchvision

from compress.models.architectures import torchvision_names
from compress.models.cifar import CIFAR_NETWORKS
from compress.models.detectors import BUILDERS
from compress.models.known import LIST, OWN


def listing() -> str:
    """Return a line for each library: its name, its version, its networks."""
    lines = (
        ("torchvision", torchvision.__version__.partition("+")[0], torchvision_names()),
        ("timm", timm.__version__, timm.list_models()),
        ("cifar", OWN, CIFAR_NETWORKS),
        *((kind, OWN, backbones) for kind, (_, backbones) in BUILDERS.items()),
    )  # fmt: skip
    return "".join(f"{name} {version} {' '.join(sorted(names))}\n" for name, version, names in lines)


if __name__ == "__main__":
    LIST.write_text(listing(), encoding="utf-8")
