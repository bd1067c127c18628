"""The sections of a recipe's stages and trainings. Imports no torch."""

from typing import Annotated, Final, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from compress.quant.rows import Method
from compress.recipe.losses import KD_ONLY, LossTerm
from compress.recipe.section import Arch, BelowOne, Drop, Fraction, OptionalSize, PathText, Section, Size, refuse_tag

MAX_DROP = 0.01  # the largest loss of score, unless the recipe says otherwise
MOST_FLOAT = 0.2  # a file with a larger fraction of its multiply-accumulates in float is not called INT8
THIS = Field(description="This stage.")
DEFAULT_PROVIDERS: Final = ("cpu", "cuda")
GOALS = ("keep_macs", "keep_params", "keep_latency", "max_latency_ms")


class Stop(Section):
    """Conditions that end a training early; after each epoch, any one that holds ends it."""

    patience: PositiveInt | None = None
    """Epochs in a row without a rise of the validation score by more than `min_delta`."""
    min_delta: Fraction = 0.0
    """The smallest rise that counts for `patience`; 0.001 is a tenth of a point."""
    max_minutes: PositiveFloat | None = None
    """Longest training in minutes, over all resumed runs; an epoch that would end later does not start."""
    score: Fraction | None = None
    """The validation score that is enough. As validation images then choose the end, the last score is slightly optimistic."""

    @model_validator(mode="after")
    def _some_condition(self) -> "Stop":
        if self.patience is None and self.max_minutes is None and self.score is None:
            raise ValueError("patience: give at least one of patience, max_minutes and score, or leave `stop` out")
        if self.min_delta and self.patience is None:
            raise ValueError(
                f"min_delta: has no effect without patience: set patience, too, got min_delta {self.min_delta}"
            )
        return self


class Fit(Section):
    """The settings of one training."""

    epochs: PositiveInt
    """Passes over the training images."""
    batch_size: PositiveInt = 64
    """Images in a step, over all ranks together."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: PositiveFloat = 0.05
    """The peak learning rate, after the warm-up."""
    schedule: Literal["cosine", "step"] = "cosine"
    """How the rate falls after the warm-up: by half a cosine to 0, or by the factor `gamma` at each of `milestones`."""
    milestones: tuple[PositiveInt, ...] = ()
    """Epochs after which `schedule: step` multiplies the rate by `gamma`."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The rate's factor at each of `milestones`."""
    momentum: BelowOne = 0.9
    """SGD's momentum."""
    nesterov: bool = True
    """Nesterov's momentum; false is plain momentum, which most papers use."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay of convolution and linear weights."""
    decay_vectors: bool = False
    """Also decay biases and batch-norms, as most papers do."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs of linear warm-up."""
    ema_decay: BelowOne = 0.0
    """Decay per step of a moving average of the weights, which becomes the result (0 switches it off)."""
    clip_norm: NonNegativeFloat = 0.0
    """The largest norm of the gradient (0 switches clipping off)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type. auto is bf16 on a GPU that has it, the faster of both on a CPU that has it, else fp32; in qat it is fp32."""
    compile: bool = False
    """Run the training step through torch.compile; the log says what it costs and gains."""
    micro_batches: PositiveInt = 1
    """Number of parts that each batch is split into to save memory; doubled when memory runs out, except under torchrun."""
    sync_batchnorm: bool = False
    """Under torchrun on GPUs, compute batch-norm's statistics over all ranks' images; false computes them on each rank."""
    stop: Stop | None = None
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
            raise ValueError(f"milestones: schedule step needs some and cosine takes none, got {shown}")
        if shown != sorted(set(shown)) or (shown and shown[-1] >= self.epochs):
            raise ValueError(f"milestones: must rise and be < epochs ({self.epochs}), got {shown}")
        return self


class SourceStage(Section):
    """The teacher: weights given, or trained here."""

    stage: Annotated[Literal["source"], THIS]
    fit: Fit | None = None
    """How the teacher is trained when `model.weights` is null (or with `fine_tune`)."""
    label_smoothing: BelowOne = 0.0
    """Probability moved from the label to all classes evenly while the teacher trains."""
    fine_tune: bool = False
    """Also train the given weights on this data."""


class StudentStage(Section):
    """Another network, usually smaller, as the student in place of the pruned teacher."""

    stage: Annotated[Literal["student"], THIS]
    arch: Arch
    """The network, as in `model.arch`."""
    weights: PathText | None = None
    """Weights to start from, as in `model.weights`; null starts from random ones."""
    reset_head: bool = False
    """Initialize a new classifier (of a network with several heads, all layers with another number of outputs) and keep all other weights, for weights trained on other classes."""

    @property
    def is_trained(self) -> bool:
        """Whether the given weights include a trained classifier."""
        return self.weights is not None and not self.reset_head

    @model_validator(mode="after")
    def _arch_is_no_weights(self) -> "StudentStage":
        refuse_tag(self.arch)
        return self


class Sparsity(Section):
    """A training phase before the cut that drives whole groups of channels to zero (DepGraph's group regularizer)."""

    fit: Fit
    """The training's settings."""
    strength: PositiveFloat = 1e-4
    """Factor of the group penalty's gradient."""


