"""The log likelihood of each datum, integrated over its own latent sites by importance sampling from the guide."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import Replay, Runs, Values, sample_sites
from pyro_ilvae._programs.sites import is_delta
from pyro_ilvae.diagnostics._engine.importance import smoothed_weights
from pyro_ilvae.io_pyro._densities import log_density, masked_out, with_density
from pyro_ilvae.io_pyro._units import Unit, local_units
from pyro_ilvae.io_pyro._unmixed import for_a_run, rows

Check = Callable[[Callable[[int, Values], list[Trace]], list[Trace], int, Mapping[str, Tensor]], None]

_SPREAD = 1e-9  # relative, of a log likelihood that is the same in all draws; see with_spread
_RANGE_OF_K = -0.5, 1.5  # from as good as exact to as bad as can be


class IntegratedLikelihood:
    """log p(x_n | draws of the sites that all data share), for the data of every unit of a model.

    Args:
        runs: the model and its guide.
        num_samples: the number of draws of the local sites for each draw of the shared sites.
        plate: the plate whose elements are the data; see :func:`local_units`.

    Attributes:
        units: the units that are integrated.
        left_out: why other units cannot be integrated, by the unit's name.
        of_left_out: the names of the observed sites in these units.
        diagnostics: by unit, the smallest effective sample size over the draws, and the weights of that draw.
    """

    def __init__(self, runs: Runs, num_samples: int, plate: str | None) -> None:
        self.runs = runs
        self.units, shared = local_units(runs.model_trace, plate)
        self.left_out = {unit.name: "some of their sites are local to other plates as well" for unit in shared}
        self.of_left_out = [name for unit in shared for name in unit.data]
        self._samples: dict[str, list[str]] = {}
        for unit in list(self.units):
            self._samples[unit.name] = [name for name in unit.latents if name not in runs.enumerated_sites]
            if reason := self._obstacle(unit):
                self.units.remove(unit)
                self.left_out[unit.name] = reason
                self.of_left_out += unit.data
        self.num_samples = num_samples if any(self._samples[unit.name] for unit in self.units) else 1
        self._enumerates = any(name in runs.enumerated_sites for unit in self.units for name in unit.latents)
        self._masked = {
            unit.name: masked_out(runs, self._sites(unit, runs.model_trace), unit.sizes) for unit in self.units
        }
        self._seed = int(torch.randint(2**31, ()))
        self.restart()

    def restart(self) -> None:
        """Forget what was computed."""
        self._reference: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self._worst: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def sampled(self) -> list[Unit]:
        """The units with sites that are sampled, rather than summed out."""
        return [unit for unit in self.units if self._samples[unit.name]]

    def local(self, site: Any) -> bool:
        """Whether a site is integrated out."""
        return any(unit.holds(site) for unit in self.units)

    def shared(self, guide_trace: Trace, latents: Values, size: int) -> dict[str, Tensor]:
        """Return the values of sites outside the units, each of shape (draws, *nesting, *event)."""
        nodes = {**self.runs.model_trace.nodes, **self.runs.guide_trace.nodes}
        own = {site["name"]: site["value"] for site in sample_sites(guide_trace) if not site["is_observed"]}
        return {
            name: rows(self.runs, name, value, size)
            for name, value in {**own, **latents}.items()
            if not self.local(nodes[name])
        }

    def __call__(self, shared: dict[str, Tensor], start: int, size: int, most: int, check: Check) -> dict[str, Tensor]:
        """Return log p(x_n | shared) in nats by unit, for draws from ``start`` on, each of shape (size, *plates).

        Runs have at most ``most`` draws, and ``check`` raises if they mix them.
        """
        of_model = {name: value for name, value in shared.items() if name in self.runs.model_trace.nodes}
        if all(bool((value == value[:1]).all()) for value in of_model.values()):
            first = {name: value[:1] for name, value in of_model.items()}
            if self._reference is None or any(not torch.equal(first[name], self._reference[0][name]) for name in first):
                with seeded(self._seed):
                    parts = self._block({name: value[:1] for name, value in shared.items()}, 1, most, check)
                self._reference = first, parts
            return {name: value.expand(size, *value.shape[1:]) for name, value in self._reference[1].items()}
        step = max(1, most // self.num_samples)
        with seeded(self._seed + start):
            blocks = [
                self._block(
                    {name: value[i : i + step] for name, value in shared.items()}, min(step, size - i), most, check
                )
                for i in range(0, size, step)
            ]
        return {unit.name: torch.cat([block[unit.name] for block in blocks]) for unit in self.units}

    def diagnostics(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Return dimensions and values of the effective sample sizes and of Pareto k, over the data of each unit."""
        result: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for unit in self.sampled:
            dims, (sizes, log_weights) = tuple(unit.sizes), self._worst[unit.name]
            # Weights that are all 0 have no tail.
            log_weights = torch.where(sizes > 0, log_weights, 0.0).reshape(len(log_weights), -1)
            pareto_k = smoothed_weights(log_weights).pareto_k.reshape(sizes.shape)
            result[f"{unit.name}_effective_sample_size"] = dims, sizes.cpu().numpy()
            result[f"{unit.name}_pareto_k"] = dims, pareto_k.cpu().numpy()
        return result

    def _block(self, shared: dict[str, Tensor], size: int, most: int, check: Check) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {unit.name: [] for unit in self.units}
        step = max(1, most // size)
        for done in range(0, self.num_samples, step):
            count = min(step, self.num_samples - done)
            given = {name: value.repeat_interleave(count, 0) for name, value in shared.items()}
            guide_trace, trace = self._run(size * count, for_a_run(self.runs, given))
            check(self._run, [guide_trace, trace], size * count, given)
            for unit in self.units:
                values = self._log_weights(unit, guide_trace, trace, size * count)
                parts[unit.name].append(values.reshape(size, count, *values.shape[1:]))
        return {unit.name: self._mean(unit, torch.cat(parts[unit.name], 1)) for unit in self.units}

    def _run(self, size: int, given: Values) -> list[Trace]:
        guide_trace, values = self.runs.draw(size, given)
        if self._enumerates:
            trace = self.runs.factors(size, values)
        else:
            trace = self.runs.trace(Replay(values)(self.runs.model), size)
        self.runs.align_masks(guide_trace, trace)
        return [guide_trace, trace]

    def _sites(self, unit: Unit, trace: Trace, observed_elsewhere: Mapping[str, Any] | None = None) -> list[Any]:
        return [site for site in with_density(trace, observed_elsewhere or ()) if unit.holds(site)]

    def _log_weights(self, unit: Unit, guide_trace: Trace, trace: Trace, size: int) -> Tensor:
        log_p = log_density(self.runs, trace, self._sites(unit, trace), size, unit.sizes)
        own = self._sites(unit, guide_trace, trace.nodes) if self._samples[unit.name] else []
        return (log_p - log_density(self.runs, guide_trace, own, size, unit.sizes) if own else log_p).double()

    def _mean(self, unit: Unit, log_weights: Tensor) -> Tensor:
        """The log of the mean over S of weights of shape (draws, S, *plates)."""
        log_sum = log_weights.logsumexp(1)
        if self._samples[unit.name]:
            sizes = torch.exp(2 * log_sum - (2 * log_weights).logsumexp(1))
            sizes = sizes.masked_fill(log_sum == -math.inf, 0.0)
            for size, weights in zip(sizes, log_weights, strict=True):
                before = self._worst.get(unit.name)
                worse = torch.ones_like(size, dtype=torch.bool) if before is None else size < before[0]
                old = before or (size, weights)
                self._worst[unit.name] = torch.where(worse, size, old[0]), torch.where(worse, weights, old[1])
        result = log_sum - math.log(log_weights.shape[1])
        masked = self._masked[unit.name]
        return result if masked is None else result.masked_fill(masked, 0.0)

    def _obstacle(self, unit: Unit) -> str | None:
        """Why the unit cannot be integrated, if it cannot."""
        runs, names = self.runs, self._samples[unit.name]
        guide: Any = runs.guide_trace.nodes
        if absent := [name for name in names if name not in guide]:
            return f"no guide draws {absent}"
        plates = [name for name, _ in sorted(unit.plates, key=str)]
        if outside := [name for name in names if not unit.holds(guide[name])]:
            return f"the guide draws {outside} outside of plates {plates}"
        # What passes on the draw of an auxiliary site stays if that is held, unless that is local too.
        held = {
            site["name"]: site["value"]
            for site in sample_sites(runs.guide_trace)
            if not (site["is_observed"] or unit.holds(site))
        }
        if fixed := fixed_sites(runs, names, held):
            return f"the guide draws {fixed} at a point, or jointly for all elements of plates {plates}"
        return None


def fixed_sites(runs: Runs, names: Sequence[str], held: Values) -> list[str]:
    """Return the sites, among these of the guide, to which it gives one value if the ``held`` values are given."""
    guide: Any = runs.guide_trace.nodes
    model: Any = runs.model_trace.nodes
    names = [name for name in names if is_delta(guide[name]) and not is_delta(model[name])]
    if not names:
        return []
    with seeded(0):
        draws = [runs.draw(1, held)[1] for _ in range(3)]
    return [name for name in names if all(torch.equal(draws[0][name], draw[name]) for draw in draws[1:])]


def with_spread(values: np.ndarray, pareto_k: np.ndarray) -> np.ndarray:
    """Return log likelihoods of shape (chain, draw, ...) that differ between draws, by less than 1e-9 relatively.

    What is integrated over all latent sites is the same in every draw. ArviZ's leave-one-out estimate is then that
    value, but ArviZ 1 raises where it fits a tail to equal numbers, and ArviZ 0 calls all of them unreliable. With
    quantiles of a generalized Pareto distribution ArviZ finds the ``pareto_k`` of the importance weights, of shape
    (...), and so calls unreliable what is.
    """
    chains, draws = values.shape[:2]
    constant = (values == values[:1, :1]).all((0, 1)) & np.isfinite(values[0, 0])
    k = np.where(np.isnan(pareto_k), 1.0, np.clip(pareto_k, *_RANGE_OF_K))
    k = np.where(abs(k) < 1e-3, 1e-3, k)
    levels = (np.arange(chains * draws) + 0.5) / (chains * draws)
    left = (1 - levels).reshape(chains, draws, *(1,) * (values.ndim - 2))
    tail = (left**-k - 1) / k
    spread = values - _SPREAD * np.maximum(1.0, abs(values)) * tail / tail.max((0, 1))
    return np.where(constant, spread, values)
