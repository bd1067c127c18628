"""The recipe: one frozen object that says everything a run does.

Only the shape lives here. `compress.recipe.read` reads it from YAML; stages translate its sections into plain arguments.
Imports no torch: `compress check` ends in under a second.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from compress.data.teachers import foreign
from compress.recipe.losses import LABELLED
from compress.recipe.order import first_mistake
from compress.recipe.section import Arch, Channels, Drop, Name, PathText, Section, Size, refuse_tag
from compress.recipe.stages import DistillStage, PruneStage, QatStage, SourceStage, StageSection
from export.tasks import TASKS


def known_task(name: str) -> str:
    """Return the name of a task that networks can be made for."""
    if name not in TASKS:
        raise ValueError(f"task: must be one of {', '.join(TASKS)}, got {name!r}")
    return name


Int8Target = Literal["cpu_avx2", "cpu_vnni", "cpu_arm", "tensorrt"]


class Augment(Section):
    """Random changes of the training images; teacher and student always see the same view."""

    crop: Literal["none", "pad", "random_resized"] = "none"
    """How training images are cropped: not at all, shifted inside a padded border, or by a random area and aspect ratio."""
    pad: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    """The border that `crop: pad` adds on each side, as a fraction of the image size."""
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The smallest area that `crop: random_resized` keeps, as a fraction of the image."""
    flip: bool = False
    """Mirror every second image left to right."""
    distort: bool = False
    """Change brightness, contrast, saturation and hue by chance, as SSD does: nothing moves, so boxes and masks stay right."""
    randaugment: Annotated[int, Field(ge=0, le=30)] = 0
    """The magnitude of RandAugment's two operations (0 switches it off; 9 is the paper's usual value)."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """The alpha of mixup's Beta distribution (0 switches it off)."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """The alpha of CutMix's Beta distribution (0 switches it off); with mixup also on, each image draws one of the two."""


EMBEDDED = ("digits", "scenes", "scenes_hard")


class Data(Section):
    """The images, their split, and how they reach the network."""

    dataset: Literal[
        "digits", "imagefolder", "cifar10", "cifar100", "fashion_mnist", "imagenette", "scenes", "scenes_hard"
    ] = "digits"
    """The data set; `digits` is embedded in scikit-learn, `scenes` are made of them (for segmentation and detection), `imagefolder` reads `path` (and is meant where only `path` is given), the others download to `path`."""
    path: PathText | None = None
    """The folder that holds the data set: images, or shards of them (docs/images.md)."""
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width in pixels that the network sees; null takes the data set's own (digits 32, imagefolder 224)."""
    resize: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Evaluation resizes the shorter side to `image_size * resize`, then crops the centre (ImageNet's usual value is 1.143)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """The mean that is subtracted from each channel, for pixels in [0, 1]."""
    std: Annotated[tuple[float, float, float], Field()] = (0.229, 0.224, 0.225)
    """The standard deviation that divides each channel, for pixels in [0, 1]."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of each class that is held out for validation, by seed, where the data set has no validation set."""
    judge_by: Literal["validation", "tuning"] = "validation"
    """Which images judge: the validation images, or `tuning`: `val_fraction` of each class of the training images, held out; the validation images then stay unseen, as while `compress search` chooses."""
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Draws the images that are held out, and those of `limit_per_class`; null takes `seed`."""
    limit_per_class: PositiveInt | None = None
    """Use at most this many training images of each class (the first ones, after a shuffle by seed)."""
    skip_broken: bool = False
    """Leave out unreadable images, and count and name them in the log, instead of stopping at the first."""
    ignore_index: Annotated[int, Field(ge=0, lt=2**16)] | None = None
    """What a mask holds where a pixel is neither learned from nor judged; null is 255."""
    classes: PathText | None = None
    """A text file with the names of the network's classes in their order, one a line, for `task: unlabelled`, where no folder names them; null: what the teacher calls them, else their numbers."""
    balance: Literal["none", "sampler", "class_weights"] = "none"
    """For classes of unequal size: `sampler` draws training images with replacement so that every class comes as often (an epoch is as long as ever); `class_weights` weighs losses against labels by the inverse of each class's frequency (docs/losses.md)."""
    unlabelled: PathText | None = None
    """A folder of further images, at any depth, that need no label: only distillation, `qat` and calibration see them. Those that are trained on or judged by already are left out, by content."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes; null chooses: none for small images in memory, one for each core otherwise."""
    eval_batch_size: PositiveInt = 128
    """Images in a batch of validation or calibration."""
    augment: Augment = Augment()
    """Random changes of the training images."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "Data":
        if self.dataset == "imagefolder" and self.path is None:
            raise ValueError("path: an imagefolder needs its folder: give DATA=/path/to/images, or set data.path")
        if self.dataset in EMBEDDED and self.path is not None:
            raise ValueError(
                f"path: {self.dataset} are embedded and have no folder, got {self.path!r}: set data.dataset: imagefolder to read it"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std: must be > 0 in every channel, got {self.std}")
        return self


class Model(Section):
    """The teacher's network and where its weights come from."""

    arch: Arch
    """`torchvision:NAME`, `timm:NAME`, `cifar:NAME` (32-pixel networks of the papers), `onnx:FILE`, `hf:FOLDER` or `exported:FILE.pt2` with their own weights, `fpn:BACKBONE` or `smp:DECODER/ENCODER` for segmentation, a detector as `ssd:`, `ssdlite:`, `retinanet:` or `fcos:BACKBONE`, or `file.py:factory` (a person's own; needs --trust-code)."""
    weights: PathText | None = None
    """A state dict (.safetensors, .pt, .pth or .ckpt; in torch's files other entries are left aside), or the library's named weights as `torchvision:IMAGENET1K_V2` or `timm:TAG`; null trains here."""
    reset_head: bool = False
    """Start the classifier anew and keep all other weights, where these were trained on other classes."""

    @model_validator(mode="after")
    def _arch_is_no_weights(self) -> "Model":
        refuse_tag(self.arch)
        return self


class Teacher(Section):
    """Another network that teaches, in whatever form it is saved."""

    network: Arch
    """`onnx:FILE` (any framework's, run by ONNX Runtime), `hf:FOLDER` (of transformers' save_pretrained), `exported:FILE.pt2` (of torch.export.save), or named as `model.arch` is."""
    weights: PathText | None = None
    """The weights of a network that does not bring its own, as `model.weights`."""
    image_size: Size | None = None
    """Height and width in pixels that it takes, to which the student's view is resized; null is the student's size."""
    mean: Channels | None = None
    """The mean that it wants subtracted, for pixels in [0, 1]; null is `data.mean`."""
    std: Channels | None = None
    """The standard deviation that it wants divided by, for pixels in [0, 1]; null is `data.std`."""
    classes: PathText | None = None
    """A text file with the names of its outputs in their order, one a line, of which the data's classes may be some; null: they are the data's classes in order, or what `hf:` calls them."""

    @model_validator(mode="after")
    def _network_is_no_weights(self) -> "Teacher":
        refuse_tag(self.network)
        if foreign(self.network) is None and self.weights is None:
            raise ValueError(f"weights: {self.network} starts from random ones, which teach nothing: give its weights")
        return self


class Teaching(Section):
    """How students get the teacher's predictions while they train."""

    mode: Literal["cached", "online"] = "cached"
    """`cached` runs the teacher once on each view and keeps its logits below `out` for every stage, student and trial; `online` runs it on every batch. Losses on features are always online, and so are teachers that answer with maps or anchors."""
    views: PositiveInt = 8
    """Augmented views of each training image (crop, flip, colours, mixing partner) that the cache holds; epochs cycle through them."""
    top_k: PositiveInt | None = None
    """Keep only the k largest logits of an image, and spread the rest of the probability evenly; null keeps all, at two bytes each."""


class Targets(Section):
    """What the run must reach; a miss fails it with exit code 1."""

    max_drop: Drop | None = None
    """Largest loss of score from the teacher to the deployed file, as a fraction (0.01 is one point)."""
    max_class_drop: Drop | None = None
    """Largest loss of recall in any class from the teacher to the deployed file, as a fraction (0.01 is one point)."""
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    """Smallest speed-up of the deployed file over the teacher's FP32: CPU with one thread (or the target's own provider), batch 1, the largest image size timed."""
    min_int8_speedup: Annotated[float, Field(gt=0)] | None = None
    """Smallest speed-up of the INT8 file over the same student in FP32, under the same conditions."""
    max_size_ratio: Annotated[float, Field(gt=0)] | None = None
    """Largest size of the deployed file, as a fraction of the teacher's FP32 file."""
    max_macs_ratio: Annotated[float, Field(gt=0)] | None = None
    """Largest fraction of the teacher's multiply-accumulates."""
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    """Largest median latency of the deployed file in ms, under the conditions of `min_speedup`."""


class Student(Section):
    """One of several students of the same teacher."""

    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]
    """The stages that follow the recipe's own, which all students share."""
    targets: Targets | None = None
    """What this student must reach; null takes the recipe's."""


