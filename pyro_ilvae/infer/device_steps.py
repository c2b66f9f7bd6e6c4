"""Steps that a device takes while the host looks at the outcome now and then."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_ilvae.infer.annealing import current_beta
from pyro_ilvae.infer.captured_step import (
    CAPTURES,
    CapturedStep,
    NotReadyError,
    Outcome,
    random_state,
    set_random_state,
)
from pyro_ilvae.infer.elbo import AnnealedELBO
from pyro_ilvae.infer.graph_runs import Graph
from pyro_ilvae.infer.optim import PartialOptim

__all__ = ["DeviceStep", "DeviceSteps"]

# Captures of one graph in a row of which none came about.
_MOST_IN_VAIN = 3


class DeviceStep(NamedTuple):
    """A step at whose outcome the host has not looked yet, with what it takes to take the step again."""

    graph: Graph
    optim: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    beta: Any
    num_steps_taken: int | None
    options: list[tuple[dict[str, Any], dict[str, Any]]]
    random_state: Tensor
    loss: Tensor
    is_first: bool = False  # of those in which not all held


class DeviceSteps:
    """The steps of one SVI that run on a device.

    The device skips the update of a step in which not all holds that was assumed, and of all later steps until the host
    looks. These steps are then to be taken again by ``SVI``, in their order.
    """

    def __init__(self) -> None:
        self._outcomes: dict[torch.device, Outcome] = {}
        self._device = torch.device("cpu")  # of the steps that are running
        self._running: list[DeviceStep] = []
        self._not_taken: list[DeviceStep] = []

    def __len__(self) -> int:
        """The number of steps at whose outcome the host has not looked, or that are to be taken again."""
        return len(self._running) + len(self._not_taken)

    @property
    def num_not_taken(self) -> int:
        """The number of steps that are to be taken again."""
        return len(self._not_taken)

    def can_take(self, graph: Graph, inputs: Sequence[Tensor], svi: Any) -> bool:
        """Whether the steps of a graph run on the device, for which it is captured first.

        A warning says why not, once for each graph.
        """
        if graph.device is None or graph.device.type not in CAPTURES or isinstance(svi.optim, PartialOptim):
            return False
        if graph.num_in_vain < _MOST_IN_VAIN and (
            graph.captured is None or not graph.captured.is_current(inputs, svi.optim)
        ):
            svi.synchronize()  # a capture runs on what the steps before it leave
            self._capture(graph, inputs, svi.optim)
        # Gradients that the user left are added to, which is no part of a captured step.
        return graph.captured is not None and all(parameter.grad is None for parameter in graph.parameters)

    def _capture(self, graph: Graph, inputs: Sequence[Tensor], optim: Any) -> None:
        assert graph.device is not None
        graph.captured = None
        graph.num_in_vain += 1
        outcome = self._outcomes.setdefault(graph.device, Outcome(graph.device))
        reason = "the optimizer makes its state anew in each step"
        try:
            graph.captured = CapturedStep(graph.recorded, list(graph.parameters), inputs, optim, outcome)
            graph.num_in_vain = 0
        except NotReadyError:
            pass
        except Exception as error:  # the operations one by one do the same
            graph.num_in_vain = _MOST_IN_VAIN
            reason = str(error).strip().partition("\n")[0]
        if graph.num_in_vain >= _MOST_IN_VAIN:
            warnings.warn(f"GraphSVI runs a graph operation by operation, because {reason}", stacklevel=4)

    def take(
        self, graph: Graph, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], svi: Any
    ) -> Tensor:
        """Take a step, without waiting for it, and return the loss."""
        assert graph.device is not None
        if self._running and graph.device != self._device:
            svi.synchronize()
        self._device = graph.device
        state = random_state(self._device)
        loss: Tensor = graph.captured(inputs)
        elbo: AnnealedELBO = svi.elbo
        own = _current(elbo.beta), elbo._step(), _options(svi.optim)
        self._running.append(DeviceStep(graph, svi.optim, args, kwargs, *own, state, loss))
        return loss

    def look(self) -> Iterator[DeviceStep]:
        """Wait for all steps, and give those that were not taken, one by one.

        If an error ends the iteration, the steps after it are given at the next look.
        """
        if self._running:
            outcome = self._outcomes[self._device]
            running, self._running = self._running, []
            num_taken = int(outcome.num_taken)
            for step in running[:num_taken]:
                step.graph.num_failures = 0
            self._not_taken += [step._replace(is_first=i == 0) for i, step in enumerate(running[num_taken:])]
            outcome.reset()
        while self._not_taken:
            yield self._not_taken.pop(0)

    @contextmanager
    def as_at(self, step: DeviceStep, svi: Any) -> Iterator[None]:
        """A context with the draws, beta, options and settings of an earlier step, and nothing around it."""
        now, state, optim = _options(step.optim), random_state(self._device), svi.optim
        handlers = list(_PYRO_STACK)
        gradients = [parameter.grad for parameter in step.graph.parameters]
        _PYRO_STACK.clear()
        try:
            for parameter in step.graph.parameters:
                parameter.grad = None
            svi.optim = step.optim
            _set_options(step.optim, step.options)
            set_random_state(self._device, step.random_state)
            with torch.enable_grad(), step.graph.settings(), svi.elbo._as_at(step.beta, step.num_steps_taken):
                yield
        finally:
            svi.optim = optim
            _set_options(step.optim, now)
            set_random_state(self._device, state)
            for parameter, gradient in zip(step.graph.parameters, gradients, strict=True):
                parameter.grad = gradient
            _PYRO_STACK.extend(handlers)


def _current(beta: Any) -> Any:
    """The present value of a beta, or of each site's beta, which no later change reaches."""
    if isinstance(beta, Mapping):
        return {name: _current(own) for name, own in beta.items()}
    value = current_beta(beta)
    return value.clone() if isinstance(value, Tensor) else value


def _options(optim: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The parameter groups, each with its parameters and options, such as the learning rate, as they are now."""
    return [
        (
            group,
            {name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items()}
            | {"params": list(group["params"])},
        )
        for group in (optim.optimizer.param_groups if optim.optimizer is not None else ())
    ]


def _set_options(optim: Any, options: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    if optim.optimizer is None:
        return
    optim.optimizer.param_groups[:] = [group for group, _ in options]
    for group, own in options:
        for name, value in own.items():
            if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
                group[name].copy_(value)  # a scheduler may hold the tensor
            else:
                group[name] = value