class ServingConditions(Section):
    """The conditions of a latency measurement; null takes those under which the target serves."""

    threads: NonNegativeInt = 1
    """CPU threads; 0 is all of them."""
    batch: PositiveInt = 1
    """Images in a call."""
    image_size: OptionalSize = None
    """Pixels, one number or `[height, width]`; null takes the recipe's own."""
    precision: Literal["int8", "fp16", "fp32", "bf16"] | None = None
    """Number format of the file; bf16 is the fp32 file computed in bf16. Null takes fp16 for `target: cuda`, else int8 where a ptq or qat stage follows, else fp32."""
    provider: Literal["cpu", "openvino", "cuda", "tensorrt"] | None = None
    """ONNX Runtime's execution provider; null takes the target's."""


class PruneStage(Section):
    """Remove whole channels by Torch-Pruning's dependency graph."""

    stage: Annotated[Literal["prune"], THIS]
    criterion: Literal["l1", "l2", "taylor", "fpgm", "random", "obs"] = "obs"
    """How a channel's importance is scored."""
    scope: Literal["global", "local", "isomorphic"] = "global"
    """Which channels compete: all of the network, those of one layer group, or those of groups with the same structure."""
    keep_macs: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fraction of multiply-accumulates to keep."""
    keep_params: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fraction of parameters to keep."""
    keep_latency: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fraction of the network's latency to keep, measured in ONNX Runtime on this machine under `conditions`."""
    max_latency_ms: PositiveFloat | None = None
    """The network's largest latency in ms, measured in the same way."""
    conditions: ServingConditions = ServingConditions()
    """The conditions of `keep_latency` and `max_latency_ms`."""
    blocks: bool = False
    """With `keep_latency` or `max_latency_ms`, also remove whole residual blocks where that loses less importance for the same time."""
    inside_heads: bool = False
    """Instead of whole heads of attention, remove dimensions inside all of its heads: of queries and keys, and of values."""
    steps: PositiveInt = 1
    """Number of cuts; channels are scored again before each, and `recover` trains in between."""
    recover: Fit | None = None
    """Distillation between the cuts; null has none."""
    reconstruct: Literal["gradients", "least_squares", "batch_norm", "none"] = "least_squares"
    """Recovery after each cut, without labels: solve each layer's weights so that its outputs stay close to those before the cut (`least_squares`), go on from there by 150 steps on augmented images (`gradients`), only measure batch-norm's statistics again, or nothing."""
    reconstruct_images: PositiveInt = 512
    """Training images for `reconstruct`; a quarter more decide whether it helps. Fewer are used where large images would not fit into memory."""
    round_to: PositiveInt = 8
    """Widths stay multiples of this; the fast INT8 and FP32 kernels need 8."""
    min_keep: BelowOne = 0.1
    """Every layer keeps at least this fraction of its channels."""
    score_images: PositiveInt = 256
    """Training images for `taylor`'s gradients, and for `obs`'s second moments of the layers' inputs."""
    sparsity: Sparsity | None = None
    """Sparsity learning before the cut; null has none."""
    exclude: tuple[str, ...] = ()
    """Module paths (shell patterns such as `layer4.*`) whose outputs are never cut; the classifier's never are."""

    @model_validator(mode="after")
    def _one_goal(self) -> "PruneStage":
        if len([goal for goal in GOALS if getattr(self, goal) is not None]) != 1:
            raise ValueError(f"keep_macs: give exactly one of {', '.join(GOALS)}")
        if self.blocks and (self.steps > 1 or (self.keep_latency is None and self.max_latency_ms is None)):
            raise ValueError("blocks: needs keep_latency or max_latency_ms, and a single step")
        return self


class DistillStage(Section):
    """Recover accuracy by learning from the teacher."""

    stage: Annotated[Literal["distill"], THIS]
    fit: Fit
    """The training's settings."""
    loss: Annotated[tuple[LossTerm, ...], Field(min_length=1)] = KD_ONLY
    """The losses; their weighted sum is minimized."""
    freeze_batchnorm_at: Fraction = 1.0
    """Fraction of the training after which batch-norm uses its running statistics; 0 keeps those of the start, 1 never freezes them."""
    reestimate_batchnorm_images: NonNegativeInt = 2048
    """Augmented training images that measure batch-norm's statistics again after each epoch of the second half where that lowers the loss on held-out images, unless they are frozen (0 keeps the running ones)."""


class PtqStage(Section):
    """INT8 without training, by every method; then tuning until the accuracy holds. The network itself stays as it is."""

    stage: Annotated[Literal["ptq"], THIS]
    calibration_images: PositiveInt = 512
    """Training images that set the activations' ranges."""
    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ("minmax", "percentile", "entropy")
    """How ranges are chosen: the extremes, all but 0.001 % at each end, or least divergence; each method is measured, in this pipeline's quantizer and in ONNX Runtime's."""
    neural_compressor: bool = False
    """Also measure neural-compressor's static quantization. Of all files that hold `max_drop` the fastest is kept; of equally fast ones,
    the one whose logits diverge least from the float student's (KL)."""
    max_drop: Drop = MAX_DROP
    """Largest loss of score against the float student, on 2,000 training images; 0.01 is one point."""
    max_trials: PositiveInt = 12
    """The most files that tuning builds and scores, besides those of other quantizers."""
    float_where_faster: bool = True
    """Keep layers in float where that is faster on this machine, borders included, if the whole file is measured faster; qat does the same."""
    score_images: PositiveInt | None = None
    """Validation images for each method's reported score; null takes all. They choose nothing."""


