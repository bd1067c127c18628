"""The recipe: one frozen object that says everything a run does.

`compress.recipe.read` reads it from YAML; `compress.recipe.arguments` translates its sections into plain arguments.
Imports no torch, so `compress check` takes less than a second.
"""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress.data.named import DATA_SETS, DataName
from compress.data.teachers import foreign
from compress.recipe.section import Arch, Channels, Drop, Name, OptionalSize, PathText, Section, refuse_tag
from compress.recipe.sense import mistakes
from compress.recipe.stages import StageSection
from export.images.preprocess import Kernel, Look
from export.onnx_file.outputs import Softmax
from export.tasks import TASKS


def known_task(name: str) -> str:
    """Return the name of a known task; raise PydanticCustomError for another."""
    if name not in TASKS:
        raise PydanticCustomError("task", "must be one of {known}", {"known": ", ".join(TASKS)})
    return name


def weighted(outputs: object) -> object:
    """Return outputs with a section each, of a list or of their weights."""
    if isinstance(outputs, list | tuple):
        return {name: {} for name in outputs}
    if isinstance(outputs, dict):
        return {name: one if isinstance(one, dict | ServedOutput) else {"weight": one} for name, one in outputs.items()}
    return outputs


class ServedOutput(Section):
    """One of several outputs."""

    weight: PositiveFloat = 1.0
    """In the score and the losses."""
    unordered: bool = False
    """Its rows are a set, such as queries that top-k chose: compared after matching, together with those of other unordered outputs (docs/detectors.md)."""
    softmax: Softmax | None = Field(None, repr=False)  # no part of the outputs' text, as which they are in keys
    """Its channels are classes of which one is right: logits of a softmax, or its probabilities. Training then compares them by KL (docs/tensors.md)."""


Int8Target = Literal["cpu_avx2", "cpu_vnni", "cpu_arm", "tensorrt"]


class Augment(Section):
    """Random changes of the training images; teacher and student always see the same view."""

    crop: Literal["none", "pad", "random_resized"] = "none"
    """How training images are cropped: not at all, at a random place of the padded image, or to a random area and aspect ratio."""
    pad: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    """The border that `crop: pad` adds on each side, as a fraction of the image size."""
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The smallest area that `crop: random_resized` keeps, as a fraction of the image."""
    flip: bool = False
    """Mirror images left to right with probability 1/2."""
    distort: bool = False
    """Change brightness, contrast, saturation and hue at random, as SSD does; boxes and masks stay valid."""
    randaugment: Annotated[int, Field(ge=0, le=30)] = 0
    """The magnitude of RandAugment's two operations (0 switches it off; 9 is the paper's usual value)."""
    mixup: NonNegativeFloat = 0.0
    """The alpha of mixup's Beta distribution (0 switches it off)."""
    cutmix: NonNegativeFloat = 0.0
    """The alpha of CutMix's Beta distribution (0 switches it off); with mixup also on, each image draws one of the two."""


EMBEDDED = tuple(name for name, one in DATA_SETS.items() if one.embedded)


