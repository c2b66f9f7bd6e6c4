"""A recorded step with its optimizer as one CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as optimizers

from pyro_ilvae.infer.constant_folding import first_off_device, with_folded_constants
from pyro_ilvae.infer.graph_runs import are_close
from pyro_ilvae.infer.optim import JointOptim
from pyro_ilvae.infer.recording import Recorded, in_layout_of, memory_id, preserved
from pyro_ilvae.infer.value_reads import NotRecordableError

__all__ = ["CAPTURES", "CapturedStep", "NotReadyError", "Outcome", "may_capture", "random_state", "set_random_state"]


class Outcome:
    """What a device knows of the steps since the host looked last.

    Attributes:
        skips: 1 from the first step on in which not all held, else 0: what fused optimizers know as ``found_inf``.
        num_taken: the number of steps before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.skips = torch.zeros((), dtype=torch.float32, device=device)  # as fused optimizers read it
        self.num_taken = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, holds: Tensor) -> None:
        self.skips.copy_(torch.maximum(self.skips, (~holds).to(self.skips.dtype)))
        self.num_taken.add_(1 - self.skips.long())

    def reset(self, skips: float = 0.0) -> None:
        self.skips.fill_(skips)
        self.num_taken.zero_()


class NotReadyError(Exception):
    """A part of the optimizer's state is missing, which a step outside of a capture has to make first."""


