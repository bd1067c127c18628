"""Name a graph's nodes after the modules they come from, so that an audit can say `layer1.0.conv1` and not `node_Conv_96`."""

import ast
import re
from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir

SCOPES, RULE = "pkg.torch.onnx.name_scopes", "pkg.onnxscript.rewriter.rule_name"
# What ONNX Runtime adds to a name when it replaces or doubles the node: a counter, the layout of its float convolutions, and before
# the name that it computes float16 in float32.
ADDED = re.compile(r"^InsertedPrecisionFreeCast_|(_nchwc|_token_\d+|_nhwc|/duplicated)+$")


def name_nodes_(graph: ir.Graph) -> None:
    """Name every node `<module path>/<OpType>`, numbered where that is taken, and its outputs after it.

    Reads the exporter's metadata. A node that no module holds is `<OpType>` alone; the graph's own inputs and outputs
    keep their names.
    """
    names = unique(f"{_module(node)}/{node.op_type}".lstrip("/") for node in graph)
    for node, name in zip(graph, names, strict=True):
        node.name = name
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{name}:{index}" if index else name


def unique(names: Iterable[str]) -> list[str]:
    """Return the names in order; the second `a` is `a_1`, the third `a_2`."""
    seen: Counter[str] = Counter()
    taken: set[str] = set()
    result: list[str] = []
    for name in names:
        free = name
        while free in taken:
            seen[name] += 1
            free = f"{name}_{seen[name]}"
        taken.add(free)
        result.append(free)
    return result


def module_of(node_name: str | None) -> str:
    """Return the module path in a node's name, also of one that ONNX Runtime replaced; another name as it is."""
    name = node_name or ""
    return ADDED.sub("", name).rpartition("/")[0] or name


def _module(node: ir.Node) -> str:
    """Return the path of the innermost module whose forward made the node, empty where it is the network's own."""
    if "BatchNorm" in node.metadata_props.get(RULE, ""):
        # Folded into the convolution: the note names the batch-norm, the weights still name the convolution.
        assert node.inputs[1] is not None
        return str(node.inputs[1].name).rpartition(".")[0]
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))  # outer modules first, then the operation itself
    return str(scopes[-2]) if len(scopes) > 1 else ""
