"""One graph of tensor operations for the loss of a model and guide and its gradients."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from pyro_ilvae._recording import recording
from pyro_ilvae.infer.value_reads import Guard, NotRecordableError, ValueReads, is_of_user, place_of

__all__ = [
    "Recorded",
    "check_arguments",
    "in_layout_of",
    "kind_of",
    "memory_id",
    "memory_of",
    "other_draws_of_python",
    "preserved",
    "random_states_of_gpus",
    "record",
    "shared_memory",
]

# Operations whose result has a shape that depends on values.
_DYNAMIC = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class Recorded:
    """A graph from inputs to a loss, gradients and whether all that was assumed holds.

    Attributes:
        graph: a module whose arguments are the inputs and the constants, and whose results are the loss, of shape (), a
            boolean of shape () that says whether loss and gradients are finite and every guard holds, and the gradients
            of the inputs that have one.
        constants: the tensors that were made or met while recording and are no inputs.
        has_gradient: for each parameter, whether the loss depends on it.
        written: the positions of inputs that the graph writes to, such as running averages.
        signature: what graphs that compute the same have in common.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: list[Tensor],
        parameters: list[Tensor],
        constants: list[Tensor],
        has_gradient: list[bool],
    ) -> None:
        self.graph = graph
        self.constants = constants
        self.has_gradient = has_gradient
        self.written = _check_operations(graph, len(inputs))
        entering = [*inputs, *parameters, *constants]
        self.signature = (str(graph.code), *map(kind_of, entering), *shared_memory(entering))

    def computes_the_same_as(self, other: "Recorded") -> bool:
        """Whether another graph has the same operations and constants."""
        return self.signature == other.signature and all(
            first is second or (first.dtype == second.dtype and torch.equal(first, second))
            for first, second in zip(self.constants, other.constants, strict=True)
        )