class Data(Section):
    """The images, their split, and how they reach the network."""

    dataset: DataName = "digits"
    """The data set: scikit-learn's `digits`, `scenes` composed of them (for segmentation, detection and multilabel), `imagefolder`, which reads `path` and is the default where `path` is set, or one that is downloaded to `path` (`voc` is Pascal VOC 2012, for segmentation and detection; `oxford_pets` for segmentation)."""
    path: PathText | None = None
    """The folder that holds the data set: images, or shards of them (docs/images.md)."""
    channels: Literal[1, 3, 4] = 3
    """1 for grey, depth or infrared of 8 or 16 bits, 3 for colour, 4 for colour and a fourth (docs/images.md)."""
    image_size: OptionalSize = None
    """Size of the network's input in pixels: one number for a square, or `[height, width]`; null takes the data set's own (digits 32, imagefolder 224)."""
    resize: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Evaluation resizes images until they cover `image_size * resize`, then crops the centre (ImageNet's usual value is 1.143)."""
    framing: Literal["crop", "stretch", "letterbox", "letterbox_corner"] | None = None
    """How evaluation brings an image to `image_size`: `crop` as `resize` says, `stretch` it, or keep its proportions in a `letterbox`, in the middle (YOLO) or in the top left corner (YOLOX). Null is crop, and stretch for detection."""
    pad_value: Annotated[int, Field(ge=0, le=255)] = Look.pad_value
    """The letterbox's colour, from 0 to 255."""
    interpolation: Kernel = "bilinear"
    """The kernel by which evaluation resizes images."""
    antialias: bool = True
    """Widen the kernel where images shrink, as Pillow does; false samples as OpenCV and TensorFlow do."""
    pixels: Literal["normalized", "unit", "bytes"] = "normalized"
    """The values that the network takes: normalized by `mean` and `std`, from 0 to 1 (YOLO), or from 0 to 255 (YOLOX)."""
    colors: Literal["rgb", "bgr"] = "rgb"
    """The order of an image's three channels, of `mean` and of `std`."""
    mean: Channels = (0.485, 0.456, 0.406)
    """The mean that is subtracted from each channel, for pixels in [0, 1]."""
    std: Channels = (0.229, 0.224, 0.225)
    """The standard deviation that divides each channel, for pixels in [0, 1]."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of each class that is held out for validation, by seed, where the data set has no validation set."""
    judge_by: Literal["validation", "tuning"] = "validation"
    """The images that scores are measured on: the validation images, or `tuning`, which holds out `val_fraction` of each class of the training images and leaves the validation images unused, as `compress search` does while it chooses."""
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Seed for the images that are held out and those of `limit_per_class`; null takes `seed`."""
    limit_per_class: PositiveInt | None = None
    """Use at most this many training images of each class, drawn by seed."""
    skip_broken: bool = False
    """Leave out unreadable images and list them in the log, instead of stopping at the first."""
    ignore_index: Annotated[int, Field(ge=0, lt=2**16)] | None = None
    """The value of mask pixels that count neither in training nor in scores; null is 255."""
    classes: PathText | None = None
    """For `task: unlabelled`: a text file with the names of the network's classes, in order, one a line; null takes the teacher's names, else numbers."""
    balance: Literal["none", "sampler", "class_weights"] = "none"
    """For classes of unequal size: `sampler` draws training images with replacement, all classes equally often (an epoch keeps its length); `class_weights` weighs cross-entropy by the inverse of each class's frequency (docs/students.md)."""
    unlabelled: PathText | None = None
    """A folder of further images, at any depth, without labels, for distillation, `qat` and calibration. Copies of training or validation images (by content) are left out."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes; null takes none for small images in memory, else one for each core."""
    eval_batch_size: PositiveInt = 128
    """Images in a batch of validation or calibration."""
    augment: Augment = Augment()
    """Random changes of the training images."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "Data":
        if self.dataset == "imagefolder" and self.path is None:
            raise ValueError("path: an imagefolder needs a folder: give DATA=/path/to/images, or set data.path")
        if self.dataset in EMBEDDED and self.path is not None:
            raise ValueError(
                f"path: {self.dataset} are built in and have no folder, got {self.path!r}: set data.dataset: imagefolder to read it"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(
                    f"{name}: must have a number for each channel ({self.channels}), got {len(values)}: set data.mean and data.std, "
                    "which compress init measures"
                )
        if self.pixels != "normalized" and not self.model_fields_set.isdisjoint(("mean", "std")):
            raise ValueError(f"pixels: {self.pixels} takes neither mean nor std: leave them out, or pixels")
        if self.colors == "bgr" and self.channels != 3:
            raise ValueError(f"colors: bgr needs three channels, got {self.channels}: leave it out")
        if self.framing != "crop" and self.framing is not None and self.resize != 1:
            raise ValueError(f"resize: {self.framing} keeps the whole image, got {self.resize:g}: leave it out")
        if self.channels != 3 and (self.augment.randaugment or self.augment.distort):
            raise ValueError("augment: randaugment and distort change red, green and blue: leave them out")
        if min(self.std) <= 0:
            raise ValueError(f"std: must be > 0 in every channel, got {self.std}")
        return self


class Model(Section):
    """The teacher's network and where its weights come from."""

    arch: Arch
    """`torchvision:NAME`, `timm:NAME`, `cifar:NAME` (32-pixel networks of the papers), `onnx:FILE`, `hf:FOLDER` or `exported:FILE.pt2` with their own weights, `fpn:BACKBONE` or `smp:DECODER/ENCODER` for segmentation, a detector as `ssd:`, `ssdlite:`, `retinanet:` or `fcos:BACKBONE`, `yolox:nano`, `tiny`, `s`, `m`, `l` or `x` with `decode: yolox`, or `file.py:factory` (your own; needs --trust-code)."""
    weights: PathText | None = None
    """A state dict (.safetensors, .pt, .pth or .ckpt, whose other entries are ignored), or the library's named weights as `torchvision:IMAGENET1K_V2` or `timm:TAG`; null trains here."""
    outputs: Annotated[
        dict[str, ServedOutput],
        BeforeValidator(
            weighted, json_schema_input_type=tuple[str, ...] | dict[str, PositiveFloat] | dict[str, ServedOutput]
        ),
    ] = Field(default={})
    """For `task: tensors`, or detection with `decode`, and a network of several outputs: the names of those to serve, in order, `name: weight` in the score and the losses, or `name: {weight, unordered, softmax}`; by default all, equally (docs/tensors.md)."""
    reset_head: bool = False
    """Initialize a new classifier (of a network with several heads, all layers with another number of outputs) and keep all other weights, for weights trained on other classes."""

    @model_validator(mode="after")
    def _arch_is_no_weights(self) -> "Model":
        refuse_tag(self.arch)
        return self


class OtherTeacher(Section):
    """Another network as the teacher."""

    network: Arch
    """`onnx:FILE` (of any framework, run by ONNX Runtime), `hf:FOLDER` (of transformers' save_pretrained), `exported:FILE.pt2` (of torch.export.save), or any `model.arch`."""
    weights: PathText | None = None
    """The weights of a network whose file has none, as in `model.weights`."""
    image_size: OptionalSize = None
    """Size of its input in pixels, one number or `[height, width]`, to which the student's views are resized; null takes the student's size."""
    mean: Channels | None = None
    """The mean that is subtracted from its input, for pixels in [0, 1]; null takes `data.mean`."""
    std: Channels | None = None
    """The standard deviation that divides its input, for pixels in [0, 1]; null takes `data.std`."""
    classes: PathText | None = None
    """A text file with the names of its outputs, in order, one a line; the data's classes may be a subset. Null takes the names in an `hf:` folder, else the data's classes in order."""

    @model_validator(mode="after")
    def _network_is_no_weights(self) -> "OtherTeacher":
        refuse_tag(self.network)
        if foreign(self.network) is None and self.weights is None:
            raise ValueError(f"weights: missing; {self.network} would teach with random ones: give its weights")
        return self


class TeacherCache(Section):
    """How students get the teacher's logits while they train."""

    mode: Literal["cached", "online"] = "cached"
    """`cached` runs the teacher once on each view and keeps its logits in `out` for every stage, student and trial; `online` runs it on every batch, as losses on features, segmentation and detection always do."""
    views: PositiveInt = 8
    """Number of augmented views (crop, flip, colours, mixing partner) of each training image in the cache; epochs cycle through them."""
    top_k: PositiveInt | None = None
    """Cache only the k largest logits of an image, and spread the remaining probability evenly; null caches all, at two bytes each."""


class Targets(Section):
    """What the run must reach; a miss fails it with exit code 1."""

    max_drop: Drop | None = None
    """Largest loss of score from the teacher to the deployed file, as a fraction (0.01 is one point)."""
    max_class_drop: Drop | None = None
    """Largest loss of recall in any class from the teacher to the deployed file, as a fraction (0.01 is one point)."""
    min_speedup: PositiveFloat | None = None
    """Smallest speed-up of the deployed file over the teacher's FP32 file: one CPU thread (or the target's own provider), batch 1, the largest image size timed."""
    min_int8_speedup: PositiveFloat | None = None
    """Smallest speed-up of the INT8 file over the student's FP32 file, under the same conditions."""
    max_size_ratio: PositiveFloat | None = None
    """Largest size of the deployed file, as a fraction of the teacher's FP32 file."""
    max_macs_ratio: PositiveFloat | None = None
    """Largest fraction of the teacher's multiply-accumulates."""
    max_latency_ms: PositiveFloat | None = None
    """Largest median latency of the deployed file in ms, under the conditions of `min_speedup`."""
    max_metric_drop: dict[Annotated[str, Field(pattern=r"^\S.*$")], NonNegativeFloat] = Field(default={})
    """Largest loss from the teacher to the deployed file of metrics beside the score, by their name in the report and in their own unit, as `{PSNR dB: 0.2}`."""


def known_decode(name: str) -> str:
    """Return the name of a decode; raise PydanticCustomError for another."""
    if not re.fullmatch(r"dense|yolox|queries|.+\.py:[A-Za-z_]\w*", name):
        raise PydanticCustomError("decode", "must be dense, yolox, queries or FILE.py:function")
    return name


class Decode(Section):
    """How a detector's outputs become boxes."""

    function: Annotated[str, AfterValidator(known_decode)]
    """`dense` rows of boxes and scores (YOLO), `yolox` undecoded, `queries` (DETR), or your own `file.py:function` of torch's operations (needs --trust-code; docs/detectors.md)."""
    detections: PositiveInt = 100
    """Most detections of an image."""
    least_score: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Boxes with this score or less are none."""
    most_overlap: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of two boxes of one class that overlap (IoU) by more, the one with the lower score is suppressed; 1 suppresses none. Null is 0.65, and 1 for queries."""


def named_function(given: object) -> object:
    """Return the name of a decode as its section."""
    return {"function": given} if isinstance(given, str) else given


class StudentChain(Section):
    """One of several students of the same teacher."""

    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]
    """This student's stages, after the recipe's own `stages`, which all students share."""
    targets: Targets | None = None
    """What this student must reach; null takes the recipe's `targets`."""


