"""Traces of a guide and of the model replayed against it, batch by batch, with each site's place among the data."""

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae._programs import Arguments, Program
from pyro_ilvae.distributions import innermost

_MOST_PAIRS = 100_000  # of a draw and a datum at a time, unless a caller says otherwise


class Batch:
    """A model and its guide on one batch of data, run for as many particles as are asked for.

    Attributes:
        num_data: the number N of data.
        nesting: the number of plate dimensions; particles stand to the left of them.
        latent_sites: the names of the model's latent sites that the guide samples.
        enumerated_sites: the names of those that it does not, which must be discrete.
        num_assignments: the number of joint values of the latter.
    """

    def __init__(self, model: Program, guide: Program, arguments: Arguments, plate: str | None) -> None:
        self.model, self.guide, self.arguments, self.plate = model, guide, arguments, plate
        self.num_data = arguments.num_data
        self.nesting = 0
        self.enumerated_sites: list[str] = []
        self.guide_trace, self.model_trace = self._plain_traces()
        sites = [*sample_sites(self.guide_trace), *sample_sites(self.model_trace)]
        frames = {frame for site in sites for frame in site["cond_indep_stack"] if frame.vectorized}
        self.nesting = max((-frame.dim for frame in frames), default=0)
        self.data_plate = self._data_plate(frames)
        for site in sites:
            _check_shape(site)
        latent = [site["name"] for site in sample_sites(self.model_trace) if not site["is_observed"]]
        self._check_guide_sites(latent)
        self.latent_sites = [name for name in latent if name in self.guide_trace]
        self.enumerated_sites = [name for name in latent if name not in self.guide_trace]
        self.num_assignments = self._checked_assignments()
        self._vectorizes: bool | None = None

    def passes(self, num_samples: int, samples_per_pass: int | None = None, most_pairs: int | None = None) -> list[int]:
        """How many draws to make in each pass, in bounded memory; one by one if the model or guide needs that."""
        _checks.positive_int("num_samples", num_samples)
        step = max(1, (most_pairs or _MOST_PAIRS) // (self.num_data * self.num_assignments))
        if samples_per_pass is not None:
            step = _checks.positive_int("samples_per_pass", samples_per_pass)
        if num_samples > 1 and step > 1 and not self.vectorizes:
            step = 1
        return [min(step, num_samples - start) for start in range(0, num_samples, step)]

    @property
    def vectorizes(self) -> bool:
        """Whether two draws at once are each what they are alone.

        A model that indexes its values from the left fails with an extra dimension there, or is silently wrong.
        """
        if self._vectorizes is None:
            try:
                self._vectorizes = self._same_alone()
            except Exception:
                self._vectorizes = False
        return self._vectorizes

    def _same_alone(self) -> bool:
        with torch.no_grad(), seeded(0), pyro.validation_enabled(True):
            guide_trace, model_trace = self.traces(2)
            for i in range(2):
                alone = guide_trace.copy()
                for site in sample_sites(guide_trace):
                    if isinstance(innermost(site["fn"]), dist.Delta):
                        # It follows from the other draws, not always to the last bit.
                        alone.remove_node(site["name"])
                        continue
                    plain: Any = self.guide_trace.nodes[site["name"]]
                    value = site["value"].expand(2, *site["value"].shape[1:])[i].reshape(plain["value"].shape)
                    alone.nodes[site["name"]] = plain | {"value": value, "infer": dict(plain["infer"])}
                guide_alone, model_alone = self.traces(1, guide=poutine.replay(self.guide, trace=alone))
                for both, one in ((guide_trace, guide_alone), (model_trace, model_alone)):
                    together = self.log_density(sample_sites(both), 2)
                    if not torch.allclose(
                        together[..., i, :], self.log_density(sample_sites(one), 1)[..., 0, :], rtol=1e-3, atol=1e-3
                    ):
                        return False
        return True

    def traces(
        self,
        num_particles: int,
        conditioned: dict[str, Tensor] | None = None,
        guide: Program | None = None,
    ) -> tuple[Trace, Trace]:
        """Traces of guide and model, each with ``num_particles`` draws to the left of all plates.

        Values in ``conditioned`` take the place of the guide's own draws in the model.
        """
        # Blocked, so that nothing around the call (a trace, a scale, an annealing) sees or changes the sites.
        with poutine.block(), evaluation_mode(self.model, self.guide):
            guide_trace = poutine.trace(self._with_particles(guide or self.guide, num_particles)).get_trace(
                *self.arguments.args, **self.arguments.kwargs
            )
            if conditioned is not None:
                for name, value in conditioned.items():
                    guide_trace.nodes[name]["value"] = value
            model = self._with_particles(poutine.replay(self.model, trace=guide_trace), num_particles)
            if self.enumerated_sites:
                model = poutine.enum(
                    poutine.infer_config(model, self._enumerate), first_available_dim=-self.nesting - 2
                )
            model_trace = self._trace(model)
        return _pruned(guide_trace, model_trace), _pruned(model_trace)

    def log_density(self, sites: list[Any], num_particles: int) -> Tensor:
        """The summed log densities of sites of one trace: (particles, N) if they are local to the data, summed over
        other plates; enumerated dimensions stay to the left.

        Scales of plates and annealing do not enter: this is about one datum.
        """
        total = torch.zeros(())
        for site in sites:
            total = self._per_datum(site_log_prob(site), site, num_particles) + total
        return total

    def points(self) -> list[str]:
        """The continuous latent sites that the guide puts at one value each, where it has no density."""
        before: dict[str, Any] = {}
        for name in self.latent_sites:
            own: Any = self.guide_trace.nodes[name]["fn"]
            prior: Any = self.model_trace.nodes[name]["fn"]
            deterministic = [isinstance(innermost(fn), dist.Delta) for fn in (own, prior)]
            if deterministic == [True, False] and not prior.support.is_discrete:
                before[name] = self.guide_trace.nodes[name]["value"]
        if not before:
            return []
        # The Deltas of most AutoGuides pass on what was drawn at an auxiliary site.
        again: Any = self.traces(1)[0].nodes
        return [name for name, value in before.items() if torch.equal(value, again[name]["value"])]

    def in_model_order(self, name: str) -> bool:
        """Whether the guide draws before the site all that the model draws before it."""
        drawn = self.drawn_sites
        before = self.latent_sites[: self.latent_sites.index(name)]
        return set(before) <= set(drawn[: drawn.index(name)])

    @property
    def drawn_sites(self) -> list[str]:
        """The latent sites in the order in which the guide draws them."""
        return [name for name in self.guide_trace.nodes if name in self.latent_sites]

    def is_local(self, site: Any) -> bool:
        """Whether the site has one value for each datum."""
        return self.data_dim(site) is not None

    def data_dim(self, site: Any) -> int | None:
        """The dimension of the data in the site's batch shape, from the right; None for a global site."""
        return next((frame.dim for frame in site["cond_indep_stack"] if frame.name == self.data_plate), None)

    def site(self, trace: Trace, name: str, source: str) -> Any:
        """The latent site ``name`` of a trace."""
        latent = [site["name"] for site in sample_sites(trace) if not site["is_observed"]]
        if name not in latent:
            raise ValueError(f"Expected site to be a latent site of the {source}, one of {latent}, got {name!r}")
        return trace.nodes[name]

    def data_first(self, value: Tensor, site: Any, event_dim: int) -> Tensor:
        """A value of the site with particles and data in front: (particles, N, other plates, event).

        A global site has N = 1.
        """
        batch = value.dim() - event_dim
        depth = self.nesting + 1
        value = value.reshape(*((1,) * (depth - batch)), *value.shape) if batch < depth else value
        dim = self.data_dim(site)
        value = value.unsqueeze(1) if dim is None else value.movedim(depth + dim, 1)
        # Plates that the site is not in are padding.
        own = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
        padding = [i for i in range(-self.nesting, 0) if i not in own]
        others = [i for i in range(-self.nesting, 0) if i != dim]
        for position in reversed([2 + others.index(i) for i in padding]):
            value = value.squeeze(position)
        return value

    def _per_datum(self, log_prob: Tensor, site: Any, num_particles: int) -> Tensor:
        depth = self.nesting + 1
        log_prob = log_prob.reshape((1,) * (depth - log_prob.dim()) + log_prob.shape)
        dim = self.data_dim(site)
        others = [i for i in range(-self.nesting, 0) if i != dim]
        if others:
            log_prob = log_prob.sum(others, keepdim=True)
        if dim is None:
            # A sum over the data's dimension would count a global site once for each datum.
            return log_prob.reshape(*log_prob.shape[: log_prob.dim() - depth], -1, 1).expand(
                *log_prob.shape[: log_prob.dim() - depth], num_particles, 1
            )
        lead = log_prob.shape[: log_prob.dim() - depth]
        return log_prob.reshape(*lead, -1, self.num_data).expand(*lead, num_particles, self.num_data)

    def _plain_traces(self) -> tuple[Trace, Trace]:
        with torch.no_grad(), poutine.block(), evaluation_mode(self.model, self.guide):
            guide_trace = self._trace(self.guide)
            model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(
                *self.arguments.args, **self.arguments.kwargs
            )
        return _pruned(guide_trace, model_trace), _pruned(model_trace)

    def _trace(self, fn: Program) -> Trace:
        return poutine.trace(fn).get_trace(*self.arguments.args, **self.arguments.kwargs)

    def _with_particles(self, fn: Program, num_particles: int) -> Program:
        if num_particles == 1:
            return fn
        particles = pyro.plate("_num_particles_diagnostics", num_particles, dim=-self.nesting - 1)
        return particles(fn)  # type: ignore[no-any-return]

    def _enumerate(self, site: Any) -> Any:
        # Without their scope, the sites of a Markov chain do not take over each other's dimensions.
        config = {"_markov_scope": None}
        return config | {"enumerate": "parallel"} if site["name"] in self.enumerated_sites else config

    def _data_plate(self, frames: set[Any]) -> str | None:
        sizes = {frame.name: frame.size for frame in frames}
        if self.plate is not None:
            if self.plate not in sizes:
                raise ValueError(f"Expected plate to be one of {sorted(sizes)}, got {self.plate!r}")
            if sizes[self.plate] != self.num_data:
                raise ValueError(
                    f"Expected plate '{self.plate}' to hold the data, got size {sizes[self.plate]} for "
                    f"{self.num_data} data"
                )
            return self.plate
        found = sorted(name for name, size in sizes.items() if size == self.num_data)
        if len(found) > 1:
            raise ValueError(
                f"Expected one plate over the {self.num_data} data, got {found}; name the right one with plate=..."
            )
        drawn = [frame for frame in frames if frame.full_size == self.num_data]
        if not found and drawn:
            raise ValueError(
                f"Expected all data of the batch in the plate '{drawn[0].name}', got {drawn[0].size} of the "
                f"{self.num_data} data: batches are made here, by batch_size"
            )
        return found[0] if found else None

    def _check_guide_sites(self, latent: list[str]) -> None:
        for site in sample_sites(self.guide_trace):
            if site["name"] not in latent and not site["is_observed"] and not site["infer"].get("is_auxiliary"):
                raise ValueError(
                    f"Expected latent sites of the model in the guide, among {latent}, got {site['name']!r}"
                )

    def _checked_assignments(self) -> int:
        assignments = 1
        for name in self.enumerated_sites:
            site: Any = self.model_trace.nodes[name]
            if not site["fn"].has_enumerate_support:
                raise ValueError(
                    f"Expected every latent site of the model in the guide, or a discrete one that can be enumerated, "
                    f"got none for '{name}', a {type(site['fn']).__name__}"
                )
            plates = {frame.name for frame in site["cond_indep_stack"]}
            if not plates <= {self.data_plate}:
                raise ValueError(
                    f"Expected site '{name}', which the guide does not sample, in the plate of the data alone, got "
                    f"plates {sorted(plates)}: sums over its values in an inner plate are not supported here"
                )
            assignments *= len(site["fn"].enumerate_support(expand=False))
            if assignments > _MOST_PAIRS:
                raise ValueError(
                    f"Expected at most {_MOST_PAIRS} values of all sites that the guide does not sample, "
                    f"{self.enumerated_sites}, got more: they are summed over together"
                )
        return assignments


def batches(
    model: Program, guide: Program, arguments: Arguments, batch_size: int | None, plate: str | None = None
) -> Iterator[Batch]:
    """Model and guide on the data, ``batch_size`` at a time."""
    vectorizes: dict[int, bool | None] = {}
    for part in arguments.batches(batch_size):
        batch = Batch(model, guide, part, plate)
        # A last batch can be as small as another plate.
        plate = batch.data_plate
        batch._vectorizes = vectorizes.get(batch.num_data)
        yield batch
        vectorizes[batch.num_data] = batch._vectorizes


def sample_sites(trace: Trace) -> list[Any]:
    """The sites of a trace, without parameters."""
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _pruned(trace: Trace, model_trace: Trace | None = None) -> Trace:
    """The trace without sites that have no density: indices of subsamples, deterministic values.

    Nor, in a guide that runs the model, what the model observes.
    """
    pruned = trace.copy()
    for site in sample_sites(trace):
        observed = site["is_observed"] and model_trace is not None and site["name"] in model_trace
        if observed or site_is_subsample(site) or site["infer"].get("_deterministic"):
            pruned.remove_node(site["name"])
    return pruned


def site_log_prob(site: Any) -> Tensor:
    try:
        log_prob = site["fn"].log_prob(site["value"])
    except ValueError as error:
        raise ValueError(f"Expected a value in the support at site '{site['name']}', got another: {error}") from error
    masked: Tensor = scale_and_mask(log_prob, mask=site["mask"])
    if site["mask"] is not None and "_enumerate_dim" in site["infer"]:
        # Where it is masked, the probabilities of all its values have to add up to one.
        size = len(site["fn"].enumerate_support(expand=False))
        return masked - math.log(size) * ~torch.as_tensor(site["mask"], device=masked.device)
    return masked


def _check_shape(site: Any) -> None:
    """Raise if a dimension of the log density is neither in a plate nor a part of the event."""
    fn, value = site["fn"], site["value"]
    shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    if any(size > 1 and dim not in plates for dim, size in zip(range(-len(shape), 0), shape, strict=True)):
        raise ValueError(
            f"Expected all batch dimensions of site '{site['name']}' in plates, got shape {tuple(shape)} with plates "
            f"at {sorted(plates)}: declare a plate, or an event by .to_event(...)"
        )
