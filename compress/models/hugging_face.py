"""Networks in folders of transformers. Runs no code in them."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.foreign import library
from export.runtime.native import first_line


def hugging_face(name: str, _num_classes: int = 0) -> nn.Module:
    """Return the network in a folder that transformers' save_pretrained wrote, of the class that its config names; of CLIP and its like the image tower.

    Raises ModelError for other folders, and for a network that takes more than images.
    """
    transformers = library("transformers", "transformers")
    transformers.utils.logging.disable_progress_bar()
    if not (Path(name) / "config.json").is_file():
        raise ModelError(f"hf:{name}: must be a folder that save_pretrained wrote, with config.json; give that folder")
    (named,) = (json.loads((Path(name) / "config.json").read_text()).get("architectures") or [""])[:1]
    kind = getattr(transformers, named, None) or transformers.AutoModelForImageClassification
    try:
        network: nn.Module = kind.from_pretrained(
            name, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"hf:{name}: transformers cannot load it as {named or 'an image classifier'} ({first_line(error)})"
        ) from error
    if (takes := getattr(network, "main_input_name", "pixel_values")) != "pixel_values":
        if hasattr(network, "get_image_features") and hasattr(network, "text_model"):
            return _ImageTower(network).eval()
        raise ModelError(f"hf:{name}: {named} takes {takes}, not images alone; save its vision tower by itself")
    return network.eval()


class _ImageTower(nn.Module):
    """What embeds images in a network of images and texts, such as CLIP or SigLIP, where they are compared with texts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name in [*dict(network.named_children()), *dict(network.named_parameters(recurse=False))]:
            if name.startswith(("text", "logit")):
                delattr(network, name)
        self.network = network

    def forward(self, images: Tensor) -> Any:
        """Return the tokens and the embedding, `pooler_output`."""
        embed: Any = self.network.get_image_features
        return embed(images)