class Recipe(Section):
    """Everything a run does."""

    schema_version: Literal[1] = 1
    """The version of this format."""
    name: Name
    """The run's name, and its folder in `out`: at most 64 lower-case letters, digits, `-` and `_`, beginning with a letter or digit."""
    task: Annotated[str, AfterValidator(known_task)] = "classification"
    """What the network is for."""
    target: Literal["auto", "cuda"] | Int8Target = "auto"
    """Where the student will run: auto takes this machine's CPU; cuda is FP16, as ONNX Runtime has no INT8 convolution there."""
    further_targets: tuple[Int8Target, ...] = ()
    """Further kinds of machines; each gets an INT8 file, calibrated and trained on its own grid."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training runs."""
    out: PathText = "runs"
    """The folder that holds the runs."""
    log_to: tuple[Literal["mlflow", "trackio", "wandb"], ...] = ()
    """Experiment trackers that also get epochs, report and bundle (docs/running.md); each reads its own environment variables."""
    data: Data = Data()
    """The images."""
    model: Model | None = None
    """The network to compress, which is also the teacher unless `teacher` is set; null where a `student` stage starts another network."""
    teacher: tuple[OtherTeacher, ...] = ()
    """Another network as the teacher, or several, whose mean prediction is taught; each as its `network` alone or as a section."""
    teaching: TeacherCache = TeacherCache()
    """How students get the teacher's logits."""
    decode: Annotated[Decode, BeforeValidator(named_function, json_schema_input_type=str | Decode)] | None = None
    """For `task: detection` and a network that is none of the built-in detectors: how its outputs become boxes; the function alone, or a section."""
    score: Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")] | None = None
    """A metric of your own, `file.py:function` (needs --trust-code), from one image's outputs and its path to a number, numbers by name or a 1-D array; more is better. The bench measures it beside the score (docs/tensors.md)."""
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]
    """The stages, in order."""
    students: dict[Name, StudentChain] = Field(default={})
    """Several students by name (spelled like `name`): each continues from the shared stages, and one report compares them."""
    targets: Targets = Targets()
    """What the run must reach."""

    def chains(self) -> dict[str, "Recipe"]:
        """Return each student's recipe (the shared stages and its own) by name; without students, this recipe as ""."""
        return {
            name: self.model_copy(
                update={
                    "stages": (*self.stages, *student.stages),
                    "targets": student.targets or self.targets,
                    "students": {},
                }
            )
            for name, student in self.students.items()
        } or {"": self}

    def place(self, student: str, index: int) -> str:
        """Return the path of a stage of a student's chain in the recipe, such as `students.a.stages.0`."""
        own = index - len(self.stages)
        return f"stages.{index}" if own < 0 else f"students.{student}.stages.{own}"

    @model_validator(mode="after")
    def _makes_sense(self) -> "Recipe":
        if (mistake := next(mistakes(self), None)) is not None:
            raise ValueError(mistake)
        return self
