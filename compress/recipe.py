"""The recipe: one frozen object that says everything a run does.

Only the shape lives here. `compress.recipe_file` reads it from YAML; stages translate its sections into plain arguments.
Imports no torch: `compress check` answers in under a second.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from compress.recipe_losses import KD_ONLY, LossTerm
from compress.section import Fraction, Section

Kind = Literal["nothing", "float", "fakequant", "onnx"]
NAME = r"^[a-z0-9][a-z0-9_\-]{0,63}$"
CalibrationMethod = Literal["minmax", "percentile", "entropy"]
Int8Target = Literal["cpu_avx2", "cpu_vnni", "cpu_arm", "tensorrt"]
PathText = Annotated[str, Field(min_length=1)]
Arch = Annotated[
    str, Field(pattern=r"^(torchvision:[a-z0-9_]+|timm:[A-Za-z0-9_.\-]+|cifar:[a-z0-9_]+|.+\.py:[A-Za-z_]\w*)$")
]


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
    randaugment: Annotated[int, Field(ge=0, le=30)] = 0
    """The magnitude of RandAugment's two operations (0 switches it off; 9 is the paper's usual value)."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """The alpha of mixup's Beta distribution (0 switches it off)."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """The alpha of CutMix's Beta distribution (0 switches it off); with mixup also on, each batch draws one of the two."""


class Data(Section):
    """The images, their split, and how they reach the network."""

    dataset: Literal["digits", "imagefolder", "cifar10", "cifar100", "fashion_mnist", "imagenette"] = "digits"
    """The data set; `digits` is embedded in scikit-learn, `imagefolder` reads `path`, the others download to `path`."""
    path: PathText | None = None
    """The folder that holds the data set."""
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width in pixels that the network sees; null takes the data set's own (digits 32, imagefolder 224)."""
    resize: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Evaluation resizes the shorter side to `image_size * resize`, then crops the centre (ImageNet's usual value is 1.143)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """The mean that is subtracted from each channel, for pixels in [0, 1]."""
    std: Annotated[tuple[float, float, float], Field()] = (0.229, 0.224, 0.225)
    """The standard deviation that divides each channel, for pixels in [0, 1]."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The part held out for validation, by class and by seed, where the data set brings no validation set of its own."""
    limit_per_class: PositiveInt | None = None
    """Use only so many training images of each class (the first, after a shuffle by seed)."""
    skip_broken: bool = False
    """Leave out images that cannot be read, counted and named in the log, instead of stopping at the first."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes; null chooses: none for small images in memory, one for each core otherwise."""
    eval_batch_size: PositiveInt = 128
    """Images in a batch of validation or calibration."""
    augment: Augment = Augment()
    """Random changes of the training images."""

    @model_validator(mode="after")
    def _needs_path(self) -> "Data":
        if self.dataset == "imagefolder" and self.path is None:
            raise ValueError("path: an imagefolder needs its folder: give DATA=/path/to/images, or set data.path")
        if min(self.std) <= 0:
            raise ValueError(f"std: must be > 0 in every channel, got {self.std}")
        return self


class Model(Section):
    """The teacher's network and where its weights come from."""

    arch: Arch
    """`torchvision:NAME`, `timm:NAME`, `cifar:NAME` (32-pixel networks of the papers), or `file.py:factory` (a person's own; needs --trust-code)."""
    weights: PathText | None = None
    """A .safetensors, .pt or .pth state dict, or the library's named weights as `torchvision:IMAGENET1K_V2` or `timm:TAG`; null trains here."""
    reset_head: bool = False
    """Keep the weights' body and start the classifier anew, for weights trained on other classes."""


class Teaching(Section):
    """How the teacher answers while students train."""

    mode: Literal["cached", "online"] = "cached"
    """Each view of an image is answered once, and the logits are kept below `out` for every stage, student and study; or on every batch anew. Losses on features always ask online."""
    views: PositiveInt = 8
    """Views of each training image (crop, flip, colours, mixing partner) that a cached teacher answers; epochs go round them."""
    top_k: PositiveInt | None = None
    """Keep so many logits of an image, the largest, and spread the rest of the probability evenly; null keeps all, two bytes each."""


class Stop(Section):
    """When a training ends before its last epoch: the first condition that holds after an epoch ends it."""

    patience: PositiveInt | None = None
    """Epochs in a row without a rise of the validation top-1 by more than `min_delta`."""
    min_delta: Fraction = 0.0
    """The rise that `patience` waits for; 0.001 is a tenth of a point."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Begin no epoch that would end after so many minutes of training, a killed run's earlier ones included."""
    top1: Fraction | None = None
    """The validation top-1 that is enough."""

    @model_validator(mode="after")
    def _some_condition(self) -> "Stop":
        if self.patience is None and self.max_minutes is None and self.top1 is None:
            raise ValueError("patience: give at least one of patience, max_minutes and top1, or leave `stop` out")
        if self.min_delta and self.patience is None:
            raise ValueError(
                f"min_delta: is what `patience` waits for: set patience, too, got min_delta {self.min_delta}"
            )
        return self


class Fit(Section):
    """One training run."""

    epochs: PositiveInt
    """Passes over the training images."""
    batch_size: PositiveInt = 64
    """Images in a step, over all ranks together."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: Annotated[float, Field(gt=0)] = 0.05
    """The peak learning rate, after the warm-up."""
    # Fields with `exclude_if` are left out of the dump where they change nothing, so that artifacts made before them keep their keys.
    schedule: Annotated[Literal["cosine", "step"], Field(exclude_if=lambda schedule: schedule == "cosine")] = "cosine"
    """How the rate falls after the warm-up: by half a cosine to zero, or by `gamma` at each of `milestones`."""
    milestones: Annotated[tuple[PositiveInt, ...], Field(exclude_if=lambda milestones: not milestones)] = ()
    """Epochs after which `schedule: step` multiplies the rate by `gamma`."""
    gamma: Annotated[float, Field(gt=0, lt=1, exclude_if=lambda gamma: gamma == 0.1)] = 0.1
    """The factor of `schedule: step`."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    nesterov: Annotated[bool, Field(exclude_if=lambda nesterov: nesterov)] = True
    """Nesterov's momentum; false is the plain one, which most papers train with."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of convolution and linear weights."""
    decay_vectors: Annotated[bool, Field(exclude_if=lambda decay_vectors: not decay_vectors)] = False
    """Weight decay of biases and batch-norms, too, as most papers train."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the weights' moving average, which then is the result (0 switches it off)."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """The largest norm of the gradient (0 switches clipping off)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; auto is bf16 on a GPU that has it and fp32 elsewhere, and fp32 in the qat stage."""
    compile: bool = False
    """Run the training step through torch.compile; the log says what it costs and gains."""
    # Left out of the dump at their defaults, so that artifacts made before they existed keep their keys.
    micro_batches: Annotated[PositiveInt, Field(exclude_if=lambda parts: parts == 1)] = 1
    """Parts that a batch is computed in, one after the other; where memory runs out, one process doubles it by itself."""
    stop: Annotated[Stop | None, Field(exclude_if=lambda stop: stop is None)] = None
    """Conditions that end the training before its last epoch."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "Fit":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: must be < epochs ({self.epochs}), got {self.warmup_epochs}")
        return self

    @model_validator(mode="after")
    def _steps_are_reached(self) -> "Fit":
        shown = list(self.milestones)
        if (self.schedule == "step") != bool(shown):
            raise ValueError(f"milestones: schedule step needs them and cosine has none, got {shown}")
        if shown != sorted(set(shown)) or (shown and shown[-1] >= self.epochs):
            raise ValueError(f"milestones: must rise and be < epochs ({self.epochs}), got {shown}")
        return self