class CapturedStep:
    """Loss, gradients, check and optimizer as one operation of a device.

    Args:
        recorded: the graph of loss and gradients.
        parameters: its parameters.
        inputs: inputs of the kind that it takes.
        optim: the optimizer.
        outcome: where the device notes whether all held.

    Raises:
        NotReadyError: if the optimizer makes a part of its state in this step.
        NotRecordableError: for what a device cannot do by itself.
    """

    def __init__(
        self, recorded: Recorded, parameters: Sequence[Tensor], inputs: Sequence[Tensor], optim: Any, outcome: Outcome
    ) -> None:
        _check_optimizer(optim)
        self._optim, self._optimizer, self._outcome = optim, optim.optimizer, outcome
        self._parameters, self._has_gradient = list(parameters), recorded.has_gradient
        device = self._parameters[0].device
        self._written = recorded.written
        # What the graph writes to is the tensor itself, and so is a view of it. All else is copied to where the device
        # looks for it.
        changing = {memory_id(inputs[i]) for i in self._written}
        self._live = [i for i, value in enumerate(inputs) if memory_id(value) in changing]
        self._inputs = [
            value if i in self._live else torch.empty_like(value, device=device).copy_(value)
            for i, value in enumerate(inputs)
        ]
        self._constants = recorded.constants
        self._graph, constants = with_folded_constants(recorded.graph, recorded.constants, device)
        self._arguments = [*self._inputs, *self._parameters, *constants]
        elsewhere = first_off_device(self._graph, self._arguments, device)
        if elsewhere is not None:
            raise NotRecordableError(f"the result of {elsewhere} is not on the device of the parameters")
        self._rates: list[Tensor] = []
        self._settings = self._read_settings()
        state = random_state(device)
        of_optimizer = {parameter: dict(values) for parameter, values in self._optimizer.state.items()}
        numbers = [value for values in of_optimizer.values() for value in values.values() if _is_number(value)]
        counts = [number.clone() for number in numbers]  # of steps, which a trial that comes to no end leaves too large
        outcome.reset(skips=1.0)  # so that a trial changes nothing
        try:
            with _for_capture(self._optimizer, device) as self._rates:
                self._replay = CAPTURES[device.type](self._take, device)
            if self._settings != self._read_settings():
                raise NotReadyError
            set_random_state(device, state)
            self._replay()
            own = self._loss.clone()
            set_random_state(device, state)
            if not are_close(own, self._loss_without_capture()):
                raise NotRecordableError("the CUDA graph has another loss than its operations one by one")
        except Exception:
            self._optimizer.state.clear()
            self._optimizer.state.update(of_optimizer)
            for number, count in zip(numbers, counts, strict=True):
                number.copy_(count)
            raise
        finally:
            outcome.reset()
            set_random_state(device, state)
            for parameter in self._parameters:  # of a trial that did not come to its end
                parameter.grad = None

    def is_current(self, inputs: Sequence[Tensor], optim: Any) -> bool:
        """Whether everything is where the device looks for it, and the optimizer is the same."""
        same = optim is self._optim and all(inputs[i] is self._inputs[i] for i in self._live)
        return same and self._settings == self._read_settings()

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Take the step, without waiting for it, and return the loss."""
        for own, value in zip(self._inputs, inputs, strict=True):
            if own is not value:
                own.copy_(value, non_blocking=True)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            if isinstance(group["lr"], Tensor) and rate is not group["lr"]:
                rate.copy_(group["lr"], non_blocking=True)
            elif rate is not group["lr"]:
                rate.fill_(group["lr"])
        self._replay()
        self._optimizer._opt_called = True  # as schedulers of PyTorch want to know
        return self._loss.clone()

    @torch.no_grad()
    def _take(self) -> None:
        before = [self._inputs[i].clone() for i in self._written]
        self._loss, holds, *gradients = self._graph(*self._arguments)
        self._outcome.add(holds)
        for i, value in zip(self._written, before, strict=True):
            self._inputs[i].copy_(torch.where(self._outcome.skips > 0, value, self._inputs[i]))
        found = iter(gradients)
        for parameter, has_gradient in zip(self._parameters, self._has_gradient, strict=True):
            if has_gradient:
                parameter.grad = in_layout_of(parameter, next(found))
        self._optimizer.found_inf = self._outcome.skips
        try:
            self._optim(self._parameters)
        finally:
            del self._optimizer.found_inf

    @torch.no_grad()
    def _loss_without_capture(self) -> Tensor:
        with preserved([self._inputs[i] for i in self._written]):
            loss: Tensor = self._graph(*self._arguments)[0]
        return loss

    def _read_settings(self) -> tuple[Any, ...]:
        """What a capture takes as it is: places in memory, and the options of the optimizer but for learning rates."""
        tensors = [*self._parameters, *(self._inputs[i] for i in self._live)]
        places = [tensor.data_ptr() for tensor in tensors]
        for parameter in self._parameters:
            for value in self._optimizer.state.get(parameter, {}).values():
                places.append(value.data_ptr() if isinstance(value, Tensor) else value)
        options = [
            (name, id(value) if isinstance(value, Tensor) else tuple(value) if isinstance(value, list) else value)
            for group in self._optimizer.param_groups
            for name, value in group.items()
            if name != "params" and (name != "lr" or isinstance(value, Tensor))
        ]
        groups = [tuple(map(id, group["params"])) for group in self._optimizer.param_groups]
        versions = [(constant.data_ptr(), constant._version) for constant in self._constants]
        hooks = [tuple(hooks) for hooks in _hooks(self._optimizer)]
        clips = tuple(self._optim.pt_clip_args.items())
        return id(self._optim.optimizer), places, options, groups, versions, hooks, clips


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def random_state(device: torch.device) -> Tensor:
    """The random state of a device, which the host knows without asking the device."""
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Return to an earlier random state of a device."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


def may_capture(optim: Any) -> bool:
    """Whether an optimizer can skip an update on the device."""
    try:
        _check_optimizer(optim)
    except NotRecordableError:
        return False
    except NotReadyError:
        pass
    return True


def _check_optimizer(optim: Any) -> None:
    """Raise for an optimizer that cannot skip an update on the device."""
    if not isinstance(optim, JointOptim):
        raise NotRecordableError(f"the optimizer is a {type(optim).__name__} and not a JointOptim")
    if optim.optimizer is None:
        raise NotReadyError
    own = optim.optimizer
    fused = all(group.get("fused") for group in own.param_groups)
    if not fused or not getattr(own, "_step_supports_amp_scaling", False):
        raise NotRecordableError(f"{optim!r} is not fused, as with JointOptim(torch.optim.Adam, {{'fused': True}})")
    if any(_hooks(own)):
        raise NotRecordableError("the optimizer has a hook")


def _hooks(optimizer: Any) -> list[Any]:
    of_all = (optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks)
    return [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, *of_all]


@contextmanager
def _for_capture(optimizer: Any, device: torch.device) -> Iterator[list[Tensor]]:
    """A context in which an optimizer reads its learning rates from the device; yields the rates of its groups."""
    before = [dict(group) for group in optimizer.param_groups]
    warned = getattr(optimizer, "_warned_capturable_if_run_uncaptured", True)
    try:
        optimizer._warned_capturable_if_run_uncaptured = True  # a trial is no capture yet
        for group in optimizer.param_groups:
            rate = torch.as_tensor(group["lr"], dtype=torch.float32)  # as fused optimizers read it
            group["lr"] = rate.to(device)
            group["capturable"] = True
        yield [group["lr"] for group in optimizer.param_groups]
    finally:
        optimizer._warned_capturable_if_run_uncaptured = warned
        for group, options in zip(optimizer.param_groups, before, strict=True):
            group.clear()
            group.update(options)


def _cuda_graph(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What runs a function again, whose operations are one CUDA graph."""
    with torch.cuda.device(device):
        own, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(own)
        waits = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(side):
                function()
                # A capture that fails leaves a process without a generator, so what would make it fail is found before.
                torch.cuda.set_sync_debug_mode("error")
                function()
        except RuntimeError as error:
            raise NotRecordableError(f"an operation waits for the device: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(waits)
            own.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        spare = generator.clone_state()
        try:
            # On a stream of this device. Other threads, such as a DataLoader's, may go on with their work.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:
            torch.cuda.set_stream(own)
            generator.graphsafe_set_state(spare)
            raise NotRecordableError(f"it cannot be a CUDA graph: {error}") from error
    return graph.replay


# How operations become one, by the type of the device.
CAPTURES: dict[str, Callable[[Callable[[], None], torch.device], Callable[[], None]]] = {"cuda": _cuda_graph}
