"""Draws of all groups from a model, given posterior draws of the sites that inference did not sum out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, TypeAlias

import numpy as np
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger

from pyro_ilvae._programs import (
    MOST_PAIRS,
    Arguments,
    Program,
    Release,
    Replay,
    Runs,
    SiteShape,
    Values,
    drawn,
    is_data,
    is_variable,
    sample_sites,
    site_log_prob,
    site_numbers,
    site_shape,
)

Arrays: TypeAlias = dict[str, np.ndarray]

_MOST_NUMBERS = 5_000_000  # in the largest tensor of a site at a time


class MixedDrawsError(Exception):
    """Draws that were made together are not what they are alone, as where a model branches on all values at once."""


class Sampler:
    """Draws of the groups of ArviZ from a model, several at a time.

    Args:
        model: the model.
        guide: what draws latent sites; those that it leaves out and that are marked for enumeration are drawn given
            the others and the data.
        arguments: what both are called with.
        given: posterior draws of further latent sites by name, each shaped (draws, *shape as the model is written).
        source: who draws the latent sites, in words.
        prior: whether to draw the groups of the prior.
        posterior_predictive: whether to draw the group of that name.
        log_likelihood: whether to compute the group of that name.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        arguments: Arguments,
        *,
        given: Values,
        source: str,
        prior: bool,
        posterior_predictive: bool,
        log_likelihood: bool,
    ) -> None:
        self.model, self.guide, self.given, self.source = model, FiniteDraws()(guide), given, source
        self.prior, self.posterior_predictive, self.log_likelihood = prior, posterior_predictive, log_likelihood
        for name, values in given.items():
            finite(as_numpy(values), name, "posterior")
        one = {name: values[0] for name, values in given.items()}
        self.runs = Runs(model, self.guide, arguments, one)
        self.runs.compared = [self._posterior_runs, *([self._prior_runs] if prior else [])]
        trace = self.runs.model_trace
        self._check_left_out(trace, self.runs.enumerated_sites)
        self._check_given(trace, one)
        nodes: dict[str, Any] = {name: node for name, node in trace.nodes.items() if is_variable(node)}
        self.shapes = {name: site_shape(node) for name, node in nodes.items()}
        self.data = [name for name, node in nodes.items() if is_data(node)]
        self.variables = [name for name in nodes if name not in self.data]
        self.coords = {plate: as_numpy(indices).copy() for plate, indices in self.runs.indices.items()}
        self.observed = {name: self._array(name, nodes[name]["value"], 1)[0].copy() for name in self.data}

    def dims(self, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return the names of the dimensions of every site, after chain and draw."""
        result = {}
        for name, site in self.shapes.items():
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

    def passes(self, num_samples: int, samples_per_pass: int | None) -> list[int]:
        """Return how many draws to make in each pass, in bounded memory; one by one if the model needs that."""
        runs = self.runs
        tensors = [torch.Size(shape.batch) for shape in self.shapes.values()]
        if runs.enumerated_sites:
            _, values = runs.draw(1, self._given(0, 1))
            tensors += [site_log_prob(site).shape for site in sample_sites(runs.factors(1, values))]
        pairs = max((shape.numel() for shape in tensors), default=1)
        numbers = max((site_numbers(site) for site in sample_sites(runs.model_trace)), default=1)
        most = min(MOST_PAIRS // max(1, pairs), _MOST_NUMBERS // max(1, numbers))
        return runs.passes(num_samples, samples_per_pass, most)

    def draw(self, start: int, size: int) -> Iterator[tuple[str, Arrays]]:
        """Yield the groups of draws from ``start`` on, their arrays of shape (size, *plates, *event)."""
        guide_trace, latents, trace = self._posterior(start, size, {})
        self._check_left_out(trace, [name for name in drawn(trace) if name not in latents])
        self._check_alone(self._replayed, [guide_trace, trace], size)
        yield "posterior", self._values(self.variables, trace, size)
        if self.posterior_predictive:
            released = self.runs.trace(Release()(Replay(latents)(self.model)), size)
            self._check_alone(self._prior_runs, [released], size)
            yield "posterior_predictive", self._values(self.data, released, size)
        if self.log_likelihood:
            yield "log_likelihood", {name: self._log_prob(name, trace.nodes[name], size) for name in self.data}
        if self.prior:
            try:
                released = self.runs.trace(Release()(self.model), size)
            except NotImplementedError as error:
                raise ValueError(
                    f"Expected a model whose sites can be sampled, or prior=False, got: {error}"
                ) from error
            self._check_alone(self._prior_runs, [released], size)
            yield "prior", self._values(self.variables, released, size)
            yield "prior_predictive", self._values(self.data, released, size)

    def _check_alone(self, run: Callable[[int, Values], list[Trace]], together: list[Trace], size: int) -> None:
        # A branch that few draws take shows in a pass of many, and seldom in the two draws that are compared first.
        if size > 1 and not self.runs.same_alone(run, together, size):
            raise MixedDrawsError

    def _posterior(self, start: int, size: int, one: Values) -> tuple[Trace, dict[str, torch.Tensor], Trace]:
        """The guide's trace, the latent values and the model's trace, of draws from ``start`` on or of ``one`` draw."""
        own = {name: value for name, value in one.items() if name not in self.data}
        guide_trace, latents = self.runs.draw(size, self._given(start, size) | own)
        if not latents.keys() >= set(self.runs.enumerated_sites):
            latents |= self.runs.draw_enumerated(size, latents)
        return guide_trace, latents, self.runs.trace(Replay(latents)(self.model), size)

    def _replayed(self, size: int, one: Values) -> list[Trace]:
        """Runs of guide and model, of the first draws or of the one draw whose values are given."""
        guide_trace, _, trace = self._posterior(0, size, one)
        return [guide_trace, trace]

    def _posterior_runs(self, size: int, one: Values) -> list[Trace]:
        """Runs as in :meth:`draw`, with the enumerated densities where sites are left out."""
        guide_trace, latents, trace = self._posterior(0, size, one)
        traces = [guide_trace, trace]
        if self.runs.enumerated_sites:
            others = {name: value for name, value in latents.items() if name not in self.runs.enumerated_sites}
            traces.append(self.runs.factors(size, others))
        if self.posterior_predictive:
            traces.append(self.runs.trace(Replay(one)(Release()(Replay(latents)(self.model))), size))
        return traces

    def _prior_runs(self, size: int, one: Values) -> list[Trace]:
        return [self.runs.trace(Replay(one)(Release()(self.model)), size)]

    def _given(self, start: int, size: int) -> dict[str, torch.Tensor]:
        return {
            name: self.runs.side_by_side(values[start : start + size], self.shapes[name])
            for name, values in self.given.items()
            if name in self.shapes
        }

    def _check_left_out(self, trace: Trace, names: Sequence[str]) -> None:
        nodes: dict[str, Any] = {name: trace.nodes[name] for name in names}
        for name, node in nodes.items():
            if node["infer"].get("enumerate") != "parallel":
                discrete = getattr(node["fn"], "has_enumerate_support", False)
                hint = " that is not marked infer={'enumerate': 'parallel'}" if discrete else ""
                raise ValueError(
                    f"Expected {self.source} to sample every latent site of the model{hint}, got none named {name!r}"
                )

    def _check_given(self, trace: Trace, given: Values) -> None:
        nodes: dict[str, Any] = {name: node for name, node in trace.nodes.items() if name in given}
        for name, node in nodes.items() if self.runs.enumerated_sites else ():
            # HMC starts from a run of the model with enumeration, in which a site that depends on an enumerated site
            # has a value for each value of the enumerated site. Such chains are not of the model.
            expected, shape = node["fn"].shape(), given[name].shape
            if shape.numel() > expected.numel():
                raise ValueError(
                    f"Expected draws of shape {tuple(expected)} of site {name!r}, got {tuple(shape)}: one for each "
                    f"value of the enumerated sites {self.runs.enumerated_sites}; initial_params of shape "
                    f"{tuple(expected)} avoid that"
                )

    def _values(self, names: list[str], trace: Trace, size: int) -> Arrays:
        return {name: self._array(name, trace.nodes[name]["value"], size) for name in names}

    def _log_prob(self, name: str, node: Any, size: int) -> np.ndarray:
        return self._array(name, site_log_prob(node), size, self.shapes[name]._replace(event=()))

    def _array(self, name: str, value: Any, size: int, shape: SiteShape | None = None) -> np.ndarray:
        shape = shape or self.shapes[name]
        value = torch.as_tensor(value)
        try:
            value = self.runs.spread(value, shape, size)
        except RuntimeError:
            raise ValueError(
                f"Expected values of shape {(*shape.batch, *shape.event)} at site {name!r} in each of {size} draws, as "
                f"in the first run, got shape {tuple(value.shape)}"
            ) from None
        return as_numpy(value.reshape(size, *(length for _, length in shape.kept), *shape.event))


class FiniteDraws(Messenger):
    """Raises for a draw of a guide that is not finite, before the model runs, whose own error would name no site."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_variable(msg) and not msg["is_observed"] and not msg["infer"].get("is_auxiliary"):
            finite(as_numpy(msg["value"]), msg["name"], "posterior")


def as_numpy(value: Any) -> np.ndarray:
    """Return a tensor, or what becomes one, as an array."""
    return torch.as_tensor(value).detach().cpu().numpy()


def finite(value: np.ndarray, name: str, group: str) -> np.ndarray:
    """Return ``value`` if it is finite; in the group ``log_likelihood`` it may also be -inf."""
    # The datum is then impossible under that draw.
    if np.isnan(value).any() or (group != "log_likelihood" and np.isinf(value).any()):
        raise ValueError(f"Expected finite draws at site {name!r} of {group}, got NaN or infinity")
    return value