class SourceStage(Section):
    """The teacher: weights given, or trained here."""

    stage: Literal["source"]
    """This stage."""
    fit: Fit | None = None
    """How the teacher is trained when `model.weights` is null (or with `fine_tune`)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability moved from the label to all classes evenly while the teacher trains."""
    fine_tune: bool = False
    """Train given weights further on this data."""


class StudentStage(Section):
    """Another network, usually a smaller one, to learn from the teacher in the place of the pruned teacher."""

    stage: Literal["student"]
    """This stage."""
    arch: Arch
    """The network, named as `model.arch` is."""
    weights: PathText | None = None
    """Weights to start from, named as `model.weights` are; null starts from random ones."""
    reset_head: bool = False
    """Keep the weights' body and start the classifier anew, for weights trained on other classes."""

    @property
    def is_trained(self) -> bool:
        """Whether the network knows its classes before anything taught it."""
        return self.weights is not None and not self.reset_head


class Sparsity(Section):
    """A training phase before the cut that pushes whole groups towards zero (DepGraph's group regularizer)."""

    fit: Fit
    """How long and how fast."""
    strength: Annotated[float, Field(gt=0)] = 1e-4
    """Factor of the group penalty's gradient."""


class PruneStage(Section):
    """Remove whole channels by Torch-Pruning's dependency graph."""

    stage: Literal["prune"]
    """This stage."""
    criterion: Literal["l1", "l2", "taylor", "fpgm", "bn_scale", "random"] = "l2"
    """How a channel's importance is scored."""
    scope: Literal["global", "local", "isomorphic"] = "global"
    """Channels compete over the whole network, inside their own layer group, or among groups of the same structure."""
    keep_macs: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fraction of multiply-accumulates that stays."""
    keep_params: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fraction of parameters that stays."""
    steps: PositiveInt = 1
    """Cuts: 1 is one-shot; more score again after each cut (and recover in between where `recover` is given)."""
    recover: Fit | None = None
    """Distillation between the cuts of an iterative plan."""
    round_to: PositiveInt = 8
    """Widths stay multiples of this; 8 is what the fast INT8 and FP32 kernels need."""
    min_keep: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """No layer loses more than the rest of this fraction of its channels."""
    score_batches: PositiveInt = 8
    """Training batches that criteria with gradients (taylor) average over."""
    sparsity: Sparsity | None = None
    """Optional sparsity learning before the cut."""
    exclude: tuple[str, ...] = ()
    """Module paths (shell patterns such as `layer4.*`) whose outputs are never cut; the classifier never is."""

    @model_validator(mode="after")
    def _one_goal(self) -> "PruneStage":
        if (self.keep_macs is None) == (self.keep_params is None):
            raise ValueError("keep_macs: give exactly one of keep_macs and keep_params")
        return self


