"""SVI whose step is recorded once, as one graph of tensor operations, and then runs without Pyro's handlers."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI, TraceGraph_ELBO
from pyro.infer.util import zero_grads
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_ilvae import _checks
from pyro_ilvae.infer.device_steps import DeviceSteps
from pyro_ilvae.infer.elbo import AnnealedELBO
from pyro_ilvae.infer.graph_cache import GraphCache, NewParametersError
from pyro_ilvae.infer.graph_runs import Graph, restore
from pyro_ilvae.infer.value_reads import NotRecordableError

__all__ = ["GraphSVI"]


class GraphSVI(SVI):
    r"""``pyro.infer.SVI`` whose step runs as one graph of tensor operations, without Pyro's handlers.

    The first step is a step of ``SVI``. The next one is recorded: loss, gradients, and a check that they are finite.
    Later steps run the graph, with the same draws from the random state, and so the same parameters up to rounding.
    Data, parameters, buffers, beta, and the constants and nats of decoders enter as tensors, so that they may change
    between steps. A batch of another shape, or a changed setting of a module, is recorded anew; the graphs are kept.

    What a graph cannot repeat is found while recording: decisions by values of tensors and shapes that depend on them,
    attributes that a model changes, draws from other generators, hooks of parameters. Then all steps are steps of
    ``SVI``, and a warning names the place. The first graph steps are compared with ``SVI``. Where PyTorch, Pyro or
    this package look at values, as in checks of arguments, the graph has the same check, and a step that does not pass
    it is a step of ``SVI``, which raises its error. A loss or gradient that is not finite raises
    :class:`NonFiniteLossError`.

    On a GPU the graph and the optimizer are one CUDA graph, if the optimizer is a :class:`JointOptim` whose optimizer
    is fused, and all operations are on the GPU. The host then looks at the outcome every ``check_every`` steps. The GPU
    changes no parameter in a step that does not pass its checks, and in later ones, until the host looks: then ``SVI``
    takes these steps, with the draws, beta, settings and options of the optimizer that they had, and with buffers as
    they are by then. If one of them raises an error, those after it are taken at the next call. Call
    :meth:`synchronize` after the last step. Data that a step was given must not be changed in place before the host has
    looked.

    Python code of a model that leaves no trace in tensors or attributes, such as ``print``, runs while recording and
    not later.

    Args:
        model: the model, any function with Pyro's primitives.
        guide: the guide.
        optim: a Pyro optimizer; :class:`JointOptim` takes the least time.
        loss: a Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO, or one of them as :class:`AnnealedELBO`. With another
            objective all steps are steps of ``SVI``, with a warning.
        compile: whether PyTorch's compiler fuses the graph, which takes up to half a minute once for each structure of
            a model and shape of a batch. Otherwise it runs operation by operation. A CUDA graph is not compiled, nor is
            a graph on a GPU whose optimizer would allow one.
        num_compared: in how many steps of each graph loss and gradients are compared with ``SVI``.
        num_graphs: the number of graphs that are kept.
        device: where tensors in the arguments of a step go before it; to a GPU, without waiting, by way of pinned
            memory. If None, they stay where they are.
        check_every: after how many steps of a CUDA graph the host looks at the outcome. Other steps are looked at one
            by one.

    Raises:
        ValueError: for an objective in which a step has no meaning, and as ``SVI``.
        TypeError: for a model or guide that cannot be called, and a device that is none.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_ilvae import JointOptim
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> optimizer = JointOptim(torch.optim.Adam, {"lr": 0.1})
        >>> svi = GraphSVI(model, AutoNormal(model), optimizer, Trace_ELBO(), compile=False)
        >>> losses = [svi.step(torch.tensor([2.0, 3.0, 4.0])) for _ in range(10)]
        >>> svi.runs, losses[-1].shape
        ('graph', torch.Size([]))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: ELBO,
        *,
        compile: bool = True,
        num_compared: int = 2,
        num_graphs: int = 8,
        device: torch.device | str | None = None,
        check_every: int = 10,
    ) -> None:
        try:
            self.elbo = loss if isinstance(loss, AnnealedELBO) else AnnealedELBO(loss)
        except ValueError as error:
            raise ValueError(f"Expected loss to be an objective for graphs: {error}") from error
        super().__init__(_checks.function("model", model), _checks.function("guide", guide), optim, loss=self.elbo)
        self.compile = _checks.boolean("compile", compile)
        self.num_compared = _checks.positive_int("num_compared", num_compared, at_least=0)
        self.num_graphs = _checks.positive_int("num_graphs", num_graphs)
        self.device = None if device is None else _checks.device("device", device)
        self.check_every = _checks.positive_int("check_every", check_every)
        self._device_steps = DeviceSteps()
        self._runs = "SVI"
        self._reason: str | None = None
        self._num_steps = 0
        self._cache = GraphCache(self)
        objective = self.elbo.elbo
        if isinstance(objective, TraceGraph_ELBO) or not hasattr(objective, "differentiable_loss"):
            self._give_up(f"the objective {type(objective).__name__} has no differentiable loss")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.elbo!r}, {self.optim!r}) that runs as {self.runs}"

    @property
    def runs(self) -> str:
        """What the last step was: "SVI", "graph", "compiled graph" or "CUDA graph"."""
        return self._runs

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step of the optimizer.

        Args:
            *args: the arguments of model and guide.
            **kwargs: their named arguments.

        Returns:
            the negative objective, annealed if it has a beta, in nats: a tensor of shape () where the parameters are.
            The loss of a step of a CUDA graph may be replaced until the host has looked at the step.

        Raises:
            NonFiniteLossError: for a loss or gradient that is not finite; the parameters keep their values. Where steps
                are CUDA graphs, an earlier step may be the one that it names.
        """
        self._num_steps += 1
        if self.device is not None:
            args, kwargs = pytree.tree_map_only(Tensor, partial(_moved, device=self.device), (args, kwargs))
        if self._device_steps.num_not_taken:  # an error came before them
            self.synchronize()
        found = self._found(args, kwargs)
        if found is not None and found[0].num_runs > self.num_compared and self._device_steps.can_take(*found, self):
            return self._step_of_device(*found, args, kwargs)
        self.synchronize()
        return self._step_of_svi(*args, **kwargs) if found is None else self._step_of_graph(*found, args, kwargs)

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, list[Tensor]] | None:
        """The graph for these arguments with its inputs; None for a step of SVI."""
        # Handlers around the step are not a part of the graph.
        if self._reason is not None or self._num_steps == 1 or _PYRO_STACK or not torch.is_grad_enabled():
            return None
        try:
            return self._cache.find(args, kwargs)
        except NewParametersError:
            return None
        except NotRecordableError as error:
            self._give_up(str(error))
            return None

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The negative objective at beta = 1, in nats, without gradients."""
        self.synchronize()
        return float(super().evaluate_loss(*args, **kwargs))

    def synchronize(self) -> None:
        """Wait for the steps on a GPU, and raise the error of a step that had one; elsewhere there is nothing to do.

        Call it after the last step, whose outcome would not be looked at otherwise.

        Raises:
            NonFiniteLossError: for a loss or gradient that is not finite.
        """
        for step in self._device_steps.look():
            if step.is_first:
                self._count_failure(step.graph)
            with self._device_steps.as_at(step, self):
                step.loss.copy_(self._step_of_svi(*step.args, **step.kwargs))

    def _step_of_device(self, graph: Graph, inputs: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        self.elbo._step_watch.count(*args, **kwargs)
        loss = self._device_steps.take(graph, inputs, args, kwargs, self)
        graph.num_runs += 1
        self._cache.num_in_vain = 0
        self._runs = "CUDA graph"
        if len(self._device_steps) >= self.check_every:
            self.synchronize()
        return loss

    def _step_of_svi(self, *args: Any, **kwargs: Any) -> Tensor:
        self._runs = "SVI"
        loss = super().step(*args, **kwargs)
        parameters = pyro.get_param_store()._params.values()
        return torch.tensor(loss, device=next((parameter.device for parameter in parameters), None))

    def _step_of_graph(self, graph: Graph, inputs: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        self.elbo._step_watch.count(*args, **kwargs)
        before = graph.state(inputs)
        loss, holds, gradients = self._results(graph, inputs)
        if not holds:
            # A value is not finite, which SVI reports, or a value that decided something is another one now.
            restore(before)
            self._count_failure(graph)
            return self._step_of_svi(*args, **kwargs)
        graph.num_failures = 0
        if graph.num_runs < self.num_compared:
            after = graph.state(inputs)
            restore(before)
            difference = self._cache.difference(graph, loss, gradients, args, kwargs)
            if difference is not None:
                restore(before)
                self._give_up(difference)
                return self._step_of_svi(*args, **kwargs)
            restore(after)
        graph.num_runs += 1
        if graph.num_runs > 1:
            self._cache.num_in_vain = 0
        for parameter, gradient in zip(graph.parameters, gradients, strict=True):
            # As in SVI, gradients are added to what is there, and some optimizers move parameters whose gradient is 0.
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self.optim(set(graph.parameters))
        zero_grads(graph.parameters)
        self._runs = graph.kind
        return loss

    def _results(self, graph: Graph, inputs: list[Tensor]) -> tuple[Tensor, Any, list[Tensor | None]]:
        """What a graph returns; where an operation raises an error, SVI may have a better one."""
        try:
            return graph(inputs)
        except Exception:
            return torch.tensor(torch.nan), False, []

    def _count_failure(self, graph: Graph) -> None:
        try:
            self._cache.count_failure(graph)
        except NotRecordableError as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        self._reason = reason
        self._cache.graphs.clear()
        warnings.warn(f"GraphSVI takes all steps as SVI, because {reason}", stacklevel=5)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host does not wait for the copy."""
    if value.device.type == device.type and device.index in (None, value.device.index):
        return value
    pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=True)
