"""SVI whose step is recorded once, as one graph of tensor operations, and then runs without Pyro's handlers."""

import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, TraceGraph_ELBO
from pyro.infer.util import zero_grads
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_ilvae import _checks
from pyro_ilvae.infer.annealing import AnnealMessenger, current_beta
from pyro_ilvae.infer.elbo import AnnealedELBO
from pyro_ilvae.infer.generators import set_states, states
from pyro_ilvae.infer.graph_runs import Graph, are_close, has_hooks, restore
from pyro_ilvae.infer.loss_module import unconstrained
from pyro_ilvae.infer.program_state import ProgramState
from pyro_ilvae.infer.recording import check_arguments, kind_of, other_draws_of_python, preserved, record
from pyro_ilvae.infer.value_reads import NotRecordableError

__all__ = ["GraphSVI"]

# Recordings in a row because of other settings, of which none ran a second time: something changes in each step.
_MANY_IN_VAIN = 4
# Recordings for each graph that is kept, after which the shapes of arguments come and go too often.
_MANY_SHAPES = 3
# Steps in a row in which a value that decided something was another one than while recording.
_MANY_FAILURES = 3


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

    Python code of a model that leaves no trace in tensors or attributes, such as ``print``, runs while recording and
    not later.

    Args:
        model: the model, any function with Pyro's primitives.
        guide: the guide.
        optim: a Pyro optimizer; :class:`JointOptim` takes the least time.
        loss: a Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO, or one of them as :class:`AnnealedELBO`. With another
            objective all steps are steps of ``SVI``, with a warning.
        compile: whether ``torch.compile`` fuses the graph, which takes up to a minute once for each structure of a
            model and shape of a batch. Otherwise it runs operation by operation.
        num_compared: in how many steps of each graph loss and gradients are compared with ``SVI``.
        num_graphs: the number of graphs that are kept.

    Raises:
        ValueError: for an objective in which a step has no meaning, and as ``SVI``.
        TypeError: for a model or guide that cannot be called.

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
    ) -> None:
        try:
            self.elbo = loss if isinstance(loss, AnnealedELBO) else AnnealedELBO(loss)
        except ValueError as error:
            raise ValueError(f"Expected loss to be an objective for graphs: {error}") from error
        super().__init__(_checks.function("model", model), _checks.function("guide", guide), optim, loss=self.elbo)
        self.compile = _checks.boolean("compile", compile)
        self.num_compared = _checks.positive_int("num_compared", num_compared, at_least=0)
        self.num_graphs = _checks.positive_int("num_graphs", num_graphs)
        self._runs = "SVI"
        self._reason: str | None = None
        self._num_steps = 0
        self._state: ProgramState | None = None
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._num_recordings = self._num_in_vain = self._num_forgotten = 0
        self._numbers: tuple[Any, ...] = ()
        self._settings: tuple[Any, ...] = ()
        objective = self.elbo.elbo
        if isinstance(objective, TraceGraph_ELBO) or not hasattr(objective, "differentiable_loss"):
            self._give_up(f"the objective {type(objective).__name__} has no differentiable loss")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.elbo!r}, {self.optim!r}) that runs as {self.runs}"

    @property
    def runs(self) -> str:
        """What the last step was: "SVI", "graph" or "compiled graph"."""
        return self._runs

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step of the optimizer.

        Args:
            *args: the arguments of model and guide.
            **kwargs: their named arguments.

        Returns:
            the negative objective, annealed if it has a beta, in nats: a tensor of shape ().

        Raises:
            NonFiniteLossError: for a loss or gradient that is not finite; the parameters keep their values.
        """
        self._num_steps += 1
        # Handlers around the step are not a part of the graph.
        if self._reason is not None or self._num_steps == 1 or _PYRO_STACK or not torch.is_grad_enabled():
            return self._step_of_svi(*args, **kwargs)
        try:
            graph, inputs = self._graph(args, kwargs)
        except _NewParametersError:
            return self._step_of_svi(*args, **kwargs)
        except NotRecordableError as error:
            self._give_up(str(error))
            return self._step_of_svi(*args, **kwargs)
        return self._step_of_graph(graph, inputs, args, kwargs)

    def _step_of_svi(self, *args: Any, **kwargs: Any) -> Tensor:
        self._runs = "SVI"
        return torch.tensor(super().step(*args, **kwargs))

    def _step_of_graph(self, graph: Graph, inputs: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        self.elbo._step_watch.count(*args, **kwargs)
        before = graph.state(inputs)
        loss, holds, gradients = self._results(graph, inputs)
        if not holds:
            # A value is not finite, which SVI reports, or a value that decided something is another one now.
            restore(before)
            graph.num_failures += 1
            if graph.num_failures >= _MANY_FAILURES:
                self._forget(graph)
                if self._num_forgotten > _MANY_IN_VAIN and self._num_steps < 10 * self._num_forgotten:
                    self._give_up("values that PyTorch or Pyro decide by are others in each step")
            return self._step_of_svi(*args, **kwargs)
        graph.num_failures = 0
        if graph.num_runs < self.num_compared:
            after = graph.state(inputs)
            restore(before)
            difference = self._difference(graph, loss, gradients, args, kwargs)
            if difference is not None:
                restore(before)
                self._give_up(difference)
                return self._step_of_svi(*args, **kwargs)
            restore(after)
        graph.num_runs += 1
        if graph.num_runs > 1:
            self._num_in_vain = 0
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

    def _inputs(self, leaves: list[Any], betas: dict[str, Tensor]) -> list[Tensor]:
        """The tensors that may differ between steps, without the parameters."""
        assert self._state is not None
        data = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return [*data, *betas.values(), *self._state.tensors()]

    def _betas(self) -> dict[str, Tensor]:
        named = self.elbo.beta if isinstance(self.elbo.beta, Mapping) else {"beta": self.elbo.beta}
        return {name: torch.as_tensor(current_beta(beta)) for name, beta in named.items()}

    def _graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, list[Tensor]]:
        """The graph for these arguments, recorded if there is none, and its inputs."""
        leaves, structure = _flattened(args, kwargs)
        check_arguments(leaves)
        if self._state is None:
            self._state = ProgramState(self.model, self.guide, self.elbo.elbo)
        betas = self._betas()
        inputs = self._inputs(leaves, betas)
        key = self._key(leaves, structure, inputs, betas)
        graph = self._graphs.get(key)
        if graph is None or not graph.is_current():
            changed = self._state.changed(self._settings)
            self._state = ProgramState(self.model, self.guide, self.elbo.elbo)  # a part may have come or gone
            inputs = self._inputs(leaves, betas)
            key = self._key(leaves, structure, inputs, betas)
            self._count_recording(changed, key[1], key[2])
            graph = self._graphs[key] = self._recorded(args, kwargs, inputs, betas)
            while len(self._graphs) > self.num_graphs:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return graph, inputs

    def _key(
        self, leaves: list[Any], structure: Any, inputs: list[Tensor], betas: dict[str, Tensor]
    ) -> tuple[Any, ...]:
        """What a graph takes as it is: where it differs, another graph is needed."""
        assert self._state is not None
        weights, ids = [float(beta) for beta in betas.values()], [id(value) for value in inputs]
        return (
            structure,
            tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor)),  # 1 equals True
            self._state.settings(),
            (id(self.model), id(self.guide)),
            tuple((kind_of(value), value.requires_grad) for value in inputs),
            tuple(map(ids.index, ids)),  # one tensor in two places is one input
            tuple(map(weights.index, weights)),  # sites that are summed out together need equal weights
            torch.get_default_dtype(),
            *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
            *(pyro.settings.get(f"validate_{part}") for part in ("distributions_torch", "infer", "poutine")),
        )

    def _count_recording(self, changed: list[str], numbers: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
        """Raise if graphs are recorded again and again."""
        self._num_recordings += 1
        self._num_in_vain = self._num_in_vain + 1 if (numbers, settings) != (self._numbers, self._settings) else 0
        self._numbers, self._settings = numbers, settings
        if self._num_in_vain > _MANY_IN_VAIN:
            names = ", ".join(changed[:3]) or "an argument that is no tensor"
            raise NotRecordableError(f"the model or guide reads what changes in each step: {names}")
        if self._num_recordings > _MANY_SHAPES * self.num_graphs and self._num_steps < 4 * self._num_recordings:
            raise NotRecordableError(f"the arguments have too many shapes for num_graphs={self.num_graphs}")

    def _forget(self, graph: Graph) -> None:
        self._num_forgotten += 1
        self._graphs = OrderedDict((key, other) for key, other in self._graphs.items() if other is not graph)

    def _recorded(self, args: Any, kwargs: Any, inputs: list[Tensor], betas: dict[str, Tensor]) -> Graph:
        """A graph of loss and gradients for arguments of this kind."""
        assert self._state is not None
        objective: Any = self.elbo.elbo
        state, settings, held = self._state, self._state.settings(), self._state.held()
        try:
            names = self._parameters(inputs, args, kwargs)

            def loss() -> Tensor:
                state.clear_caches()
                with AnnealMessenger(betas if isinstance(self.elbo.beta, Mapping) else betas["beta"]):
                    value: Tensor = objective.differentiable_loss(self.model, self.guide, *args, **kwargs)
                return value

            recorded = record(loss, inputs, list(names))
            with preserved(inputs), other_draws_of_python():
                if not recorded.computes_the_same_as(record(loss, inputs, list(names))):
                    raise NotRecordableError("the model or guide computes something else each time that it runs")
            changed = state.changed(settings)
        finally:
            replaced = state.put_back(held)
            state.clear_caches()
        if changed or replaced:
            what = ", ".join(changed[:3]) or "a tensor that an attribute holds"
            raise NotRecordableError(f"the model or guide changes {what} each time that it runs")
        return Graph(recorded, names, state, self.compile)

    def _parameters(self, inputs: list[Tensor], args: Any, kwargs: Any) -> dict[Tensor, str]:
        """The names of the parameters that a step moves, by a run of model and guide."""
        assert self._state is not None
        objective: Any = self.elbo.elbo
        store = pyro.get_param_store()
        known = dict(store._params)
        generators = [random, np.random, *self._state.generators]
        before = states(generators)
        with preserved([*inputs, *known.values()]), torch.no_grad(), poutine.trace(param_only=True) as capture:
            objective.loss(self.model, self.guide, *args, **kwargs)
            drawn = states(generators) != before
        if drawn:
            set_states(generators, before)
            raise NotRecordableError("the model or guide draws numbers from a generator other than PyTorch's")
        new = [name for name in store.keys() if name not in known]  # noqa: SIM118
        if new:  # with draws that belong to a step of SVI
            for name in new:
                del store[name]
            raise _NewParametersError
        names = {unconstrained(node["value"]): name for name, node in capture.trace.nodes.items()}
        if hooked := [name for parameter, name in names.items() if has_hooks(parameter)]:
            raise NotRecordableError(f"the parameter '{hooked[0]}' has a hook")
        return names

    def _difference(
        self, graph: Graph, loss: Tensor, gradients: list[Tensor | None], args: Any, kwargs: Any
    ) -> str | None:
        """How a graph step differs from one of ``SVI`` with the same draws, in words; None if it does not."""
        assert self._state is not None
        self._state.clear_caches()
        with torch.enable_grad():
            expected = self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)
            expected_gradients = torch.autograd.grad(expected, list(graph.parameters), allow_unused=True)
        self._state.clear_caches()
        if not are_close(loss, expected.detach()):
            return f"a graph of the model and guide has a loss of {float(loss):g}, where SVI has {expected.item():g}"
        for name, own, other in zip(graph.parameters.values(), gradients, expected_gradients, strict=True):
            if not are_close(own, other):
                return f"a graph of the model and guide has another gradient of '{name}' than SVI"
        return None

    def _give_up(self, reason: str) -> None:
        self._reason = reason
        self._graphs.clear()
        warnings.warn(f"GraphSVI takes all steps as SVI, because {reason}", stacklevel=4)


class _NewParametersError(Exception):
    """A step makes new parameters, which only a step of SVI does with the right draws."""


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The tensors and numbers in the arguments, and what says how they are nested."""
    if not kwargs and all(type(argument) is Tensor for argument in args):  # which is usual, and takes no time
        return list(args), len(args)
    return pytree.tree_flatten((args, kwargs))