class DistillStage(Section):
    """Recover accuracy under the teacher."""

    stage: Literal["distill"]
    """This stage."""
    fit: Fit
    """How long and how fast."""
    loss: Annotated[tuple[LossTerm, ...], Field(min_length=1)] = KD_ONLY
    """A weighted sum of losses."""


class PtqStage(Section):
    """INT8 without training, by every method; then tuning until the accuracy holds. The network itself passes through unchanged."""

    stage: Literal["ptq"]
    """This stage."""
    calibration_images: PositiveInt = 512
    """Training images that set the activations' ranges."""
    methods: Annotated[tuple[CalibrationMethod, ...], Field(min_length=1)] = ("minmax", "percentile", "entropy")
    """How ranges are chosen: each is measured, and tuning tries them in this order."""
    neural_compressor: bool = True
    """Also measure neural-compressor's own static quantization."""
    max_top1_drop: Fraction = 0.01
    """The loss of top-1 from the float student that tuning may leave; 0.01 is one point."""
    max_trials: PositiveInt = 12
    """Files that tuning builds and scores at most."""
    score_images: PositiveInt | None = None
    """Validation images that each file is scored on; null takes all."""


class QatStage(Section):
    """Quantization-aware training on the target's grid, under the teacher's soft targets."""

    stage: Literal["qat"]
    """This stage."""
    fit: Fit | None = None
    """How long and how fast; null takes the last float training's, with a tenth of its epochs and a hundredth of its rate."""
    loss: Annotated[tuple[LossTerm, ...], Field(min_length=1)] = KD_ONLY
    """A weighted sum of losses."""
    ranges: Literal["moving_average", "lsq"] = "moving_average"
    """How the grid's scales are found: a moving average of each batch's minimum and maximum, or learned with the weights (LSQ)."""
    calibration: CalibrationMethod = "minmax"
    """How the activations' first ranges are chosen."""
    calibration_images: PositiveInt = 512
    """Training images that set the activations' first ranges."""
    freeze_ranges_at: Fraction = 0.5
    """The part of the training after which moving ranges stay as they are (learned ones go on)."""
    freeze_batchnorm_at: Fraction = 0.25
    """The part of the training after which batch-norm uses its running statistics."""
    reestimate_batchnorm_images: Annotated[int, Field(ge=0)] = 0
    """Training images that measure batch-norm's statistics anew after the training (0 keeps the running ones)."""
    keep_float: tuple[str, ...] = ()
    """Module paths (shell patterns such as `features.0.*`) that stay in float on purpose."""
    skip_if_ptq_drop_below: Fraction | None = None
    """Do not train where the ptq stage lost less top-1 than this against the float student."""
    max_top1_drop: Fraction | None = None
    """After training, put the worst layers back to float until no more than this is lost against the float student."""

    @model_validator(mode="after")
    def _ranges_do_not_decay(self) -> "QatStage":
        if self.ranges == "lsq" and self.fit is not None and self.fit.decay_vectors:
            raise ValueError("fit.decay_vectors: would shrink the ranges that lsq learns: leave it out")
        return self


