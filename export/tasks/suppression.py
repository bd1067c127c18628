"""Give a detector other outputs: boxes, scores and labels, decoded and suppressed inside the graph, for one image.

The number of boxes depends on the image, and ONNX's NonMaxSuppression returns one list for the whole batch, which could not be split
by image; hence one image at a time.
"""

from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, compose, helper, parser

from export.errors import BundleError
from export.tasks.boxes import (
    CENTRED,
    LARGEST_GROWTH,
    LIMITS,
    MOVES,
    OF_CLASS,
    OF_LEVEL,
    READS,
    SIGMOID,
    SOFTMAX,
    WEIGHTS,
    Heads,
    Limits,
    heads,
)

OPSET = 18
INSIDE, DECODER = (
    "detections/",
    "decode/",
)  # prefixes of the names of added nodes: the suppression's, a decoding graph's
DETECTOR = "detector/"  # and of the detector's own values that would be called as an output
OUTPUTS = BOXES, SCORES, LABELS = "boxes", "scores", "labels"
# Each gives `known`, the classes' probabilities; the first column of the logits is the background or the centre-ness.
SOFT = "chances = Softmax <axis = -1> (logits) known = Slice (chances, one, classes, last)"
EACH = "chances = Sigmoid (logits) known = Slice (chances, one, classes, last)"
CENTRE = "chances = Sigmoid (logits) own = Slice (chances, one, classes, last) inside = Slice (chances, zero, one, last) both = Mul (own, inside) known = Sqrt (both)"
GROWN = """
    shift = Mul (first, size) step = Div (shift, place) middle = Add (centre, step)
    raised = Div (second, growth) bounded = Min (raised, largest) factor = Exp (bounded) whole = Mul (factor, size) half = Mul (whole, halves)
    low = Sub (middle, half) high = Add (middle, half)"""
REACHED = "before = Mul (first, size) low = Sub (centre, before) after = Mul (second, size) high = Add (centre, after)"


def with_suppression(model: ModelProto) -> ModelProto:
    """Return the model for one image whose outputs are `boxes` (n, 4) as fractions of the image, `scores` (n,) and `labels` (n,).

    They equal those of `export.tasks.boxes.decode`. Raises BundleError for a model that is not a detector.
    """
    model = _of_one_image(model)
    shape = [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]
    if len(shape) != 3 or shape[2] <= 1 + MOVES + READS:
        raise BundleError(f"{model.graph.output[0].name}: must be a detector's anchors, got {shape}: export a detector")
    return _joined(model, _behind(_heads(model), shape[2], model.ir_version), INSIDE)


def with_graph(model: ModelProto, graph: ModelProto, limits: Limits) -> ModelProto:
    """Return the model as `with_suppression` does, decoded by a graph that reads its outputs (`export.tasks.decoder`)."""
    model, graph = _of_one_image(model), _of_one_image(graph)
    _, anchors, classes = (dim.dim_value for dim in graph.graph.output[1].type.tensor_type.shape.dim)
    given = f"float[1, {anchors}, 4] corners, float[1, {anchors}, {classes}] known"
    behind = _suppression(given, "", "", SIGMOID, (0, anchors), classes, model.ir_version, limits)
    _set_apart_(graph.graph)
    graph = compose.merge_models(
        compose.add_prefix(graph, DECODER),
        compose.add_prefix(behind, INSIDE, rename_outputs=False),
        [
            (f"{DECODER}{one.name}", f"{INSIDE}{name}")
            for one, name in zip(graph.graph.output, ("corners", "known"), strict=True)
        ],
    )
    return _joined(model, graph, "")


def _of_one_image(model: ModelProto) -> ModelProto:
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def _joined(model: ModelProto, behind: ModelProto, prefix: str) -> ModelProto:
    """Return the model with another behind it that reads its outputs in order, whose inner names get the prefix."""
    behind = compose.add_prefix(behind, prefix, rename_outputs=False) if prefix else behind
    _set_apart_(model.graph)
    pairs = [(one.name, other.name) for one, other in zip(model.graph.output, behind.graph.input, strict=True)]
    joined = compose.merge_models(model, behind, pairs)
    joined.producer_name, joined.producer_version = model.producer_name, ""
    helper.set_model_props(joined, {entry.key: entry.value for entry in model.metadata_props})
    onnx.checker.check_model(joined, full_check=True)
    return joined


def _set_apart_(graph: GraphProto) -> None:
    """Give the detector's inner values that are called as an output of the suppression another name."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{DETECTOR}{name}" if name in OUTPUTS else name for name in names]
    for value in (*graph.initializer, *graph.value_info, *graph.output):
        value.name = f"{DETECTOR}{value.name}" if value.name in OUTPUTS else value.name


def _heads(model: ModelProto) -> Heads:
    """Return the outputs for a blank image: the kind of head and the levels are constants in them."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    dtype = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    blank = np.zeros([1, *given.shape[1:]], dtype)
    return heads(session.run(None, {given.name: blank})[0])


