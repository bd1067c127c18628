"""What a recipe's sections, each right by itself, cannot mean together."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.data.teachers import foreign
from compress.recipe.losses import LABELLED, OF_LABELS, LossTerm
from compress.recipe.order import first_mistake
from compress.recipe.stages import DistillStage, PruneStage, QatStage, SourceStage
from export.tasks import TASKS

if TYPE_CHECKING:
    from compress.recipe.schema import Recipe

# Libraries whose detectors have a loss from labels of their own, and the decode of their outputs.
OWN_LOSS = {"hf": "queries", "yolox": "yolox"}


def mistakes(recipe: "Recipe") -> Iterator[str]:
    """Yield a line, with its place in the recipe, for each mistake; a later one may follow from the first."""
    for name, chain in recipe.chains().items():
        if (mistake := first_mistake(chain.stages)) is not None:
            yield f"{recipe.place(name, mistake[0])}{mistake[1]}"
    for judge in (_source, _data, _teachers, _labels, _outputs, _decode, _score, _target, _targets, _cache):
        yield from judge(recipe)


def _losses(recipe: "Recipe") -> list[tuple[str, LossTerm]]:
    """Return each loss of a distill or qat stage, with the stage's name."""
    sections = (section for chain in recipe.chains().values() for section in chain.stages)
    learning = (section for section in sections if isinstance(section, DistillStage | QatStage))
    return [(section.stage, term) for section in learning for term in section.loss]


def _source(recipe: "Recipe") -> Iterator[str]:
    source, model = recipe.stages[0], recipe.model
    assert isinstance(source, SourceStage), "another order was refused"
    if source.fit is not None and not TASKS[recipe.task].labelled:
        yield "stages.0.fit: there are no labels to train on: give model.weights, or a teacher"
    if model is None:
        yield from _other_teacher(recipe, source)
        return
    if source.fit is None and (source.fine_tune or not (model.weights or foreign(model.arch))):
        yield "stages.0.fit: missing; without model.weights the teacher is trained here: set it, or give WEIGHTS=file"
    if model.reset_head and not source.fine_tune:
        yield "model.reset_head: the new classifier is untrained: also set stages.0.fine_tune: true"


def _other_teacher(recipe: "Recipe", source: SourceStage) -> Iterator[str]:
    if not recipe.teacher:
        yield "model: missing: name the network to compress, or set teacher and add a student stage"
    if source.fit is not None:
        yield "stages.0.fit: a `teacher` is not trained: leave it out, or name the network as model"
    for name, chain in recipe.chains().items():
        if chain.stages[1:] and chain.stages[1].stage != "student":
            yield (
                f"{recipe.place(name, 1)}: {chain.stages[1].stage} needs a network, and `teacher` only gives predictions: "
                "name the network as model, or put a student stage here"
            )


def _data(recipe: "Recipe") -> Iterator[str]:
    losses = _losses(recipe)
    for stage, term in losses if recipe.data.unlabelled is not None else ():
        if term.name in LABELLED:
            yield f"data.unlabelled: {term.name} in {stage} needs every image's label: use kd or dist"
    supervised = any(
        section.fit if isinstance(section, SourceStage) else isinstance(section, PruneStage) and section.sparsity
        for chain in recipe.chains().values()
        for section in chain.stages
    )
    if (
        recipe.data.balance == "class_weights"
        and not supervised
        and "cross_entropy" not in [one.name for _, one in losses]
    ):
        yield "data.balance: class_weights weighs cross_entropy, which no stage uses: add that loss, or use sampler"


def _teachers(recipe: "Recipe") -> Iterator[str]:
    if not TASKS[recipe.task].by_class_axis:
        if len(recipe.teacher) > 1:
            yield f"teacher: {len(recipe.teacher)} for {recipe.task}, whose predictions cannot be averaged: name one"
        if any(one.classes for one in recipe.teacher):
            yield (
                f"teacher.0.classes: a teacher for {recipe.task} must have the data's classes in their order: leave it out"
            )
    channels = recipe.data.channels
    for index, teacher in enumerate(recipe.teacher):
        for name, values in (("mean", teacher.mean), ("std", teacher.std)):
            if values is not None and len(values) != channels:
                yield f"teacher.{index}.{name}: must have a number for each channel ({channels}), got {len(values)}"