class AuditLimits(Section):
    """What the optimized graph of the deployed file may hold at most; more fails the run and names the layers."""

    max_float_layers: Annotated[int, Field(ge=0)] | None = None
    """Convolutions and matrix products that run in float."""
    max_float_fraction: Fraction | None = None
    """The part of the multiply-accumulates that run in float."""
    max_leftover_qdq: Annotated[int, Field(ge=0)] | None = None
    """QuantizeLinear and DequantizeLinear nodes that the optimizer left, besides the one at each end."""
    min_agreement: Fraction | None = None
    """The fraction of images on which the file must answer as the trained fake-quantized network does."""


class ExportStage(Section):
    """ONNX files for the serving stack."""

    stage: Literal["export"]
    """This stage."""
    verify_images: PositiveInt = 1000
    """Validation images on which the INT8 file is compared with the trained network, tensor by tensor on some of them."""
    uint8_input: bool = True
    """Also write the INT8 file with uint8 pixels (batch, height, width, 3) as input and the normalization inside."""
    # Left out of the dump where it changes nothing, as in recipe_losses.
    golden_images: Annotated[int, Field(ge=1, le=64, exclude_if=lambda images: images == 8)] = 8
    """Validation images that the bundle carries, with what each file answers, for whoever serves it to compare."""
    limits: AuditLimits = AuditLimits()
    """What the optimized graph may hold."""


class BenchStage(Section):
    """Accuracy and latency in ONNX Runtime."""

    stage: Literal["bench"]
    """This stage."""
    batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)
    """Batch sizes to time."""
    threads: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1, 0)
    """CPU threads to time with; 0 is all of them."""
    image_sizes: tuple[PositiveInt, ...] = ()
    """Further image sizes to time, besides the recipe's own."""
    providers: Annotated[tuple[Literal["cpu", "cuda"], ...], Field(min_length=1)] = ("cpu", "cuda")
    """Where to time; a provider that this machine lacks is left out and the report says so."""
    seconds: Annotated[float, Field(gt=0)] = 1.0
    """Time for each file at each setting."""
    blocks: Annotated[int, Field(ge=4)] = 10
    """Interleaved blocks; medians and the intervals come from them."""


StageSection = Annotated[
    SourceStage | StudentStage | PruneStage | DistillStage | PtqStage | QatStage | ExportStage | BenchStage,
    Field(discriminator="stage"),
]

# What each stage takes and gives; the order of a recipe's stages is judged by this and by nothing else.
TAKES: dict[str, frozenset[Kind]] = {
    "source": frozenset({"nothing"}),
    "student": frozenset({"float"}),
    "prune": frozenset({"float"}),
    "distill": frozenset({"float"}),
    "ptq": frozenset({"float"}),
    "qat": frozenset({"float"}),
    "export": frozenset({"float", "fakequant"}),
    "bench": frozenset({"onnx"}),
}
GIVES: dict[str, Kind] = {
    "source": "float",
    "student": "float",
    "prune": "float",
    "distill": "float",
    "ptq": "float",
    "qat": "fakequant",
    "export": "onnx",
    "bench": "onnx",
}


class Targets(Section):
    """What the run must reach; a miss fails it with exit code 1."""

    max_top1_drop: Fraction | None = None
    """Largest loss of top-1 from the teacher to the deployed file, as a fraction (0.01 is one point)."""
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    """Smallest speed-up of the deployed file over the teacher's FP32: CPU with one thread (or the target's own provider), batch 1, the largest image size timed."""
    min_int8_speedup: Annotated[float, Field(gt=0)] | None = None
    """Smallest speed-up of the INT8 file over the same student in FP32, under the same conditions."""
    max_size_ratio: Annotated[float, Field(gt=0)] | None = None
    """Largest size of the deployed file, as a fraction of the teacher's FP32 file."""
    max_macs_ratio: Annotated[float, Field(gt=0)] | None = None
    """Largest fraction of the teacher's multiply-accumulates."""