def _candidates(kind: int, anchors: int, classes: int, levels: tuple[int, ...]) -> str:
    """Return nodes from `known` (1, anchors, classes) to `by_class` (1, classes, anchors), 0 where suppression considers no box.

    ONNX's TopK and NonMaxSuppression take the first of equal scores, as `candidates` does.
    """
    real = "odd = IsNaN (known) scored = Where (odd, none, known)"
    if kind == SOFTMAX:
        return f"""{real} turned = Transpose <perm = [0, 2, 1]> (scored) limit = Constant <value_ints = [{min(OF_CLASS, anchors)}]> ()
    best, at = TopK (turned, limit) blank = Mul (turned, none) by_class = ScatterElements <axis = 2> (blank, at, best)"""
    parts = [
        f"""start{i} = Constant <value_ints = [{first * classes}]> () end{i} = Constant <value_ints = [{last * classes}]> ()
    limit{i} = Constant <value_ints = [{min(OF_LEVEL, (last - first) * classes)}]> () level{i} = Slice (flat, start{i}, end{i}, zero)
    best{i}, place{i} = TopK (level{i}, limit{i}) at{i} = Add (place{i}, start{i})"""
        for i, (first, last) in enumerate(pairwise(levels))
    ]
    bests, ats = (", ".join(f"{name}{i}" for i in range(len(parts))) for name in ("best", "at"))
    return f"""{real} flat = Reshape (scored, last) {" ".join(parts)}
    best = Concat <axis = 0> ({bests}) at = Concat <axis = 0> ({ats}) blank = Mul (flat, none)
    marked = ScatterElements <axis = 0> (blank, at, best) shape = Shape (known) left = Reshape (marked, shape)
    by_class = Transpose <perm = [0, 2, 1]> (left)"""


def _behind(found: Heads, columns: int, ir_version: int) -> ModelProto:
    """Return the graph to append to a detector's anchors."""
    kind, anchors, classes = found.kind, found.anchors.shape[1], columns - MOVES - READS
    ends = {"moves": classes, "middle_moves": classes + 2, "constants": classes + MOVES, "places": classes + MOVES + 1}
    place, growth = WEIGHTS.get(kind, (1.0, 1.0))
    chances = {SOFTMAX: SOFT, CENTRED: CENTRE}.get(kind, EACH)
    constants = f"""int64[1] classes = {{{classes}}},
    int64[1] at_moves = {{{ends["moves"]}}}, int64[1] at_second = {{{ends["middle_moves"]}}}, int64[1] at_constants = {{{ends["constants"]}}},
    int64[1] at_centre = {{{ends["places"]}}}, int64[1] at_size = {{{ends["places"] + 2}}}, int64[1] at_end = {{{columns}}},
    {"" if kind == CENTRED else f"float[1] place = {{{place}}}, float[1] growth = {{{growth}}}, float[1] largest = {{{LARGEST_GROWTH}}}, float[1] halves = {{0.5}},"}"""
    steps = f"""logits = Slice (rows, zero, classes, last)
    {chances}
    first = Slice (rows, at_moves, at_second, last) second = Slice (rows, at_second, at_constants, last)
    centre = Slice (rows, at_centre, at_size, last) size = Slice (rows, at_size, at_end, last)
    {REACHED if kind == CENTRED else GROWN}
    corners = Concat <axis = -1> (low, high)"""
    given = f"float[1, {anchors}, {columns}] rows"
    return _suppression(given, constants, steps, kind, found.levels, classes - 1, ir_version, LIMITS)


def _suppression(
    given: str,
    constants: str,
    steps: str,
    kind: int,
    levels: tuple[int, ...],
    classes: int,
    ir_version: int,
    limits: Limits,
) -> ModelProto:
    """Return the graph from `given` to detections; given are, or its steps make, `corners` (1, anchors, 4) and `known` (1, anchors, classes)."""
    anchors = levels[-1]
    # Equal scores stay in the order of the candidates: rows of NonMaxSuppression are (image, class, anchor).
    ranks = f"0, {anchors}, 1" if kind == SOFTMAX else f"0, 1, {classes}"
    text = f"""
<ir_version: {ir_version}, opset_import: ["" : {OPSET}]>
suppression ({given}) => (float[n, 4] {BOXES}, float[n] {SCORES}, int64[n] {LABELS})
<
    int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] one_more = {{2}}, int64[1] last = {{-1}}, {constants}
    float none = {{0.0}}, float whole_image = {{1.0}}, int64[1] most = {{{limits.detections}}}, float[1] overlap = {{{limits.most_overlap}}},
    float[1] least = {{{limits.least_score}}}, int64[2] anchor_columns = {{0, 2}}, int64[3] ranks = {{{ranks}}}
>
{{
    {steps} inside_image = Clip (corners, none, whole_image)
    {_candidates(kind, anchors, classes, levels)}
    unordered = NonMaxSuppression (inside_image, by_class, most, overlap, least)
    ranked = Mul (unordered, ranks) rank = ReduceSum <keepdims = 0> (ranked, one) all = Shape (rank)
    ordered, first_to_last = TopK <largest = 0> (rank, all) chosen = Gather <axis = 0> (unordered, first_to_last)
    their_scores = GatherND (by_class, chosen)
    their_places = Gather <axis = 1> (chosen, anchor_columns) their_boxes = GatherND (inside_image, their_places)
    their_classes = Slice (chosen, one, one_more, last) their_labels = Squeeze (their_classes, last)
    number = Shape (their_scores) kept = Min (number, most)
    {SCORES}, order = TopK (their_scores, kept)
    {BOXES} = Gather <axis = 0> (their_boxes, order) {LABELS} = Gather <axis = 0> (their_labels, order)
}}"""
    return parser.parse_model(text)
