"""The base class and the field types of a recipe's sections."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Drop = Annotated[float, Field(ge=0, le=0.5)]  # loss of a score, as a fraction; 1 is refused, as it means one point
NAME = r"^[a-z0-9][a-z0-9_\-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]  # becomes a folder's name
Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=4)]
PathText = Annotated[str, Field(min_length=1)]
Arch = Annotated[
    str,
    Field(
        pattern=r"^((torchvision|cifar|fpn|ssd|ssdlite|retinanet|fcos):[a-z0-9_]+|yolox:[a-z]+|smp:[a-z0-9]+/[A-Za-z0-9_.\-]+|timm:[A-Za-z0-9_.\-]+|onnx:.+|hf:.+|exported:.+|.+\.py:[A-Za-z_]\w*)$"
    ),
]


class Section(BaseModel):
    """A frozen section of a recipe; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _one_size(given: object) -> object:
    """Return a size as it is compared and written: one number where height and width are equal."""
    if given is None:
        return given
    sides = list(given) if isinstance(given, list | tuple) else [given]
    if len(sides) not in (1, 2) or not all(type(side) is int and 8 <= side <= 1024 for side in sides):
        raise PydanticCustomError("size", "must be one whole number of pixels or [height, width], from 8 to 1024 each")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


Size = Annotated[int | tuple[int, int], BeforeValidator(_one_size)]
OptionalSize = Annotated[int | tuple[int, int] | None, BeforeValidator(_one_size)]


def refuse_tag(arch: str) -> None:
    """Raise ValueError where `arch` contains a tag of pretrained weights, which it does not load."""
    library, _, name = arch.partition(":")
    name, dot, tag = name.partition(".")
    if library == "timm" and dot:
        raise ValueError(
            f"arch: {arch} names pretrained weights, which arch does not load; "
            f"give arch: timm:{name}, and weights: timm:{tag} to start from them"
        )
