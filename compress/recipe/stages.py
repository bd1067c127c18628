"""The stages of a recipe: one section for each, and the sections of a training.

Imports no torch.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from compress.recipe.losses import KD_ONLY, LossTerm
from compress.recipe.section import Arch, Drop, Fraction, PathText, Section, refuse_tag

CalibrationMethod = Literal["minmax", "percentile", "entropy"]
GOALS = ("keep_macs", "keep_params", "keep_latency", "max_latency_ms")


class Stop(Section):
    """When a training ends before its last epoch: the first condition that holds after an epoch ends it."""

    patience: PositiveInt | None = None
    """Epochs in a row without a rise of the validation score by more than `min_delta`."""
    min_delta: Fraction = 0.0
    """The smallest rise that counts for `patience`; 0.001 is a tenth of a point."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes of training, those before a kill included; no epoch begins that would end later."""
    score: Fraction | None = None
    """The validation score that is enough. The end is then chosen on the images that judge, so the last score flatters a little."""

    @model_validator(mode="after")
    def _some_condition(self) -> "Stop":
        if self.patience is None and self.max_minutes is None and self.score is None:
            raise ValueError("patience: give at least one of patience, max_minutes and score, or leave `stop` out")
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
    schedule: Literal["cosine", "step"] = "cosine"
    """How the rate falls after the warm-up: by half a cosine to zero, or by `gamma` at each of `milestones`."""
    milestones: tuple[PositiveInt, ...] = ()
    """Epochs after which `schedule: step` multiplies the rate by `gamma`."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The factor of `schedule: step`."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    nesterov: bool = True
    """Nesterov's momentum; false is plain momentum, which most papers use."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of convolution and linear weights."""
    decay_vectors: bool = False
    """Also decay biases and batch-norms, as most papers do."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of a moving average of the weights, which becomes the result (0 switches it off)."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """The largest norm of the gradient (0 switches clipping off)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; auto is bf16 on a GPU that has it, the faster by timing on a CPU that has it, else fp32; in qat fp32."""
    compile: bool = False
    """Run the training step through torch.compile; the log says what it costs and gains."""
    micro_batches: PositiveInt = 1
    """Number of micro-batches that each batch is split into; doubled when memory runs out, except under torchrun."""
    sync_batchnorm: bool = False
    """Under torchrun on GPUs, batch-norm takes the statistics of all ranks' images; false takes each rank's own."""
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
    """Also train the given weights on this data."""


class StudentStage(Section):
    """Another network, usually a smaller one, as the student in place of the pruned teacher."""

    stage: Literal["student"]
    """This stage."""
    arch: Arch
    """The network, named as `model.arch` is."""
    weights: PathText | None = None
    """Weights to start from, named as `model.weights` are; null starts from random ones."""
    reset_head: bool = False
    """Start the classifier anew and keep all other weights, where these were trained on other classes."""

    @property
    def is_trained(self) -> bool:
        """Whether the network knows its classes before anything taught it."""
        return self.weights is not None and not self.reset_head

    @model_validator(mode="after")
    def _arch_is_no_weights(self) -> "StudentStage":
        refuse_tag(self.arch)
        return self


class Sparsity(Section):
    """A training phase before the cut that pushes whole groups towards zero (DepGraph's group regularizer)."""

    fit: Fit
    """How long and how fast."""
    strength: Annotated[float, Field(gt=0)] = 1e-4
    """Factor of the group penalty's gradient."""


class Conditions(Section):
    """What a latency is measured under; `null` takes what the target serves."""

    threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads; 0 is all of them."""
    batch: PositiveInt = 1
    """Images in a call."""
    image_size: PositiveInt | None = None
    """Height and width in pixels; null takes the recipe's own."""
    precision: Literal["int8", "fp16", "fp32"] | None = None
    """The file's numbers; null takes fp16 for `target: cuda`, else int8 where a ptq or qat stage follows, else fp32."""
    provider: Literal["cpu", "cuda"] | None = None
    """Where it runs; null takes the target's."""


class PruneStage(Section):
    """Remove whole channels by Torch-Pruning's dependency graph."""

    stage: Literal["prune"]
    """This stage."""
    criterion: Literal["l1", "l2", "taylor", "fpgm", "bn_scale", "random", "obs"] = "l2"
    """How a channel's importance is scored."""
    scope: Literal["global", "local", "isomorphic"] = "global"
    """Channels compete over the whole network, inside their own layer group, or among groups of the same structure."""
    keep_macs: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fraction of multiply-accumulates that stays."""
    keep_params: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fraction of parameters that stays."""
    keep_latency: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fraction of the network's time that stays, both timed in ONNX Runtime on this machine under `conditions`."""
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    """The most milliseconds that the network may take, timed in the same way."""
    conditions: Conditions = Conditions()
    """What `keep_latency` and `max_latency_ms` are measured under."""
    blocks: bool = False
    """Under `keep_latency` or `max_latency_ms`, whole residual blocks may go too, where that loses less importance for the same time."""
    steps: PositiveInt = 1
    """Number of cuts; channels are scored again before each, and `recover` trains in between."""
    recover: Fit | None = None
    """Distillation between the cuts of an iterative plan."""
    reconstruct: Literal["least_squares", "batch_norm", "none"] = "least_squares"
    """Recovery after each cut, without training or labels: solve each layer's weights for what its removed inputs gave, only measure batch-norm's statistics anew, or nothing."""
    reconstruct_images: PositiveInt = 512
    """Training images for `reconstruct`; a quarter more judge whether it helps. Fewer are used where large images would not fit into memory."""
    round_to: PositiveInt = 8
    """Widths stay multiples of this; 8 is what the fast INT8 and FP32 kernels need."""
    min_keep: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Every layer keeps at least this fraction of its channels."""
    score_images: PositiveInt = 256
    """Training images that `taylor` takes its gradients from, and `obs` the second moments of the layers' inputs."""
    sparsity: Sparsity | None = None
    """Optional sparsity learning before the cut."""
    exclude: tuple[str, ...] = ()
    """Module paths (shell patterns such as `layer4.*`) whose outputs are never cut; the classifier never is."""

    @model_validator(mode="after")
    def _one_goal(self) -> "PruneStage":
        if len([goal for goal in GOALS if getattr(self, goal) is not None]) != 1:
            raise ValueError(f"keep_macs: give exactly one of {', '.join(GOALS)}")
        if self.blocks and (self.steps > 1 or (self.keep_latency is None and self.max_latency_ms is None)):
            raise ValueError("blocks: needs keep_latency or max_latency_ms, and a single step")
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
    """INT8 without training, by every method; then tuning until the accuracy holds. The network itself is not changed."""

    stage: Literal["ptq"]
    """This stage."""
    calibration_images: PositiveInt = 512
    """Training images that set the activations' ranges."""
    methods: Annotated[tuple[CalibrationMethod, ...], Field(min_length=1)] = ("minmax", "percentile", "entropy")
    """How ranges are chosen: all are measured, by this pipeline and by ONNX Runtime's quantizer."""
    neural_compressor: bool = True
    """Also measure neural-compressor's own static quantization. Of all files that lose little enough the fastest is kept, of those that
    time does not tell apart the one whose logits diverge least from the float student's (KL)."""
    max_drop: Drop = 0.01
    """The loss of score from the float student that tuning may leave, on 2,000 training images; 0.01 is one point."""
    max_trials: PositiveInt = 12
    """The most files that tuning builds and scores, besides those of other quantizers."""
    score_images: PositiveInt | None = None
    """Validation images that each method is reported on; null takes all. Nothing is chosen by them."""


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
    calibration: CalibrationMethod | None = None
    """How the activations' first ranges are chosen; null takes the method that the ptq stage found best."""
    calibration_images: PositiveInt = 512
    """Training images that set the activations' first ranges."""
    freeze_ranges_at: Fraction = 0.5
    """Fraction of the training after which moving ranges stay as they are (learned ones continue)."""
    freeze_batchnorm_at: Fraction = 0.25
    """Fraction of the training after which batch-norm uses its running statistics."""
    reestimate_batchnorm_images: Annotated[int, Field(ge=0)] = 0
    """Training images that measure batch-norm's statistics anew after the training (0 keeps the running ones)."""
    keep_float: tuple[str, ...] = ()
    """Module paths (shell patterns such as `features.0.*`) that stay in float on purpose."""
    skip_if_ptq_drop_below: Drop | None = None
    """Do not train where the ptq stage's file lost less score than this against the float student, on the images that tuning chose by; 0.01 is one point."""
    max_drop: Drop | None = None
    """After training, put the worst layers back to float until no more than this is lost against the float student, on the same images."""

    @model_validator(mode="after")
    def _ranges_do_not_decay(self) -> "QatStage":
        if self.ranges == "lsq" and self.fit is not None and self.fit.decay_vectors:
            raise ValueError("fit.decay_vectors: would shrink the ranges that lsq learns: leave it out")
        return self


class AuditLimits(Section):
    """Limits on the optimized graph of the INT8 file that is served; exceeding one fails the run and names the layers."""

    max_float_layers: Annotated[int, Field(ge=0)] | None = None
    """The most convolutions and matrix products that run in float."""
    max_float_fraction: Fraction | None = 0.2
    """The largest fraction of an INT8 file's multiply-accumulates that run in float; with more it is not called INT8. 1 allows all."""
    max_leftover_qdq: Annotated[int, Field(ge=0)] | None = None
    """The most QuantizeLinear and DequantizeLinear nodes that the optimizer leaves, besides the one at each end."""
    min_agreement: Fraction | None = None
    """The smallest fraction of images on which file and trained fake-quantized network predict the same class."""


class ExportStage(Section):
    """ONNX files for the serving stack."""

    stage: Literal["export"]
    """This stage."""
    verify_images: PositiveInt = 1000
    """Validation images on which the INT8 file is compared with the trained network, tensor by tensor on some of them."""
    uint8_input: bool = True
    """Also write the INT8 file with uint8 pixels (batch, height, width, 3) as input and the normalization inside; its output is the mask, uint8 (batch, height, width), or of one image the boxes, decoded and suppressed."""
    golden_images: Annotated[int, Field(ge=1, le=64)] = 8
    """Validation images in the bundle, with each file's outputs, for comparison wherever it is served."""
    limits: AuditLimits = AuditLimits()
    """Limits on the optimized graph."""


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
    """Seconds of timing for each file at each setting."""
    blocks: Annotated[int, Field(ge=6)] = 10
    """Interleaved blocks, which medians and intervals come from; a 95 % interval needs at least six."""


StageSection = Annotated[
    SourceStage | StudentStage | PruneStage | DistillStage | PtqStage | QatStage | ExportStage | BenchStage,
    Field(discriminator="stage"),
]
