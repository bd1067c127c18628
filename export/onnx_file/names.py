"""Name a graph's nodes after their modules, so that an audit can say `layer1.0.conv1` instead of `node_Conv_96`."""

import ast
import re
from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir

SCOPES, RULE = "pkg.torch.onnx.name_scopes", "pkg.onnxscript.rewriter.rule_name"
# Additions by ONNX Runtime when it replaces, fuses or duplicates a node: suffixes for a counter, a fusion or the layout of float convolutions,
# and a prefix for float16 computed in float32.
ADDED = re.compile(r"^InsertedPrecisionFreeCast_|(_nchwc|_token_\d+|_nhwc|_pre_q|/duplicated|/\w+Fusion/?)+$")


def name_nodes_(graph: ir.Graph) -> None:
    """Name every node `<module path>/<OpType>`, with a number if that is taken, and its outputs after it.

    The paths are in the exporter's metadata. A node outside of all modules is `<OpType>`; the graph's inputs and outputs
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
    """Return the module path in a node's name, also after ONNX Runtime replaced the node; other names unchanged."""
    name = node_name or ""
    return ADDED.sub("", name).rpartition("/")[0] or name


def _module(node: ir.Node) -> str:
    """Return the path of the innermost module whose forward made the node, empty for the network itself."""
    if "BatchNorm" in node.metadata_props.get(RULE, ""):
        # Folded into the convolution: the metadata name the batch-norm, but the weights still name the convolution.
        assert node.inputs[1] is not None
        return str(node.inputs[1].name).rpartition(".")[0]
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))  # outer modules first, then the operation itself
    return str(scopes[-2]) if len(scopes) > 1 else ""
