"""What a recorded graph computes from constants alone, and where its operations run."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from pyro_ilvae.infer.recording import memory_of

__all__ = ["first_off_device", "with_folded_constants"]


def with_folded_constants(
    graph: fx.GraphModule, constants: Sequence[Tensor], device: torch.device
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph without the operations on constants of other devices, whose results are the same each time.

    Constants of the device itself stay what the graph reads, because they may be changed in place.

    Args:
        graph: a graph whose last arguments are the constants.
        constants: the constants.
        device: the device that the graph is for.

    Returns:
        The graph whose last arguments are other constants, and these constants.
    """
    graph = copy.deepcopy(graph)
    nodes = list(graph.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    own = placeholders[len(placeholders) - len(constants) :]
    pairs = list(zip(own, constants, strict=True))
    results: dict[fx.Node, Any] = {node: constant for node, constant in pairs if constant.device.type != device.type}
    changed = _changed_in_place(nodes)
    for node in nodes:
        fixed = node.op == "call_function" and all(other in results for other in node.all_input_nodes)
        if fixed and node not in changed and not _draws(node):
            with torch.no_grad():
                args, kwargs = map_arg((node.args, node.kwargs), results.__getitem__)
                results[node] = node.target(*args, **kwargs)
    first = next(node for node in nodes if node.op != "placeholder")
    kept = [constant for node, constant in pairs if node not in results]
    num_live = len(kept)
    for node, value in results.items():
        if isinstance(value, Tensor) and any(user not in results for user in node.users):
            with graph.graph.inserting_before(first):
                entry = graph.graph.placeholder(f"folded_{len(kept) - num_live}")
            node.replace_all_uses_with(entry, delete_user_cb=lambda user: user not in results)
            kept.append(value)
    for node in reversed(list(results)):
        if not node.users:
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return graph, kept


def first_off_device(graph: fx.GraphModule, arguments: Sequence[Tensor], device: torch.device) -> str | None:
    """The first operation of a graph whose result is on another device, as text; None if there is none."""
    with FakeTensorMode() as mode, torch.no_grad():
        devices = _Devices(graph, device)
        devices.run(*[mode.from_tensor(argument) for argument in arguments])
    return devices.found


class _Devices(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, device: torch.device) -> None:
        super().__init__(graph)
        self._type = device.type
        self.found: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and self.found is None:
            tensors = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
            if any(value.device.type != self._type for value in tensors):
                self.found = str(n.target)
        return result


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _changed_in_place(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes whose memory an operation writes to, with all that they were computed from."""
    changed: set[fx.Node] = set()
    operations = [node for node in nodes if isinstance(node.target, torch._ops.OpOverload)]
    waiting = [node for node in operations if memory_of(node)[1]]
    while waiting:
        node = waiting.pop()
        if node not in changed:
            changed.add(node)
            waiting += node.all_input_nodes
    return changed