class Student(Section):
    """One of several students of the same teacher."""

    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]
    """What is done after the recipe's own stages, which all students share."""
    targets: Targets | None = None
    """What this student must reach; null takes the recipe's."""


class Recipe(Section):
    """Everything a run does."""

    schema_version: Literal[1] = 1
    """The version of this format."""
    name: Annotated[str, Field(pattern=NAME)]
    """The run's name, and its folder under `out`."""
    task: Literal["classification"] = "classification"
    """What the network is for."""
    target: Literal["auto", "cuda"] | Int8Target = "auto"
    """Where the student will run; auto reads this machine's instruction sets; cuda is FP16 (it has no INT8 convolution)."""
    further_targets: tuple[Int8Target, ...] = ()
    """Further machines that get INT8 files of their own, each calibrated and trained on its grid."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Drives every random choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training runs."""
    out: PathText = "runs"
    """The folder that holds the runs."""
    data: Data = Data()
    """The images."""
    model: Model
    """The teacher."""
    teaching: Teaching = Teaching()
    """How it answers."""
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]
    """What is done, in order."""
    students: dict[Annotated[str, Field(pattern=NAME)], Student] = Field(
        default={}, exclude_if=lambda students: not students
    )
    """Several students by name: each goes on from the shared stages, and one report compares them."""
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

    @model_validator(mode="after")
    def _chains_make_sense(self) -> "Recipe":
        for name, chain in self.chains().items():
            mistake = next(filter(None, (judge(chain) for judge in JUDGES)), None)
            if mistake is not None:
                index, text = mistake
                own = index - len(self.stages)
                place = f"stages.{index}" if own < 0 else f"students.{name}.stages.{own}"
                raise ValueError(f"{place}{text}")
        return self

    @model_validator(mode="after")
    def _teacher_is_trained(self) -> "Recipe":
        source = self.stages[0]
        if not isinstance(source, SourceStage):
            return self
        if source.fit is None and (self.model.weights is None or source.fine_tune):
            raise ValueError(
                "stages.0.fit: without model.weights the teacher is trained here: say how, or give WEIGHTS=file"
            )
        if self.model.reset_head and not source.fine_tune:
            raise ValueError("model.reset_head: leaves the classifier untrained: also set stages.0.fine_tune: true")
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


Mistake = tuple[int, str]  # the stage's place in its chain, and what is wrong with it


def _out_of_order(chain: Recipe) -> Mistake | None:
    kind: Kind = "nothing"
    for index, section in enumerate(chain.stages):
        if kind not in TAKES[section.stage]:
            wanted = " or ".join(sorted(TAKES[section.stage]))
            before = f"{chain.stages[index - 1].stage} gives {kind}" if index else "the first stage starts from nothing"
            return index, (
                f": {section.stage} takes {wanted}, but {before}; "
                "the usual order is source, prune, distill, ptq, qat, export, bench"
            )
        kind = GIVES[section.stage]
    return None


def _qat_unjustified(chain: Recipe) -> Mistake | None:
    names = [section.stage for section in chain.stages]
    if "qat" in names and "ptq" not in names[: names.index("qat")]:
        return names.index("qat"), ": qat needs a ptq stage before it, to show what training gains: add `- stage: ptq`"
    return None


def _qat_of_unknown_length(chain: Recipe) -> Mistake | None:
    trained = any(isinstance(section, SourceStage | DistillStage) and section.fit for section in chain.stages)
    for index, section in enumerate(chain.stages):
        if isinstance(section, QatStage) and section.fit is None and not trained:
            return index, ".fit: no float training here to derive it from: say how, or add a distill stage"
    return None


def _student_untaught(chain: Recipe) -> Mistake | None:
    names = [section.stage for section in chain.stages]
    for index, section in enumerate(chain.stages):
        if not isinstance(section, StudentStage):
            continue
        if index != 1:
            return (
                index,
                f": student starts another network, so what {names[index - 1]} made is lost; put it behind source",
            )
        if not section.is_trained and "distill" not in names[index:]:
            return index, ": its classifier starts untrained: add a distill stage behind it, or give weights"
    return None


JUDGES = (_out_of_order, _qat_unjustified, _qat_of_unknown_length, _student_untaught)
