"""The losses that a recipe can ask for: one section each, chosen by `name`. docs/students.md has their formulas."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from compress.recipe.section import BelowOne, Fraction, Section

THIS = Field(description="This loss.")


class Term(Section):
    """The fields of every loss."""

    name: Annotated[str, THIS]
    weight: PositiveFloat = 1.0
    """Factor in the sum of losses."""
    schedule: Literal["constant", "linear_up", "linear_down", "cosine_down"] = "constant"
    """How the weight changes over the training: constant, linearly from 0, linearly to 0, or by half a cosine to 0."""
    warmup: Fraction = 0.0
    """Fraction of the training over which the weight first rises linearly from zero (DKD's authors: 20 of 240 epochs)."""


class CrossEntropyTerm(Term):
    """Cross-entropy with the labels."""

    name: Annotated[Literal["cross_entropy"], THIS]
    label_smoothing: BelowOne = 0.0
    """Probability moved from the label to all classes evenly."""


class DiceTerm(Term):
    """Overlap of predictions and labels, with equal weight for each class (Milletari 2016); for segmentation, besides cross-entropy."""

    name: Annotated[Literal["dice"], THIS]


class LogitTerm(Term):
    """The fields of every loss between the two networks' logits."""

    standardize: bool = False
    """First give each image's logits mean 0 and deviation 1, in both networks (Sun 2024, with weight 9 for kd at temperature 2)."""


class KDTerm(LogitTerm):
    """The teacher's soft targets (Hinton 2015)."""

    name: Annotated[Literal["kd"], THIS]
    temperature: PositiveFloat = 2.0
    """Divides both networks' logits before the softmax."""


class MSETerm(LogitTerm):
    """The squared difference of the logits (Ba & Caruana 2014)."""

    name: Annotated[Literal["mse"], THIS]


class DKDTerm(LogitTerm):
    """Decoupled knowledge distillation (Zhao 2022); the target class of a mixed image is its most probable one."""

    name: Annotated[Literal["dkd"], THIS]
    alpha: NonNegativeFloat = 1.0
    """Weight of the target class against all others."""
    beta: NonNegativeFloat = 8.0
    """Weight of the other classes among themselves (the authors take 8 for CIFAR-100, 0.5 for ImageNet)."""
    temperature: PositiveFloat = 4.0
    """Divides both networks' logits before the softmax (the authors take 4 for CIFAR-100, 1 for ImageNet)."""


class DISTTerm(LogitTerm):
    """Correlation of the predictions, image by image and class by class (Huang 2022)."""

    name: Annotated[Literal["dist"], THIS]
    beta: NonNegativeFloat = 1.0
    """Weight of the correlation over the classes of each image."""
    gamma: NonNegativeFloat = 1.0
    """Weight of the correlation over the batch for each class."""
    temperature: PositiveFloat = 1.0
    """Divides both networks' logits before the softmax."""


class NKDTerm(LogitTerm):
    """Normalized knowledge distillation (Yang 2023); the target class of a mixed image is its most probable one."""

    name: Annotated[Literal["nkd"], THIS]
    gamma: NonNegativeFloat = 1.5
    """Weight of the other classes (the authors take 1.5 for ImageNet, 3.5 for CIFAR-100)."""
    temperature: PositiveFloat = 1.0
    """Divides the other classes' logits before their softmax (the authors take 1 for ImageNet, 3 for CIFAR-100)."""


class FeatureTerm(Term):
    """The fields of every loss between the two networks' features."""

    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    """Module paths in the student whose outputs are compared, in forward order; the loss is the sum over them."""
    teacher_layers: tuple[str, ...] = ()
    """Module paths in the teacher, one for each of `layers`; empty takes the same paths."""

    @model_validator(mode="after")
    def _pairs(self) -> "FeatureTerm":
        if self.teacher_layers and len(self.teacher_layers) != len(self.layers):
            raise ValueError(
                f"teacher_layers: must name one layer for each of the {len(self.layers)} in layers, got {len(self.teacher_layers)}"
            )
        return self


class BoxesTerm(Term):
    """Distance of the student's boxes from the teacher's, where the teacher is sure of an object (detection)."""

    name: Annotated[Literal["boxes"], THIS]


class PKTTerm(FeatureTerm):
    """Probabilistic transfer: which images are neighbours (Passalis 2018)."""

    name: Annotated[Literal["pkt"], THIS]
    weight: PositiveFloat = 30000.0
    """Factor in the sum of losses (mdistiller's 30000)."""


class CWDTerm(FeatureTerm):
    """Where in the image each channel is strong (Shu 2021); for class maps, such as those of a segmentation network's `classifier`."""

    name: Annotated[Literal["cwd"], THIS]
    weight: PositiveFloat = 3.0
    """Factor in the sum of losses (the authors' 3 for class maps)."""
    temperature: PositiveFloat = 4.0
    """Divides both networks' maps before the softmax over their positions (the authors' 4)."""


class PKDTerm(FeatureTerm):
    """Correlation of the features, channel by channel (Cao 2022), whatever their scale; for feature pyramids."""

    name: Annotated[Literal["pkd"], THIS]
    weight: PositiveFloat = 6.0
    """Factor in the sum of losses (the authors' 6 for one-stage detectors)."""


class ReviewTerm(FeatureTerm):
    """Knowledge review: each layer, fused with all later ones, is compared with the teacher's (Chen 2021)."""

    name: Annotated[Literal["review"], THIS]
    layers: Annotated[tuple[str, ...], Field(min_length=2)]
    """Module paths in the student, at least two, in forward order; each is fused with the later ones."""


AnyLogitTerm = KDTerm | MSETerm | DKDTerm | DISTTerm | NKDTerm
AnyFeatureTerm = PKTTerm | CWDTerm | PKDTerm | ReviewTerm
LossTerm = Annotated[
    CrossEntropyTerm | DiceTerm | BoxesTerm | AnyLogitTerm | AnyFeatureTerm,
    Field(discriminator="name"),
]
LABELLED = ("dkd", "nkd")  # need every image's label
OF_LABELS = (*LABELLED, "cross_entropy", "dice")
KD_ONLY: tuple[LossTerm, ...] = (KDTerm(name="kd"),)
MSE_ONLY: tuple[LossTerm, ...] = (MSETerm(name="mse"),)
