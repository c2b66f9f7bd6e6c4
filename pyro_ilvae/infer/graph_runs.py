"""How a recorded graph runs: compiled where a compiler is at hand, and otherwise operation by operation."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, fx
from torch.distributions import Distribution

from pyro_ilvae.infer.program_state import ProgramState
from pyro_ilvae.infer.recording import Recorded, in_layout_of, random_states_of_gpus

__all__ = ["Graph", "are_close", "has_hooks", "restore"]

# Compiled functions by what they compute, so that models of one structure share them.
_COMPILED: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
_MOST_COMPILED = 64


class State(NamedTuple):
    """What a graph changes when it runs: random states, and tensors that it writes to, with their values."""

    of_cpu: Tensor
    of_gpus: list[Tensor]
    values: list[tuple[Tensor, Tensor]]


class Graph:
    """A recorded graph with the parameters that it reads.

    Args:
        recorded: the graph.
        parameters: the names of the parameters in Pyro's store, by the leaves that an optimizer moves.
        state: what the model and the guide hold, which lives as long as the graph.
        compiled: whether to compile the graph.

    Attributes:
        recorded: the graph.
        captured: the step with its optimizer as one operation of a device; None if that was not tried or not possible.
        num_in_vain: how often in a row that was tried in vain.
        device: where all parameters are, if they are in one place.
        kind: how the graph runs, in words.
        num_runs: the number of steps that it has taken.
        num_failures: the number of runs in a row in which not all held that was assumed.
    """

    def __init__(
        self, recorded: Recorded, parameters: Mapping[Tensor, str], state: ProgramState, compiled: bool
    ) -> None:
        self.parameters = dict(parameters)
        self._kinds = list(map(_kind, parameters))
        devices = {parameter.device for parameter in parameters}
        self.device = devices.pop() if len(devices) == 1 else None
        self._state = state
        self.num_runs = self.num_failures = self.num_in_vain = 0
        self.captured: Any = None
        self._held = state.held(tensors=False)
        self.recorded = recorded
        self._run = _compiled(recorded) if compiled else recorded.graph
        self.kind = "graph" if self._run is recorded.graph else "compiled graph"

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The loss, whether all holds that was assumed, and the gradients; None for a gradient that there is not."""
        arguments = (*inputs, *self.parameters, *self.recorded.constants)
        with torch.no_grad():
            try:
                loss, holds, *gradients = self._run(*arguments)
            except Exception as error:
                if self._run is self.recorded.graph:
                    raise
                first_line = str(error).strip().partition("\n")[0]
                warnings.warn(f"GraphSVI runs the graph without compilation, which failed: {first_line}", stacklevel=5)
                self._run, self.kind = self.recorded.graph, "graph"
                loss, holds, *gradients = self._run(*arguments)
        found = iter(gradients)
        there = zip(self.parameters, self.recorded.has_gradient, strict=True)
        return loss, holds, [in_layout_of(parameter, next(found)) if has else None for parameter, has in there]

    def state(self, inputs: Sequence[Tensor]) -> State:
        """The present state of what the graph changes."""
        written = [(inputs[i], inputs[i].clone()) for i in self.recorded.written]
        return State(torch.get_rng_state(), random_states_of_gpus(), written)

    @contextmanager
    def settings(self) -> Iterator[None]:
        """A context with the settings that the graph was recorded with, such as training mode."""
        now = self._state.held(tensors=False)
        self._state.put_back(self._held)
        try:
            yield
        finally:
            self._state.put_back(now)

    def is_current(self) -> bool:
        """Whether Pyro's store still holds the parameters of the graph, and they are what they were."""
        store = pyro.get_param_store()._params
        return self._kinds == list(map(_kind, self.parameters)) and all(
            store.get(name) is parameter for parameter, name in self.parameters.items()
        )


def has_hooks(parameter: Tensor) -> bool:
    """Whether Python code runs when a parameter gets a gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _kind(parameter: Tensor) -> tuple[Any, ...]:
    parts = (parameter.shape, parameter.dtype, parameter.device, parameter.stride(), parameter.requires_grad)
    return *parts, has_hooks(parameter)


def restore(state: State) -> None:
    """Return to an earlier state."""
    torch.set_rng_state(state.of_cpu)
    if state.of_gpus:
        torch.cuda.set_rng_state_all(state.of_gpus)
    with torch.no_grad():
        for tensor, value in state.values:
            tensor.copy_(value)


def are_close(own: Tensor | None, other: Tensor | None, among: float = 0.0) -> bool:
    """Whether two tensors are equal up to rounding, as sums of many terms round.

    ``among`` is the norm of all that was computed with them: a gradient that is 0 among large ones, as before a layer
    that takes its mean away, is 0 up to the rounding of the large ones.
    """
    if own is None or other is None:
        return own is other or not bool((own if other is None else other).count_nonzero())  # type: ignore[union-attr]
    tolerance = 1e-8 if own.dtype == torch.float64 else 1e-3
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        tolerance = 5e-2  # numbers of two or three digits
    scale = other.double().norm() + 1e-3 * (among + other.numel() ** 0.5)
    return bool((own.double() - other.double()).norm() <= tolerance * scale)


def _compiled(recorded: Recorded) -> Callable[..., Any]:
    key = recorded.signature
    if key not in _COMPILED:
        _COMPILED[key] = _Compiled(recorded.graph)
        while len(_COMPILED) > _MOST_COMPILED:
            _COMPILED.popitem(last=False)
    _COMPILED.move_to_end(key)
    return _COMPILED[key]


class _Compiled:
    """A graph that is compiled when it runs for the first time."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph: fx.GraphModule | None = graph
        self._function: Callable[..., Any] = self._compile

    def __call__(self, *arguments: Tensor) -> Any:
        return self._function(*arguments)

    def _compile(self, *arguments: Tensor) -> Any:
        import torch._inductor  # which takes a second, and only compilation needs

        assert self._graph is not None
        with _quiet_compiler():
            # Fallback: compiled code then draws from PyTorch's generator in the order of the single operations.
            # torch.compile would read the graph's code once more, and check at each step what does not change here.
            function = torch._inductor.compile(self._graph, list(arguments), options={"fallback_random": True})
            results = function(*arguments)
        self._function, self._graph = function, None
        return results


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """A context for the compiler, which warns of its own parts and leaves distributions unchecked."""
    validated = Distribution._validate_args
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.")
            yield
    finally:
        Distribution.set_default_validate_args(validated)