def record(loss: Callable[[], Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Recorded:
    """Record a loss and its gradients.

    The random state, and the values of inputs, are afterwards as before.

    Args:
        loss: computes the loss from the very tensors ``inputs`` and ``parameters``.
        inputs: the tensors whose values may differ when the graph runs.
        parameters: the tensors with respect to which the gradients are taken.

    Returns:
        The graph as a function of ``(*inputs, *parameters)``.

    Raises:
        NotRecordableError: for what a graph cannot repeat.
    """
    has_gradient: list[bool] = []

    def traced(*_: Tensor) -> list[Tensor]:
        with ValueReads() as reads:
            value = loss()
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = iter(torch.autograd.grad(value, trained, allow_unused=True))
        own = [next(gradients) if parameter.requires_grad else None for parameter in parameters]
        has_gradient[:] = [gradient is not None for gradient in own]
        pairs = zip(own, parameters, strict=True)
        found = [in_layout_of(parameter, gradient) for gradient, parameter in pairs if gradient is not None]
        found = _in_memory_of_their_own(found, tensors)
        return [value.detach(), _holds(value, found, reads.guards), *found]

    tensors = [*inputs, *parameters]
    if any(value.requires_grad for value in inputs):
        raise NotRecordableError("a tensor that is no parameter requires a gradient")
    try:
        with preserved(tensors), recording(), torch.enable_grad(), _without_mkldnn():
            graph = make_fx(traced)(*tensors)
    except NotRecordableError:
        raise
    except Exception as error:
        if "value out of a tracing tensor" in str(error):
            raise NotRecordableError(
                f"an operation depends on the values of a tensor {_place_of_user(error)}"
            ) from error
        first_line = str(error).strip().partition("\n")[0]
        raise NotRecordableError(f"of a {type(error).__name__} {_place_of_user(error)}: {first_line}") from error
    constants = _lift_constants(graph)
    if any(constant.requires_grad for constant in constants):
        raise NotRecordableError(
            "a tensor that is not registered with Pyro requires a gradient, which SVI adds to: register it, as "
            "pyro.module does, or set requires_grad to False"
        )
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Recorded(graph, list(inputs), list(parameters), constants, has_gradient)


def _in_memory_of_their_own(gradients: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that an optimizer may scale in place one by one: terms of a sum share one tensor as gradient."""
    taken = set(map(memory_id, others))
    separate = []
    for gradient in gradients:
        if memory_id(gradient) in taken:
            gradient = gradient.clone()
        taken.add(memory_id(gradient))
        separate.append(gradient)
    return separate


def kind_of(value: Tensor) -> tuple[Any, ...]:
    """What is the same for all tensors that one graph takes in one place."""
    return value.shape, value.dtype, value.device, value.stride() if value.layout is torch.strided else value.layout


def shared_memory(values: Sequence[Tensor]) -> tuple[Any, ...]:
    """Which tensors are views of one memory, and of what part of it; compiled code that writes takes that as it is."""
    memory = [memory_id(value) for value in values]
    if len(set(memory)) == len(memory):
        return ()
    return tuple((memory.index(one), value.storage_offset()) for one, value in zip(memory, values, strict=True))


def memory_id(value: Tensor) -> int:
    """What tensors have in common that are views of one memory."""
    return value.untyped_storage()._cdata if value.layout is torch.strided else id(value)


def check_arguments(leaves: list[Any]) -> None:
    """Raise for arguments in which tensors may be hidden."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise NotRecordableError("an argument requires a gradient, which SVI adds to")
        if not isinstance(leaf, Tensor | str | bytes | int | float | complex | torch.dtype | torch.device | None):
            raise NotRecordableError(f"an argument of type {type(leaf).__name__} is neither a tensor nor a number")


def in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient with the strides of its parameter, which fused optimizers take for granted."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def random_states_of_gpus() -> list[Tensor]:
    """The random state of each GPU that is in use."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


@contextmanager
def preserved(tensors: Sequence[Tensor]) -> Iterator[None]:
    """A context after which the random state and the values of tensors are as before."""
    of_cpu, of_gpus = pyro.util.get_rng_state(), random_states_of_gpus()
    values = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        pyro.util.set_rng_state(of_cpu)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
        with torch.no_grad():
            for tensor, version, value in values:
                # The version says nothing about changes by way of ``.data``.
                if tensor._version != version or not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextmanager
def other_draws_of_python() -> Iterator[None]:
    """A context, inside :func:`preserved`, in which the generators of Python and NumPy have moved on."""
    random.random()
    np.random.random()
    yield


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Without the library whose LSTM is one operation that has no derivative in a graph."""
    # The public context manager sets another flag too, which warns on some machines.
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _holds(loss: Tensor, gradients: Sequence[Tensor], guards: Sequence[Guard]) -> Tensor:
    """Whether loss and gradients are finite and each guarded value is the one that was seen."""
    conditions = [loss.detach().isfinite().all()]
    conditions += [gradient.isfinite().all() for gradient in gradients]
    for value, expected in guards:
        conditions.append((value.reshape(()) == expected).to(loss.device))
    return torch.stack(conditions).all()


def _lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Make the tensors that the graph holds its last inputs."""
    nodes = list(graph.graph.nodes)
    first = next(node for node in nodes if node.op != "placeholder")
    by_tensor: dict[int, fx.Node] = {}
    constants: list[Tensor] = []
    for node in nodes:
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if not isinstance(tensor, Tensor):
            raise NotRecordableError(f"an operation takes a {type(tensor).__name__}")
        if id(tensor) not in by_tensor:
            with graph.graph.inserting_before(first):
                by_tensor[id(tensor)] = graph.graph.placeholder(f"constant_{len(constants)}")
                by_tensor[id(tensor)].meta["tensor_meta"] = _extract_tensor_metadata(tensor)
            constants.append(tensor)
        node.replace_all_uses_with(by_tensor[id(tensor)])
        graph.graph.erase_node(node)
    return constants


def _check_operations(graph: fx.GraphModule, num_inputs: int) -> list[int]:
    """Raise for operations that a graph cannot repeat, and return the positions of the inputs that are written to."""
    inputs = {node: i for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
    roots = {node: node for node in graph.graph.nodes}  # what each node is, or is a view of
    varying = set(inputs)  # what may be another value in another step
    written = set()
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        varies = any(roots[other] in varying for other in node.all_input_nodes)
        if not isinstance(node.target, torch._ops.OpOverload):
            if node.args and isinstance(node.args[0], fx.Node):  # one of several views
                roots[node] = roots[node.args[0]]
        else:
            if _has_dynamic_shape(node, [n for n in node.all_input_nodes if roots[n] in varying]):
                raise NotRecordableError(f"the shape of a result depends on values ({node.target})")
            varies = varies or torch.Tag.nondeterministic_seeded in node.target.tags
            aliases, changed = memory_of(node)
            for own in aliases:
                roots[node] = roots[own]
            written |= {roots[own] for own in changed}
        if varies:
            varying |= {node, roots[node]}
    positions = {inputs[node] for node in written if node in inputs}
    if any(position >= num_inputs for position in positions):
        raise NotRecordableError("a parameter, or a tensor that no attribute holds, is changed in place")
    return sorted(positions)


def memory_of(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The arguments whose memory the result of an operation shares, and those that the operation writes to."""
    aliases, written = [], []
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    for argument in arguments:
        value = given.get(argument.name)
        own = [one for one in (value if isinstance(value, list | tuple) else (value,)) if isinstance(one, fx.Node)]
        if argument.alias_info is not None:
            aliases += own
        # PyTorch's operations for running averages do not say that they write to them.
        unsaid = argument.name in ("running_mean", "running_var") and given.get(
            "training", "update" in str(node.target)
        )
        if unsaid or (argument.alias_info is not None and argument.alias_info.is_write):
            written += own
    return aliases, written


def _has_dynamic_shape(node: fx.Node, varying: Sequence[fx.Node]) -> bool:
    """Whether the values of some arguments, which may vary, decide about the shape of the result."""
    if node.target is torch.ops.aten.index.Tensor:
        indices: Any = node.args[1]
        kinds = [_kind(index) for index in indices if index in varying]
        return any(kind is not None and kind[1] in (torch.bool, torch.uint8) for kind in kinds)
    return bool(varying) and any(tag in node.target.tags for tag in _DYNAMIC)  # type: ignore[union-attr]


def _kind(node: fx.Node) -> Any:
    """Shape and dtype of a node's value, as far as they are known."""
    value = node.meta.get("tensor_meta")
    return None if value is None else (value.shape, value.dtype, value.stride)


def _place_of_user(error: BaseException) -> str:
    """The innermost place of the user's own code in a traceback."""
    found, trace = "in an operation of PyTorch", error.__traceback__
    while trace is not None:
        if is_of_user(trace.tb_frame):
            found = place_of(trace.tb_frame)
        trace = trace.tb_next
    return found
