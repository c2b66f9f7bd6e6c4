"""Draws of all groups from a model, given posterior draws of the sites that inference did not sum out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any, TypeAlias

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import transform_to

from pyro_ilvae.io_pyro._sites import (
    HoldSubsamples,
    Release,
    Replay,
    Site,
    as_numpy,
    dimensions,
    finite,
    is_data,
    is_variable,
    nesting,
)

Function: TypeAlias = Callable[..., Any]
Values: TypeAlias = dict[str, Any]
Arrays: TypeAlias = dict[str, np.ndarray]
Latents: TypeAlias = Callable[["Sampler", int, int], Values]


class Sampler:
    """Draws from a model, several at a time in an outermost plate.

    ``latents(sampler, start, size)`` returns the posterior draws from ``start`` on of the latent sites; sites that
    it leaves out and that are marked for enumeration are drawn given the others and the data. ``source`` says in
    words who draws them.
    """

    def __init__(
        self,
        model: Function,
        latents: Latents,
        source: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.model, self.latents, self.source, self.args, self.kwargs = model, latents, source, args, kwargs
        self.hold = HoldSubsamples()
        self.nesting = 0  # of the plates in the runs of one draw, two of which follow
        self.enumerated: list[str] = []
        # The model before the guide, whose plates have to take the indices that the model gives its own.
        plain = self.trace(InitMessenger(_any_value)(model), 1)
        given = self._given(0, 1)
        left_out = self._left_out(self.trace(Replay(given)(model), 1), given)
        self.enumerated = [name for name, node in left_out.items() if node["infer"].get("enumerate") == "parallel"]
        for name in given.keys() & plain.nodes.keys() if self.enumerated else ():
            # HMC starts from a run of the model with enumeration, in which a site that depends on an enumerated one
            # has a value for each of its values. Such chains are not of the model.
            expected, shape = (torch.as_tensor(value).shape for value in (plain.nodes[name]["value"], given[name]))
            if shape.numel() > expected.numel():
                raise ValueError(
                    f"Expected draws of shape {tuple(expected)} of site {name!r}, got {tuple(shape)}: one for each "
                    f"value of the enumerated sites {self.enumerated}; initial_params of the first shape avoid that"
                )
        trace = self._posterior(0, 1)[1]
        nodes: dict[str, Any] = {name: node for name, node in trace.nodes.items() if is_variable(node)}
        self.sites = {name: dimensions(node) for name, node in nodes.items()}
        self.data = [name for name, node in nodes.items() if is_data(node)]
        self.variables = [name for name in nodes if name not in self.data]
        self.coords = {plate: as_numpy(indices).copy() for plate, indices in self.hold.indices.items()}
        self.observed = {name: self._array(name, nodes[name]["value"], 1)[0].copy() for name in self.data}

    def dims(self, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The names of the dimensions of every site, after chain and draw."""
        result = {}
        for name, site in self.sites.items():
            plates = [plate for plate, _ in site.kept] + [None] * len(site.event)
            own = given.get(name, ())
            if isinstance(own, str) or len(own) not in (0, len(site.event), len(plates)):
                raise ValueError(
                    f"Expected dims of site {name!r} to be {len(site.event)} names for its event or "
                    f"{len(plates)} for all its dimensions, got {own!r}"
                )
            unnamed = count()
            names = [plate or f"{name}_dim_{next(unnamed)}" for plate in plates]
            result[name] = names[: len(names) - len(own)] + list(own)
            if not {"chain", "draw"}.isdisjoint(result[name]):
                raise ValueError(f"Expected dims other than chain and draw, got {result[name]} for {name!r}")
        return result

    def draw(
        self, start: int, size: int, prior: bool, posterior_predictive: bool, log_likelihood: bool
    ) -> Iterator[tuple[str, Arrays]]:
        """Yield the groups, their arrays of shape (size, *plates, *event)."""
        for name, site in self.sites.items():
            if size > 1 and any(plate is None for plate, _ in site.kept):
                raise ValueError(
                    f"Expected every batch dimension of site {name!r} to be in a plate, or batch_size=1, "
                    f"got batch shape {site.batch} in plates {site.plates}"
                )
        latents, trace = self._posterior(start, size)
        yield "posterior", self._values(self.variables, trace, size)
        if posterior_predictive:
            released = self.trace(Release()(Replay(latents)(self.model)), size)
            yield "posterior_predictive", self._values(self.data, released, size)
        if log_likelihood:
            trace.compute_log_prob(lambda name, node: name in self.data)
            yield "log_likelihood", {name: self._log_prob(name, trace.nodes[name], size) for name in self.data}
        if prior:
            try:
                released = self.trace(Release()(self.model), size)
            except NotImplementedError as error:
                raise ValueError(
                    f"Expected a model whose sites can be sampled, or prior=False, got: {error}"
                ) from error
            yield "prior", self._values(self.variables, released, size)
            yield "prior_predictive", self._values(self.data, released, size)

    def trace(self, fn: Function, size: int) -> poutine.Trace:
        """A run of the model or its guide, of ``size`` draws at once."""
        trace = poutine.trace(self._together(fn, size)).get_trace(*self.args, **self.kwargs)
        if size == 1:
            self.nesting = max(self.nesting, nesting(trace.nodes.values()))
        return trace

    def stack(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values of shape (size, *shape as the model is written) in the shape that a run of so many draws takes."""
        if len(values) == 1:
            return values[0]
        lead = values.dim() - 1 - len(self.sites[name].event)
        return values.reshape(len(values), *(1,) * (self.nesting - lead), *values.shape[1:])

    def _together(self, fn: Function, size: int) -> Function:
        def run(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if size == 1 else pyro.plate("_draws", size, dim=-self.nesting - 1), self.hold:
                return fn(*args, **kwargs)

        return run

    def _given(self, start: int, size: int) -> Values:
        latents = self.latents(self, start, size)
        for name, value in latents.items():
            # Before the model runs: it may stop at such a value with an error that does not name the site.
            finite(as_numpy(value), name, "posterior")
        return latents

    def _posterior(self, start: int, size: int) -> tuple[Values, poutine.Trace]:
        latents = self._given(start, size)
        if self.enumerated:
            # Conditioned rather than replayed: the enumeration has to see the sites that depend on enumerated ones.
            run = self._together(poutine.condition(self.model, data=latents), size)
            sampled = infer_discrete(run, first_available_dim=-1 - self.nesting - (size > 1))
            nodes = poutine.trace(sampled).get_trace(*self.args, **self.kwargs).nodes
            latents = latents | {name: nodes[name]["value"] for name in self.enumerated}
        trace = self.trace(Replay(latents)(self.model), size)
        for name, node in self._left_out(trace, latents).items():
            discrete = getattr(node["fn"], "has_enumerate_support", False)
            hint = " that is not marked infer={'enumerate': 'parallel'}" if discrete else ""
            raise ValueError(
                f"Expected {self.source} to sample every latent site of the model{hint}, got none named {name!r}"
            )
        return latents, trace

    def _left_out(self, trace: poutine.Trace, latents: Values) -> Values:
        nodes = trace.iter_stochastic_nodes()
        return {name: node for name, node in nodes if name not in latents and not site_is_subsample(node)}

    def _values(self, names: list[str], trace: poutine.Trace, size: int) -> Arrays:
        return {name: self._array(name, trace.nodes[name]["value"], size) for name in names}

    def _log_prob(self, name: str, node: Any, size: int) -> np.ndarray:
        mask = True if node["mask"] is None else node["mask"]
        log_prob = node["unscaled_log_prob"]
        log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)
        return self._array(name, log_prob, size, self.sites[name]._replace(event=()))

    def _array(self, name: str, value: Any, size: int, site: Site | None = None) -> np.ndarray:
        site = site or self.sites[name]
        value = torch.as_tensor(value)
        padding = (1,) * (self.nesting - len(site.batch))
        shape = (size, *padding, *site.batch, *site.event)
        try:
            value = value.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"Expected values of shape {shape} for {size} draws at once of site {name!r}, got "
                f"{tuple(value.shape)}; batch_size=1 runs the model as it is written"
            ) from None
        return as_numpy(value.reshape(size, *(length for _, length in site.kept), *site.event))


def _any_value(msg: Any) -> torch.Tensor:
    fn = msg["fn"]
    try:
        return fn.sample()
    except NotImplementedError:  # an improper prior
        to_support = transform_to(fn.support)
        return to_support(torch.zeros(to_support.inverse_shape(fn.shape())))
