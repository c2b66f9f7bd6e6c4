"""The graphs of a model, a guide and an objective: found, recorded where there is none, and given up."""

import random
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_ilvae.infer.annealing import AnnealMessenger, current_beta
from pyro_ilvae.infer.captured_step import CAPTURES, may_capture
from pyro_ilvae.infer.generators import set_states, states
from pyro_ilvae.infer.graph_runs import Graph, are_close, has_hooks
from pyro_ilvae.infer.loss_module import unconstrained
from pyro_ilvae.infer.optim import PartialOptim
from pyro_ilvae.infer.program_state import ProgramState
from pyro_ilvae.infer.recording import check_arguments, kind_of, other_draws_of_python, preserved, record, shared_memory
from pyro_ilvae.infer.value_reads import NotRecordableError

__all__ = ["GraphCache", "NewParametersError"]

# Recordings in a row because of other settings, of which none ran a second time: something changes in each step.
_MANY_IN_VAIN = 4
# Recordings for each graph that is kept, after which the shapes of arguments come and go too often.
_MANY_SHAPES = 3
# Steps in a row in which a value that decided something was another one than while recording.
_MANY_FAILURES = 3


class GraphCache:
    """The graphs of one :class:`GraphSVI`.

    Args:
        svi: the SVI with model, guide, objective and settings.

    Attributes:
        graphs: the graphs that are kept, by what they take as it is.
        num_in_vain: the number of recordings in a row because of other settings, of which none ran again.
    """

    def __init__(self, svi: Any) -> None:
        self._svi = svi
        self._state: ProgramState | None = None
        self.graphs: OrderedDict[Any, Graph] = OrderedDict()
        self.num_in_vain = self._num_recordings = self._num_forgotten = 0
        self._numbers: tuple[Any, ...] = ()
        self._settings: tuple[Any, ...] = ()

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, list[Tensor]]:
        """The graph for these arguments, recorded if there is none, and its inputs.

        Raises:
            NewParametersError: if a step makes new parameters.
            NotRecordableError: for what a graph cannot repeat.
        """
        leaves, structure = _flattened(args, kwargs)
        check_arguments(leaves)
        if self._state is None:
            self._state = self._new_state()
        betas = self._betas()
        inputs = self._inputs(leaves, betas)
        key = self._key(leaves, structure, inputs, betas)
        graph = self.graphs.get(key)
        if graph is None or not graph.is_current():
            changed = self._state.changed(self._settings)
            self._state = self._new_state()  # a part may have come or gone
            inputs = self._inputs(leaves, betas)
            key = self._key(leaves, structure, inputs, betas)
            self._count_recording(changed, key[1], key[2])
            graph = self.graphs[key] = self._recorded(args, kwargs, inputs, betas)
            while len(self.graphs) > self._svi.num_graphs:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return graph, inputs

    def count_failure(self, graph: Graph) -> None:
        """Forget a graph whose assumptions do not hold any more, and raise if that goes on."""
        graph.num_failures += 1
        if graph.num_failures >= _MANY_FAILURES:
            self._num_forgotten += 1
            self.graphs = OrderedDict((key, other) for key, other in self.graphs.items() if other is not graph)
            if self._num_forgotten > _MANY_IN_VAIN and self._svi._num_steps < 10 * self._num_forgotten:
                raise NotRecordableError("values that PyTorch or Pyro decide by are others in each step")

    def _new_state(self) -> ProgramState:
        return ProgramState(self._svi.model, self._svi.guide, self._svi.elbo.elbo)

    def _inputs(self, leaves: list[Any], betas: dict[str, Tensor]) -> list[Tensor]:
        """The tensors that may differ between steps, without the parameters."""
        assert self._state is not None
        data = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return [*data, *betas.values(), *self._state.tensors()]

    def _betas(self) -> dict[str, Tensor]:
        named = self._svi.elbo.beta if isinstance(self._svi.elbo.beta, Mapping) else {"beta": self._svi.elbo.beta}
        return {name: _as_tensor(current_beta(beta)) for name, beta in named.items()}

    def _key(
        self, leaves: list[Any], structure: Any, inputs: list[Tensor], betas: dict[str, Tensor]
    ) -> tuple[Any, ...]:
        """What a graph takes as it is: where it differs, another graph is needed."""
        assert self._state is not None
        # Reading a beta that is on a GPU takes time.
        weights = [float(beta) for beta in betas.values()] if len(betas) > 1 else []
        ids = [id(value) for value in inputs]
        return (
            structure,
            tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor)),  # 1 equals True
            self._state.settings(),
            (id(self._svi.model), id(self._svi.guide)),
            tuple((kind_of(value), value.requires_grad) for value in inputs),
            tuple(map(ids.index, ids)),  # one tensor in two places is one input
            shared_memory(self._state.tensors()),
            tuple(map(weights.index, weights)),  # sites that are summed out together need equal weights
            torch.get_default_dtype(),
            *(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")),
            *(pyro.settings.get(f"validate_{part}") for part in ("distributions_torch", "infer", "poutine")),
        )

    def _count_recording(self, changed: list[str], numbers: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
        """Raise if graphs are recorded again and again."""
        self._num_recordings += 1
        self.num_in_vain = self.num_in_vain + 1 if (numbers, settings) != (self._numbers, self._settings) else 0
        self._numbers, self._settings = numbers, settings
        if self.num_in_vain > _MANY_IN_VAIN:
            names = ", ".join(changed[:3]) or "an argument that is no tensor"
            raise NotRecordableError(f"the model or guide reads what changes in each step: {names}")
        if (
            self._num_recordings > _MANY_SHAPES * self._svi.num_graphs
            and self._svi._num_steps < 4 * self._num_recordings
        ):
            raise NotRecordableError(f"the arguments have too many shapes for num_graphs={self._svi.num_graphs}")

    def _recorded(self, args: Any, kwargs: Any, inputs: list[Tensor], betas: dict[str, Tensor]) -> Graph:
        """A graph of loss and gradients for arguments of this kind."""
        assert self._state is not None
        objective: Any = self._svi.elbo.elbo
        state, settings, held = self._state, self._state.settings(), self._state.held()
        try:
            names = self._parameters(inputs, args, kwargs)

            def loss() -> Tensor:
                state.clear_caches()
                with AnnealMessenger(betas if isinstance(self._svi.elbo.beta, Mapping) else betas["beta"]):
                    value: Tensor = objective.differentiable_loss(self._svi.model, self._svi.guide, *args, **kwargs)
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
        # A CUDA graph is not compiled, also one of later steps.
        optim: Any = self._svi.optim
        optim = optim.whole if isinstance(optim, PartialOptim) else optim
        on_device = all(parameter.device.type in CAPTURES for parameter in names) and may_capture(optim)
        return Graph(recorded, names, state, self._svi.compile and not on_device)

    def _parameters(self, inputs: list[Tensor], args: Any, kwargs: Any) -> dict[Tensor, str]:
        """The names of the parameters that a step moves, by a run of model and guide."""
        assert self._state is not None
        objective: Any = self._svi.elbo.elbo
        store = pyro.get_param_store()
        known = dict(store._params)
        generators = [random, np.random, *self._state.generators]
        before = states(generators)
        with preserved([*inputs, *known.values()]), torch.no_grad(), poutine.trace(param_only=True) as capture:
            objective.loss(self._svi.model, self._svi.guide, *args, **kwargs)
            drawn = states(generators) != before
        if drawn:
            set_states(generators, before)
            raise NotRecordableError("the model or guide draws numbers from a generator other than PyTorch's")
        new = [name for name in store.keys() if name not in known]  # noqa: SIM118
        if new:  # with draws that belong to a step of SVI
            for name in new:
                del store[name]
            raise NewParametersError
        names = {unconstrained(node["value"]): name for name, node in capture.trace.nodes.items()}
        if hooked := [name for parameter, name in names.items() if has_hooks(parameter)]:
            raise NotRecordableError(f"the parameter '{hooked[0]}' has a hook")
        return names

    def difference(
        self, graph: Graph, loss: Tensor, gradients: list[Tensor | None], args: Any, kwargs: Any
    ) -> str | None:
        """How a graph step differs from one of ``SVI`` with the same draws, in words; None if it does not."""
        assert self._state is not None
        self._state.clear_caches()
        with torch.enable_grad():
            expected = self._svi.elbo.differentiable_loss(self._svi.model, self._svi.guide, *args, **kwargs)
            expected_gradients = torch.autograd.grad(expected, list(graph.parameters), allow_unused=True)
        self._state.clear_caches()
        if not are_close(loss, expected.detach()):
            return f"a graph of the model and guide has a loss of {float(loss):g}, where SVI has {expected.item():g}"
        among = sum(float(other.double().norm()) ** 2 for other in expected_gradients if other is not None) ** 0.5
        for name, own, other in zip(graph.parameters.values(), gradients, expected_gradients, strict=True):
            if not are_close(own, other, among):
                return f"a graph of the model and guide has another gradient of '{name}' than SVI"
        return None


class NewParametersError(Exception):
    """A step makes new parameters, which only a step of SVI does with the right draws."""


def _as_tensor(beta: Any) -> Tensor:
    """A beta as a tensor: on the host, whatever the default device is, if it is a number."""
    return beta if isinstance(beta, Tensor) else torch.tensor(beta, device="cpu")


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The tensors and numbers in the arguments, and what says how they are nested."""
    if not kwargs and all(type(argument) is Tensor for argument in args):  # which is usual, and takes no time
        return list(args), len(args)
    return pytree.tree_flatten((args, kwargs))
