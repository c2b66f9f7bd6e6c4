"""Whether a guide takes z from values that it holds for each datum, or computes z from the data.

A guide holds its values in any way: in parameters of Pyro or PyTorch, flattened, transposed, or one parameter for each
datum. The graph of gradients shows what z is made of: values that are selected by the indices of the plate, or that are
only reshaped and constrained, are the guide's own, and what is computed from data passes through other operations.
"""

from collections.abc import Iterator
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_ilvae.distributions import innermost

# The operations of the graph, without the ending "Backward0".
_SELECTIONS = {"Index", "IndexSelect", "Embedding", "Gather"}  # their first input is what they select from
_JOINS = {"Stack", "Cat"}
_SHAPES = {
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Slice", "Select", "Unsqueeze", "Squeeze"),
    *("Expand", "Clone", "Alias", "AsStrided", "Split", "Unbind", "ToCopy"),
}
_CONSTRAINTS = {"Exp", "Log", "Softplus", "Sigmoid", "Tanh", "Neg", "Abs"}


def has_graph(trace: Trace, site: str) -> bool:
    """Whether the graph of gradients shows what z is made of."""
    return not torch.compiler.is_compiling() and any(part.requires_grad for part in _parts(trace, site))


def are_selected(trace: Trace, site: str, indices: Tensor, size: int) -> bool:
    """Whether values of ``size`` data are selected by the ``indices`` anywhere in the graph of z."""
    for node in _nodes(trace, site):
        selected_by = _indices(node)
        if selected_by is None or not torch.equal(selected_by.cpu(), indices.cpu()):
            continue
        leaves = _leaves(node.next_functions[0][0])
        if leaves and all(leaf.numel() % size == 0 for leaf in leaves):
            return True
    return False


def are_held(trace: Trace, site: str, frame: Any, *, unselected: bool = False) -> bool:
    """Whether the location of z has a value for each datum of the plate ``frame`` that no data enter.

    Args:
        trace: a trace of the guide.
        site: the latent site, z.
        frame: the plate over the data.
        unselected: whether values count only if there are no more of them, so that they belong to positions.
    """
    fn: Any = trace.nodes[site]["fn"]
    dim = frame.dim - fn.event_dim
    for loc in _parts(trace, site, ("loc", "v")):
        shared = loc.dim() < -dim or loc.shape[dim] != frame.size or (frame.size > 1 and loc.stride(dim) == 0)
        start = loc.grad_fn or (loc if loc.requires_grad else None)
        if shared or start is None:
            continue
        leaves = _leaves(start)
        as_large = len(leaves) == 1 and frame.size > 1 and leaves[0].numel() == loc.numel()
        if leaves and (not unselected or as_large):
            return True
    return False


def seem_held(trace: Trace, site: str, frame: Any, size: int, model: nn.Module) -> bool:
    """Whether a parameter that is none of the ``model`` is as large as the z of ``size`` data.

    This is for a z without gradients, of which no graph says what it is made of.
    """
    fn: Any = trace.nodes[site]["fn"]
    shape = (size, *(1,) * (-frame.dim - 1), *fn.event_shape)
    own = {id(parameter) for parameter in model.parameters()}
    return any(
        value.shape[-len(shape) :] == shape and id(value) not in own and id(site["value"]) not in own
        for site, value in parameters(trace)
    )


def parameters(trace: Trace) -> list[tuple[Any, Any]]:
    """The sites of the guide's parameters, each with all of its entries."""
    sites = [node for node in trace.nodes.values() if node["type"] == "param"]
    return [(site, getattr(site["value"], "_pyro_unconstrained_param", site["value"])) for site in sites]


def _parts(trace: Trace, site: str, names: tuple[str, ...] | None = None) -> list[Tensor]:
    """The tensors of which the distribution of z consists."""
    attributes = vars(innermost(trace.nodes[site]["fn"]))
    return [
        value for name, value in attributes.items() if isinstance(value, Tensor) and (names is None or name in names)
    ]


def _name(node: Any) -> str:
    return str(node.name()).partition("Backward")[0]


def _nodes(trace: Trace, site: str) -> Iterator[Any]:
    """All operations of the graph of z."""
    todo, seen = [part.grad_fn for part in _parts(trace, site) if part.grad_fn is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo += [other for other, _ in node.next_functions if other is not None]


def _indices(node: Any) -> Tensor | None:
    """The indices by which an operation selects from one dimension."""
    name = _name(node)
    if name == "Index":
        given = [index for index in node._saved_indices if index is not None]
        return given[0] if len(given) == 1 else None
    if name == "IndexSelect":
        return node._saved_index  # type: ignore[no-any-return]
    return node._saved_indices if name == "Embedding" else None


def _leaves(start: Any) -> list[Tensor]:
    """The parameters of which ``start`` consists, in another shape or constrained; none if anything else enters."""
    found: list[Tensor] = []
    todo = [start]
    while todo:
        node = todo.pop()
        if isinstance(node, Tensor):
            found.append(node)
            continue
        if node is None:
            return []
        if hasattr(node, "variable"):
            found.append(node.variable)
            continue
        name = _name(node)
        inputs = [other for other, _ in node.next_functions]
        if name in _SELECTIONS:
            todo.append(inputs[0])
        elif name in _JOINS or name in _SHAPES or name in _CONSTRAINTS:
            todo += inputs
        else:
            return []
    return found