class Recipe(Section):
    """Everything a run does."""

    schema_version: Literal[1] = 1
    """The version of this format."""
    name: Name
    """The run's name, and its folder under `out`: lower-case letters, digits, `-` and `_`, the first a letter or digit, at most 64."""
    task: Annotated[str, AfterValidator(known_task)] = "classification"
    """What the network is for."""
    target: Literal["auto", "cuda"] | Int8Target = "auto"
    """Where the student will run; auto reads this machine's instruction sets; cuda is FP16 (it has no INT8 convolution)."""
    further_targets: tuple[Int8Target, ...] = ()
    """Further kinds of machines: each gets an INT8 file, calibrated and trained on its own grid."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Drives every random choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training runs."""
    out: PathText = "runs"
    """The folder that holds the runs."""
    log_to: tuple[Literal["mlflow", "trackio", "wandb"], ...] = ()
    """Where epochs, report and bundle are sent, too (docs/tracking.md); each finds its server by its own environment variables."""
    data: Data = Data()
    """The images."""
    model: Model | None = None
    """The network that is compressed, and the teacher where there is no other; null where `teacher` teaches a `student`."""
    teacher: tuple[Teacher, ...] = ()
    """Another network that teaches instead: one, or several whose mean prediction teaches; each by its `network` alone or with fields."""
    teaching: Teaching = Teaching()
    """How students get the teacher's predictions."""
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]
    """The stages, in order."""
    students: dict[Name, Student] = Field(default={})
    """Several students by name (spelled as a run's name): each continues from the shared stages, and one report compares them."""
    targets: Targets = Targets()
    """What must be reached."""

    def chains(self) -> dict[str, "Recipe"]:
        """Return each student's recipe by name: the shared stages and its own. A recipe without students is its own only chain, named ""."""
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
        """Return where a stage of a student's chain stands in the recipe, such as `students.a.stages.0`."""
        own = index - len(self.stages)
        return f"stages.{index}" if own < 0 else f"students.{student}.stages.{own}"

    @model_validator(mode="after")
    def _chains_make_sense(self) -> "Recipe":
        for name, chain in self.chains().items():
            mistake = first_mistake(chain.stages)
            if mistake is not None:
                index, text = mistake
                raise ValueError(f"{self.place(name, index)}{text}")
        return self

    @model_validator(mode="after")
    def _teacher_is_trained(self) -> "Recipe":
        source = self.stages[0]
        if isinstance(source, SourceStage) and source.fit is not None and not TASKS[self.task].labelled:
            raise ValueError("stages.0.fit: there are no labels to train on: give model.weights, or a teacher")
        if self.model is None:
            return self._teacher_is_another(source)
        if not isinstance(source, SourceStage):
            return self
        given = self.model.weights is not None or foreign(self.model.arch) is not None
        if source.fit is None and (source.fine_tune or not given):
            raise ValueError(
                "stages.0.fit: without model.weights the teacher is trained here: say how, or give WEIGHTS=file"
            )
        if self.model.reset_head and not source.fine_tune:
            raise ValueError("model.reset_head: leaves the classifier untrained: also set stages.0.fine_tune: true")
        return self

    @model_validator(mode="after")
    def _unlabelled_images_have_a_use(self) -> "Recipe":
        if self.data.unlabelled is None:
            return self
        for chain in self.chains().values():
            for section in chain.stages:
                for term in section.loss if isinstance(section, DistillStage | QatStage) else ():
                    if term.name in LABELLED:
                        raise ValueError(
                            f"data.unlabelled: {term.name} in {section.stage} needs every image's label: take kd or dist"
                        )
        return self

    @model_validator(mode="after")
    def _class_weights_have_a_loss(self) -> "Recipe":
        if self.data.balance == "class_weights" and not any(
            (isinstance(section, SourceStage) and section.fit is not None)
            or (isinstance(section, PruneStage) and section.sparsity is not None)
            or (
                isinstance(section, DistillStage | QatStage) and "cross_entropy" in [term.name for term in section.loss]
            )
            for chain in self.chains().values()
            for section in chain.stages
        ):
            raise ValueError(
                "data.balance: class_weights weighs cross_entropy, and nothing here learns by it: add that loss, or take sampler"
            )
        return self

    def _teacher_is_another(self, source: StageSection) -> "Recipe":
        if not self.teacher:
            raise ValueError("model: name the network to compress, or a teacher: whose student a student stage starts")
        if isinstance(source, SourceStage) and source.fit is not None:
            raise ValueError("stages.0.fit: a given teacher is not trained: leave it out, or name the network as model")
        for name, chain in self.chains().items():
            if isinstance(source, SourceStage) and [section.stage for section in chain.stages[1:2]] not in (
                [],
                ["student"],
            ):
                raise ValueError(
                    f"{self.place(name, 1)}: {chain.stages[1].stage} needs the network itself, and a teacher only answers: name the "
                    "network as model, or put a student stage here"
                )
        return self

    @model_validator(mode="after")
    def _target_has_int8(self) -> "Recipe":
        stages = {section.stage for chain in self.chains().values() for section in chain.stages}
        quantizing = [name for name in ("ptq", "qat") if name in stages]
        if self.target == "cuda" and quantizing:
            raise ValueError(
                f"target: cuda runs FP16, ONNX Runtime's CUDA provider has no INT8 convolution: leave out {' and '.join(quantizing)}, "
                "or name the target that INT8 is for (tensorrt, cpu_avx2, cpu_vnni, cpu_arm)"
            )
        return self

    @model_validator(mode="after")
    def _targets_are_measured(self) -> "Recipe":
        for name, chain in self.chains().items():
            stages = {section.stage for section in chain.stages}
            place = f"students.{name}.targets" if name and self.students[name].targets else "targets"
            for target in [target for target, value in chain.targets if value is not None]:
                if target != "max_macs_ratio" and "bench" not in stages:
                    raise ValueError(
                        f"{place}.{target}: a bench stage measures it: add `- stage: bench`, or leave it out"
                    )
                if target == "min_int8_speedup" and not stages & {"ptq", "qat"}:
                    raise ValueError(f"{place}.{target}: there is no INT8 file: add `- stage: ptq`, or leave it out")
        return self

    @model_validator(mode="after")
    def _cache_holds_what_losses_need(self) -> "Recipe":
        if self.teaching.top_k is None or self.teaching.mode == "online":
            return self
        for chain in self.chains().values():
            for section in chain.stages:
                for term in section.loss if isinstance(section, DistillStage | QatStage) else ():
                    if term.name == "mse" or getattr(term, "standardize", False):
                        what = "mse" if term.name == "mse" else f"{term.name} with standardize"
                        raise ValueError(
                            f"teaching.top_k: {what} in {section.stage} needs every logit: leave top_k out, or set teaching.mode: online"
                        )
        return self
