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
    within_event,
)
from pyro_ilvae.io_pyro._integrated import IntegratedLikelihood
from pyro_ilvae.io_pyro._log_densities import LogDensities
from pyro_ilvae.io_pyro._notes import Notes, drawn_for_several, of_conditional, of_log_likelihood
from pyro_ilvae.io_pyro._unmixed import free_values, rows, unmixed

Arrays: TypeAlias = dict[str, np.ndarray]
Run: TypeAlias = Callable[[int, Values], list[Trace]]

LOG_LIKELIHOODS = ("integrated", "conditional")

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
        log_likelihood: how to compute the group of that name: one of ``LOG_LIKELIHOODS``, or None for no such group.
        num_importance_samples: the number of draws of local sites where the log likelihood is integrated over them.
        plate: the plate whose elements are the data where the log likelihood is integrated.
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
        log_likelihood: str | None,
        num_importance_samples: int,
        plate: str | None,
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
        held = {plate: as_numpy(indices).copy() for plate, indices in self.runs.indices.items()}
        # A plate whose subsample is given as the data themselves has no numbers for its elements.
        self.coords = {plate: own for plate, own in held.items() if own.ndim == 1 and own.dtype.kind in "iu"}
        self.integrated = IntegratedLikelihood(self.runs, num_importance_samples, plate)
        self.log_densities = LogDensities(self.runs, self.integrated)
        self.observed = {name: self._observed(name, nodes[name]) for name in self.data}

    def _observed(self, name: str, node: Any) -> np.ndarray:
        """The data of a site, with NaN in place of the entries of a datum that a mask leaves out."""
        found = self._array(name, node["value"], 1)[0].copy()
        mask = within_event(node["fn"])
        if mask is None or bool(mask.all()):
            return found
        there = self._array(name, mask.expand(torch.as_tensor(node["value"]).shape), 1)[0]
        return np.where(there, found, np.nan)

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
        sizes = runs.passes(num_samples, samples_per_pass, most)
        most = max(1, most) if samples_per_pass is None else samples_per_pass
        self._most = most if most > 1 and runs.vectorizes else 1
        return sizes

    def draw(self, start: int, size: int) -> Iterator[tuple[str, Arrays]]:
        """Yield the groups of draws from ``start`` on, their arrays of shape (size, *plates, *event)."""
        guide_trace, latents, trace = self._posterior(start, size, {})
        self._check_left_out(trace, [name for name in drawn(trace) if name not in latents])
        self._check_unmixed(self._replayed, [guide_trace, trace], size)
        yield "posterior", self._values(self.variables, trace, size)
        if self.posterior_predictive:
            released = self.runs.trace(Release()(Replay(latents)(self.model)), size)
            self._check_unmixed(self._prior_runs, [released], size)
            yield "posterior_predictive", self._values(self.data, released, size)
        integrated = {}
        if self.log_likelihood == "integrated" and self.integrated.units:
            shared = self.integrated.shared(guide_trace, latents, size)
            integrated = self.integrated(shared, start, size, self._most, self._check_unmixed)
            yield "log_likelihood", {name: as_numpy(value) for name, value in integrated.items()}
        if self.log_likelihood:
            names = [name for name in self.data if name not in self.not_conditional]
            yield "log_likelihood", {name: self._log_prob(name, trace.nodes[name], size) for name in names}
        if not self.given:
            yield "sample_stats", self._sample_stats(guide_trace, latents, trace, integrated, size)
        if self.prior:
            try:
                released = self.runs.trace(Release()(self.model), size)
            except NotImplementedError as error:
                raise ValueError(
                    f"Expected a model whose sites can be sampled, or prior=False, got: {error}"
                ) from error
            self._check_unmixed(self._prior_runs, [released], size)
            yield "prior", self._values(self.variables, released, size)
            yield "prior_predictive", self._values(self.data, released, size)

    def restart(self) -> None:
        """Forget what was drawn together, and draw one by one from now on."""
        self.runs.known_to_vectorize = False
        self.integrated.restart()

    @property
    def not_conditional(self) -> list[str]:
        """The names of the observed sites whose log likelihood given their own draws is not in the group."""
        if self.log_likelihood != "integrated":
            return []
        left_out = [] if self.given else self.integrated.of_left_out
        return [name for unit in self.integrated.units for name in unit.data] + left_out

    def notes(self, strict: bool) -> Notes:
        """Return what is to be said of the log likelihoods; if ``strict``, raise where one cannot be integrated."""
        trace, integrated = self.runs.model_trace, self.integrated
        if self.log_likelihood != "integrated":
            return of_conditional(trace, self.data)
        if strict and integrated.left_out:
            name, reason = next(iter(integrated.left_out.items()))
            raise ValueError(
                f"Expected log_likelihood='conditional' or False where the log likelihood of {name!r} cannot be "
                f"integrated over the latent sites of each datum, got 'integrated': {reason}"
            )
        conditional = [name for name in self.data if name not in self.not_conditional]
        for name in conditional if strict else ():
            sites, plates = drawn_for_several(trace, integrated, name)
            if sites:
                raise ValueError(
                    f"Expected plate to name the plate of what is to be left out, one of {plates}, where several "
                    f"elements of {name!r} share the draws of {sites}, got log_likelihood='integrated' without it"
                )
        return of_log_likelihood(trace, self.data, integrated, conditional, by_guide=not self.given)

    def _sample_stats(self, guide_trace: Trace, latents: Values, trace: Trace, integrated: Values, size: int) -> Arrays:
        factors = trace
        if self.runs.enumerated_sites:
            others = {name: value for name, value in latents.items() if name not in self.runs.enumerated_sites}
            factors = self.runs.factors(size, others)
            values = {name: rows(self.runs, name, value, size) for name, value in others.items()}
            self._check_unmixed(self._factor_runs, [factors], size, values)
        return self.log_densities(guide_trace, trace, factors, integrated, size)

    def _check_unmixed(
        self, run: Run, together: list[Trace], size: int, values: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        # A branch that few draws take shows in a pass of many, and seldom in the two draws that are compared first.
        values = {**free_values(self.runs, together, size), **(values or {})}
        if size > 1 and not unmixed(self.runs, run, together, values, size):
            raise MixedDrawsError

    def _posterior(self, start: int, size: int, one: Values) -> tuple[Trace, dict[str, torch.Tensor], Trace]:
        """The guide's trace, the latent values and the model's trace, of draws from ``start`` on or of ``one`` draw."""
        own = {name: value for name, value in one.items() if name not in self.data}
        guide_trace, latents = self.runs.draw(size, self._given(start, size) | own)
        if not latents.keys() >= set(self.runs.enumerated_sites):
            latents |= self.runs.draw_enumerated(size, latents)
        trace = self.runs.trace(Replay(latents)(self.model), size)
        self.runs.align_masks(guide_trace, trace)
        return guide_trace, latents, trace

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

    def _factor_runs(self, size: int, one: Values) -> list[Trace]:
        return [self.runs.factors(size, one)]

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
    """Return ``value`` if it is finite; log densities may also be infinite."""
    # A datum may be impossible under a draw.
    may_be_infinite = group in ("log_likelihood", "sample_stats")
    if np.isnan(value).any() or (not may_be_infinite and np.isinf(value).any()):
        raise ValueError(f"Expected finite draws at site {name!r} of {group}, got NaN or infinity")
    return value