class QatStage(Section):
    """Quantization-aware training on the target's grid, under the teacher's soft targets."""

    stage: Annotated[Literal["qat"], THIS]
    fit: Fit | None = None
    """The training's settings; null takes the last float training's, with a tenth of its epochs and a hundredth of its rate."""
    loss: Annotated[tuple[LossTerm, ...], Field(min_length=1)] = KD_ONLY
    """The losses; their weighted sum is minimized."""
    ranges: Literal["moving_average", "lsq"] = "moving_average"
    """How the grid's scales are found: a moving average of each batch's minimum and maximum, or learned with the weights (LSQ)."""
    calibration: Method | None = None
    """How the activations' initial ranges are chosen; null takes the method that the ptq stage found best."""
    calibration_images: PositiveInt = 512
    """Training images that set the activations' initial ranges."""
    freeze_ranges_at: Fraction = 0.5
    """Fraction of the training after which moving-average ranges stay fixed (learned ones continue)."""
    freeze_batchnorm_at: Fraction = 0.25
    """Fraction of the training after which batch-norm uses its running statistics."""
    reestimate_batchnorm_images: NonNegativeInt = 0
    """Training images that measure batch-norm's statistics again after the training (0 keeps the running ones)."""
    keep_float: tuple[str, ...] = ()
    """Module paths (shell patterns such as `features.0.*`) that stay in float on purpose."""
    skip_if_ptq_drop_below: Drop | None = None
    """Skip the training if the ptq stage's file loses less score than this against the float student, on the tuning images; 0.01 is one point."""
    max_drop: Drop | None = None
    """After training, put the worst layers back to float until the loss of score against the float student is at most this, on the tuning images."""

    @model_validator(mode="after")
    def _ranges_do_not_decay(self) -> "QatStage":
        if self.ranges == "lsq" and self.fit is not None and self.fit.decay_vectors:
            raise ValueError("fit.decay_vectors: it would shrink the ranges that lsq learns: leave it out")
        return self


class AuditLimits(Section):
    """Limits on the optimized graph of the INT8 file that is served; a run that exceeds one fails and names the layers."""

    max_float_layers: NonNegativeInt | None = None
    """The most convolutions and matrix products that run in float."""
    max_float_fraction: Fraction | None = MOST_FLOAT
    """The largest fraction of an INT8 file's multiply-accumulates that run in float; 1 allows all."""
    max_leftover_qdq: NonNegativeInt | None = None
    """The most QuantizeLinear and DequantizeLinear nodes that the optimizer leaves, besides the one at each end."""
    min_agreement: Fraction | None = None
    """The smallest fraction of images on which the file and the fake-quantized network predict the same class."""


class ExportStage(Section):
    """ONNX files for the serving stack."""

    stage: Annotated[Literal["export"], THIS]
    verify_images: PositiveInt = 1000
    """Validation images on which the INT8 file is compared with the trained network, on some of them tensor by tensor."""
    uint8_input: bool = True
    """Also write each INT8 file with uint8 pixels (batch, height, width, 3) as input and the normalization inside. It outputs masks, uint8 (batch, height, width), for segmentation, and for detection one image's boxes after non-maximum suppression."""
    golden_images: Annotated[int, Field(ge=1, le=64)] = 8
    """Validation images in the bundle, with each file's outputs, to check a server against."""
    limits: AuditLimits = AuditLimits()
    """Limits on the optimized graph."""


class BenchStage(Section):
    """Accuracy and latency in ONNX Runtime."""

    stage: Annotated[Literal["bench"], THIS]
    batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)
    """Batch sizes to time."""
    threads: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 0)
    """CPU threads to time with; 0 is all of them."""
    image_sizes: tuple[Size, ...] = ()
    """Further image sizes to time, each one number or `[height, width]`, besides the recipe's own."""
    providers: (
        Literal["auto"] | Annotated[tuple[Literal["cpu", "openvino", "cuda", "tensorrt"], ...], Field(min_length=1)]
    ) = DEFAULT_PROVIDERS
    """Execution providers to score and time in; auto takes all that this machine has. If this field is left out and `target` is auto, plugins that start here (OpenVINO's) are added. One that it lacks is left out, and the report says so."""
    seconds: PositiveFloat = 1.0
    """Seconds of timing for each file at each setting."""
    blocks: Annotated[int, Field(ge=6)] = 10
    """Interleaved blocks, from which medians and intervals are computed; a 95 % interval needs at least six."""


StageSection = Annotated[
    SourceStage | StudentStage | PruneStage | DistillStage | PtqStage | QatStage | ExportStage | BenchStage,
    Field(discriminator="stage"),
]
