"""Read the outputs of modules by path while a network runs, in a plain module or a fake-quantized graph."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, fx, nn

from compress.errors import ModelError
from compress.quant.fake_quant import ActivationQuantizer, SameRange
from export.errors import nearest

Features = dict[str, Tensor]
Tapped = Callable[[Tensor], tuple[Tensor, Features]]


def tap(network: nn.Module, paths: Iterable[str]) -> Tapped:
    """Return a function that runs the network on images and returns its output and those of the modules at `paths`.

    In a graph made by `quant.prepare` a module's output is read behind its quantizer, as the next layer reads it. Raises
    ModelError for a path that the network does not have.
    """
    once = dict.fromkeys(paths)
    return _Graph(network, once) if isinstance(network, fx.GraphModule) and once else _Modules(network, once)


class _Modules:
    """A plain network with hooks on some modules, which keep the modules' outputs during `__call__` only.

    The hooks are never removed, as torch.compile could not follow that. A copy of the network (a moving average) has its
    own hooks.
    """

    def __init__(self, network: nn.Module, paths: Iterable[str]) -> None:
        known = dict(network.named_modules())
        for path in paths:
            if path not in known or not path:
                raise _unknown(network, path, known)
        self.network, self.listening = network, False
        self.found: Features = {}
        for path in paths:
            known[path].register_forward_hook(partial(self._keep, path))

    def __call__(self, images: Tensor) -> tuple[Tensor, Features]:
        self.found, self.listening = {}, True
        output = self.network(images)
        found, self.found, self.listening = self.found, {}, False
        return output, found

    def _keep(self, path: str, _module: nn.Module, _inputs: object, output: object) -> None:
        if self.listening and isinstance(output, Tensor):
            self.found[path] = output.clone()  # an in-place ReLU may follow


class _Graph:
    """A copy of the network's graph, with the same layers, that also returns the features."""

    def __init__(self, network: fx.GraphModule, paths: Iterable[str]) -> None:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(network.graph, copies)
        features = {}
        for path in paths:
            source = copies[_result_of(network, path)]
            with graph.inserting_after(source):
                features[path] = graph.call_function(torch.clone, (source,))  # an in-place addition may follow
        graph.output((output, features))
        self.view = fx.GraphModule(network, graph)

    def __call__(self, images: Tensor) -> tuple[Tensor, Features]:
        found: tuple[Tensor, Features] = self.view(images)
        return found


def _result_of(network: fx.GraphModule, path: str) -> fx.Node:
    """Return the node of the module's output: the last one traced inside the module at `path`, behind its quantizer."""
    scopes = {node: [name for name, _ in node.meta.get("nn_module_stack", {}).values()] for node in network.graph.nodes}
    inside = [node for node, names in scopes.items() if path in names]
    if not inside:
        known = dict.fromkeys(name for names in scopes.values() for name in names)
        raise _unknown(network, path, known)
    node: fx.Node = inside[-1]
    while len(node.users) == 1 and _is_quantizer(network, next(iter(node.users))):
        node = next(iter(node.users))
    return node


def _is_quantizer(network: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        network.get_submodule(str(node.target)), ActivationQuantizer | SameRange
    )


def _unknown(network: nn.Module, path: str, known: dict[str, object] | dict[str, nn.Module]) -> ModelError:
    near = nearest(path, filter(None, known), cutoff=0.0)
    return ModelError(f"layer {path!r}: {type(network).__name__} has no module of that path; did you mean {near}?")
