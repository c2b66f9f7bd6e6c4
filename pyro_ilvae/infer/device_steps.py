"""Steps that a device takes while the host looks at the outcome now and then."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyro_ilvae.infer.annealing import current_beta
from pyro_ilvae.infer.captured_step import CAPTURES, CapturedStep, Outcome, random_state, set_random_state
from pyro_ilvae.infer.elbo import AnnealedELBO
from pyro_ilvae.infer.graph_runs import Graph

__all__ = ["DeviceStep", "DeviceSteps"]


class DeviceStep(NamedTuple):
    """A step at whose outcome the host has not looked yet, with what it takes to take the step again."""

    graph: Graph
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    beta: Any
    num_steps_taken: int | None
    rates: list[Any]
    random_state: Tensor
    loss: Tensor


class DeviceSteps:
    """The steps of one SVI that run on a device.

    The device skips the update of a step in which not all holds that was assumed, and of all later steps until the host
    looks. These steps are then to be taken again by ``SVI``, in their order and from the draws of the first of them.

    Args:
        optim: the optimizer.
    """

    def __init__(self, optim: Any) -> None:
        self._optim = optim
        # None for a graph that a device cannot take by itself.
        self._captured: WeakKeyDictionary[Graph, CapturedStep | None] = WeakKeyDictionary()
        self._outcome: Outcome | None = None
        self._device = torch.device("cpu")
        self._waiting: list[DeviceStep] = []

    def __len__(self) -> int:
        """The number of steps at whose outcome the host has not looked."""
        return len(self._waiting)

    def must_capture(self, graph: Graph, inputs: Sequence[Tensor]) -> bool:
        """Whether a graph has to be captured before its steps can run on the device; no step may then be waiting."""
        if not self._is_on_device(graph):
            return False
        if graph not in self._captured:
            return True
        step = self._captured[graph]
        return step is not None and not step.is_current(inputs)

    def can_take(self, graph: Graph, inputs: Sequence[Tensor]) -> bool:
        """Whether the steps of a graph run on the device; a warning says why not, once for each graph."""
        if self.must_capture(graph, inputs):
            self._capture(graph, inputs)
        # Gradients that the user left are added to, which is no part of a captured step.
        without = all(parameter.grad is None for parameter in graph.parameters)
        return without and self._is_on_device(graph) and self._captured[graph] is not None

    def _is_on_device(self, graph: Graph) -> bool:
        devices = {parameter.device for parameter in graph.parameters}
        return len(devices) == 1 and next(iter(devices)).type in CAPTURES

    def _capture(self, graph: Graph, inputs: Sequence[Tensor]) -> None:
        parameters = list(graph.parameters)
        self._captured[graph] = None
        if self._outcome is None or parameters[0].device != self._device:
            self._device = parameters[0].device
            self._outcome = Outcome(self._device)
        try:
            self._captured[graph] = CapturedStep(graph.recorded, parameters, inputs, self._optim, self._outcome)
        except Exception as error:  # the operations one by one do the same
            first_line = str(error).strip().partition("\n")[0]
            warnings.warn(f"GraphSVI runs a graph operation by operation, because {first_line}", stacklevel=4)

    def take(
        self, graph: Graph, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], elbo: AnnealedELBO
    ) -> Tensor:
        """Take a step, without waiting for it, and return the loss."""
        step = self._captured[graph]
        assert step is not None
        state = random_state(self._device)
        loss = step(inputs)
        rates = [group["lr"] for group in self._optim.optimizer.param_groups]
        self._waiting.append(DeviceStep(graph, args, kwargs, _current(elbo.beta), elbo._step(), rates, state, loss))
        return loss

    def look(self) -> list[DeviceStep]:
        """Wait for all steps, and return those that were not taken; the random state is then as before them."""
        waiting, self._waiting = self._waiting, []
        assert self._outcome is not None
        not_taken = waiting[int(self._outcome.num_taken) :]
        self._outcome.reset()
        if not_taken:
            set_random_state(self._device, not_taken[0].random_state)
        return not_taken

    @contextmanager
    def as_at(self, step: DeviceStep, elbo: AnnealedELBO) -> Iterator[None]:
        """A context with the beta and the learning rates of an earlier step."""
        groups = self._optim.optimizer.param_groups
        now = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, step.rates, strict=True):
                group["lr"] = rate
            with elbo._as_at(step.beta, step.num_steps_taken):
                yield
        finally:
            for group, rate in zip(groups, now, strict=True):
                group["lr"] = rate


def _current(beta: Any) -> Any:
    """The numbers of a beta, or of those of several sites."""
    if isinstance(beta, Mapping):
        return {name: current_beta(own) for name, own in beta.items()}
    return current_beta(beta)