def _labels(recipe: "Recipe") -> Iterator[str]:
    if TASKS[recipe.task].has_classes:
        return
    for name, chain in recipe.chains().items():
        for index, section in enumerate(chain.stages):
            if isinstance(section, PruneStage) and section.sparsity is not None:
                yield f"{recipe.place(name, index)}.sparsity: learns from labels, and {recipe.task} have none: leave it out"


def _outputs(recipe: "Recipe") -> Iterator[str]:
    if recipe.model is not None and recipe.model.outputs and TASKS[recipe.task].several is None:
        yield f"model.outputs: {recipe.task} reads one output: leave it out, or set task: tensors"


def _decode(recipe: "Recipe") -> Iterator[str]:
    if recipe.decode is None:
        if recipe.model is not None and recipe.model.arch.startswith("yolox:"):
            yield "model.arch: yolox gives rows that are not decoded: also set `decode: yolox`"
        if recipe.task == "detection" and recipe.model is not None and recipe.model.outputs:
            yield "model.outputs: a detector of several outputs needs `decode`: name the function that makes boxes of them"
        return
    if recipe.task != "detection":
        yield f"decode: makes boxes, and {recipe.task} has none: leave it out, or set task: detection"
    if recipe.model is None:
        yield "decode: reads the outputs of the recipe's own network: name it as model"
    arch = "" if recipe.model is None else recipe.model.arch
    own = OWN_LOSS.get(arch.partition(":")[0]) == recipe.decode.function
    if isinstance(source := recipe.stages[0], SourceStage) and source.fit is not None and not own:
        yield (
            f"stages.0.fit: {arch} with decode {recipe.decode.function} has no loss from labels here, only hf: with queries and yolox: "
            "with yolox have one: train it elsewhere and give its weights"
        )
    for stage, term in _losses(recipe):
        if term.name in OF_LABELS and not (own and term.name == "cross_entropy"):
            yield f"decode: {term.name} in {stage} needs a loss from labels: use kd and boxes, which need none"
    for name, chain in recipe.chains().items():
        for index, section in enumerate(chain.stages):
            if isinstance(section, PruneStage) and (section.sparsity is not None or section.criterion == "taylor"):
                what = "sparsity" if section.sparsity is not None else "criterion"
                yield f"{recipe.place(name, index)}.{what}: learns from labels, which it cannot with `decode`: leave it out"


def _score(recipe: "Recipe") -> Iterator[str]:
    if recipe.score is not None and recipe.data.dataset != "imagefolder":
        yield f"score: finds an image by its path, and {recipe.data.dataset} has no files: leave it out, or set data.path"


def _target(recipe: "Recipe") -> Iterator[str]:
    stages = {section.stage for chain in recipe.chains().values() for section in chain.stages}
    quantizing = [name for name in ("ptq", "qat") if name in stages]
    if recipe.target == "cuda" and quantizing:
        yield (
            f"target: cuda runs FP16, as ONNX Runtime's CUDA provider has no INT8 convolution: leave out {' and '.join(quantizing)}, "
            "or set another target (tensorrt, cpu_avx2, cpu_vnni, cpu_arm)"
        )


def _targets(recipe: "Recipe") -> Iterator[str]:
    for name, chain in recipe.chains().items():
        stages = {section.stage for section in chain.stages}
        place = f"students.{name}.targets" if name and recipe.students[name].targets else "targets"
        for target in [target for target, value in chain.targets if value not in (None, {})]:
            if target != "max_macs_ratio" and "bench" not in stages:
                yield f"{place}.{target}: a bench stage measures it: add `- stage: bench`, or leave it out"
            if target == "max_class_drop" and not TASKS[recipe.task].has_classes:
                yield f"{place}.{target}: {recipe.task} have no classes: leave it out"
            if target == "min_int8_speedup" and not stages & {"ptq", "qat"}:
                yield f"{place}.{target}: there is no INT8 file: add `- stage: ptq`, or leave it out"


def _cache(recipe: "Recipe") -> Iterator[str]:
    if recipe.teaching.top_k is None or recipe.teaching.mode == "online":
        return
    if not TASKS[recipe.task].exclusive:
        yield f"teaching.top_k: needs classes that exclude each other, and in {recipe.task} they are independent: leave it out"
    for stage, term in _losses(recipe):
        if term.name == "mse" or getattr(term, "standardize", False):
            loss = "mse" if term.name == "mse" else f"{term.name} with standardize"
            yield f"teaching.top_k: {loss} in {stage} needs all logits: leave top_k out, or set teaching.mode: online"
