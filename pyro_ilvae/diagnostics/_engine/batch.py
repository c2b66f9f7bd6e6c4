"""A model and its guide on a batch of data: their traces, and the place of each site among the data."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import (
    MOST_PAIRS,
    Arguments,
    Program,
    Runs,
    Values,
    is_data,
    is_deterministic,
    sample_sites,
    site_bytes,
    site_log_prob,
    site_shape,
)
from pyro_ilvae.diagnostics._engine import memory
from pyro_ilvae.diagnostics._engine.calls import check_order
from pyro_ilvae.diagnostics._engine.data_plate import plate_over_data
from pyro_ilvae.distributions import innermost

_MOST_PAIRS = MOST_PAIRS  # of a draw and a datum in memory at a time, unless a caller says otherwise

_FEW = 12  # draws
_MANY = 100  # draws
_COMPARED = 8  # draws made together at first, because a branch that few draws take does not show in two


class Batch:
    """A model and its guide on one batch of data, run for any number of draws at once.

    Attributes:
        num_data: the number N of data.
        nesting: the number of batch dimensions of sites; draws stand to the left of them.
        latent_sites: the names of the model's latent sites that the guide samples.
        enumerated_sites: the names of the model's latent sites that the guide leaves out, which must be discrete.
        num_assignments: the number of joint values of the enumerated sites.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        arguments: Arguments,
        plate: str | None,
        *,
        whole: bool = True,
        free_plates: set[str] | None = None,
    ) -> None:
        self.model, self.guide = model, guide
        self.runs = Runs(model, guide, arguments, free_plates=free_plates)
        self.runs.compared, self.runs.num_compared = [self._traces_to_compare], _COMPARED
        self.from_loader = False  # whether other batches come from elsewhere than the same tensors
        self.bytes_by_draws: dict[int, int] = {}  # that runs of so many draws take, as far as that was found out
        check_order(self.runs)
        self.nesting, self.enumerated_sites = self.runs.nesting, self.runs.enumerated_sites
        self.guide_trace, self.model_trace = without_deterministic(self.runs.guide_trace, self.runs.model_trace)
        found = plate_over_data(self.guide_trace, self.model_trace, arguments, plate, whole=whole)
        self.data_plate: str | None
        self.data_plate, self.num_data = found if found is not None else (None, arguments.num_data)
        if self.num_data != arguments.num_data and not whole:
            raise ValueError(
                f"Expected the {self.num_data} data of plate '{self.data_plate}' in model_args, of which batch_size "
                f"takes a part, got tensors with first dimension {arguments.num_data} there"
            )
        self.arguments = arguments if found is None else arguments._replace(size=self.num_data)
        sites = [*sample_sites(self.guide_trace), *sample_sites(self.model_trace)]
        if not sites:
            raise ValueError("Expected a model and a guide with sample sites, got none")
        for site in sites:
            _check_shape(site)
        self._check_plates()
        self._unchecked = _FEW  # the number of draws since some were compared with draws alone
        latent = [site["name"] for site in sample_sites(self.model_trace) if not site["is_observed"]]
        self._check_guide_sites(latent)
        self.latent_sites = [name for name in latent if name not in self.enumerated_sites]
        self.num_assignments = self._checked_assignments()

    def trust(self) -> None:
        """Compare draws with draws alone only after many, because the draws of other batches were alike."""
        self._unchecked = -_MANY

    def passes(self, num_samples: int, samples_per_pass: int | None = None, most_pairs: int | None = None) -> list[int]:
        """Return how many draws to make in each pass, in bounded memory; one by one if model or guide need that."""
        most = (most_pairs or _MOST_PAIRS) // (self.num_data * self.num_assignments)
        if samples_per_pass is None and num_samples != 1:
            sites = [*sample_sites(self.guide_trace), *sample_sites(self.model_trace)]
            # A site takes several tensors of the size of its largest one.
            most = min(most, memory.MOST_BYTES // (8 * max((site_bytes(site) for site in sites), default=1)))
            # The comparison of draws made together with draws alone tells what a draw takes.
            together = self.runs.passes(num_samples, None, most)[0]
            if together > 1 and self.bytes_by_draws:
                most = min(most, memory.MOST_BYTES // max(1, self._bytes_per_draw(together)))
        return self.runs.passes(num_samples, samples_per_pass, most)

    def _bytes_per_draw(self, together: int) -> int:
        """The bytes that each further draw takes, or more than that if the draws fit in memory anyhow."""
        count, taken = max(self.bytes_by_draws.items())
        if together * taken <= count * memory.MOST_BYTES:
            return taken // count
        if 1 not in self.bytes_by_draws:
            with torch.no_grad(), seeded(0):
                self._weighed_traces(1)
        # An encoder, say, takes the same for any number of draws.
        return (taken - self.bytes_by_draws[1]) // (count - 1)

    def _traces_to_compare(self, num_draws: int, given: Values) -> tuple[Trace, Trace]:
        weighed = num_draws > 1 and not self.bytes_by_draws
        return self._weighed_traces(num_draws, given) if weighed else self.traces(num_draws, given)

    def _weighed_traces(self, num_draws: int, given: Values | None = None) -> tuple[Trace, Trace]:
        """Traces, having noted how many bytes it takes to make them and their log densities."""
        with memory.Allocations() as allocations:
            traces = self.traces(num_draws, given)
            for site in (site for trace in traces for site in sample_sites(trace)):
                site_log_prob(site)
        self.bytes_by_draws[num_draws] = allocations.bytes
        return traces

    def traces(
        self,
        num_draws: int,
        conditioned: Values | None = None,
        guide: Program | None = None,
    ) -> tuple[Trace, Trace]:
        """Return traces of guide and model, each with ``num_draws`` draws to the left of all plates.

        Values in ``conditioned`` take the place of the guide's own draws.
        """
        traces = without_deterministic(*self.runs.traces(num_draws, conditioned, guide))
        # Passes of so few draws that the comparison would take longer than they do are compared now and then.
        self._unchecked += num_draws
        if num_draws > 1 and conditioned is None and guide is None and self._unchecked >= _FEW:
            self._unchecked = 0
            self._check_alone(traces, num_draws)
        return traces

    def _check_alone(self, together: tuple[Trace, Trace], num_draws: int) -> None:
        """Raise if draws are not what they are alone: a branch that few draws take shows in a pass of many."""
        if not self.runs.same_alone(self.traces, together, num_draws, thorough=True):
            raise ValueError(
                f"Expected a model and a guide that treat each draw on its own, got {num_draws} draws of which some "
                "are others alone, as where a branch looks at all draws at once: write it with torch.where, or make "
                "the draws one at a time with samples_per_pass=1"
            )

    def log_density(self, sites: list[Any], num_draws: int) -> Tensor:
        """Return the sum of the log densities of sites of one trace.

        It is summed over all plates but the plate of the data, and of shape (draws, N), or (draws, 1) if no site is
        local to the data; enumerated dimensions stay to the left. Scales of plates and annealing do not enter, because
        the density is about one datum.
        """
        total = torch.zeros(())
        for site in sites:
            total = self._per_datum(site_log_prob(site), site, num_draws) + total
        return total

    def points(self) -> list[str]:
        """Return the names of the continuous latent sites that the guide puts at one value, where it has no density."""
        before: dict[str, Any] = {}
        for name in self.latent_sites:
            own: Any = self.guide_trace.nodes[name]["fn"]
            prior: Any = self.model_trace.nodes[name]["fn"]
            deterministic = [isinstance(innermost(fn), dist.Delta) for fn in (own, prior)]
            if deterministic == [True, False] and not prior.support.is_discrete:
                before[name] = self.guide_trace.nodes[name]["value"]
        if not before:
            return []
        # A second run tells a point from the Deltas of most AutoGuides, which pass on draws of an auxiliary site.
        again: Any = self.traces(1)[0].nodes
        return [name for name, value in before.items() if torch.equal(value, again[name]["value"])]

    def in_model_order(self, name: str) -> bool:
        """Whether the guide draws all sites before this site that the model draws before it."""
        drawn = self.drawn_sites
        before = self.latent_sites[: self.latent_sites.index(name)]
        return set(before) <= set(drawn[: drawn.index(name)])

    @property
    def drawn_sites(self) -> list[str]:
        """The latent sites in the order in which the guide draws them."""
        return [name for name in self.guide_trace.nodes if name in self.latent_sites]

    @property
    def observed(self) -> list[Any]:
        """The sites of the data."""
        return [site for site in sample_sites(self.model_trace) if is_data(site) and self.is_local(site)]

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
        """Return a value of the site with draws and data in front: (draws, N, other plates, event).

        A global site has N = 1.
        """
        value = self.runs.padded(value, event_dim)
        dim = self.data_dim(site)
        value = value.unsqueeze(1) if dim is None else value.movedim(self.nesting + 1 + dim, 1)
        # Plates that the site is not in are padding.
        own = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
        padding = [i for i in range(-self.nesting, 0) if i not in own]
        others = [i for i in range(-self.nesting, 0) if i != dim]
        for position in reversed([2 + others.index(i) for i in padding]):
            value = value.squeeze(position)
        return value

    def _per_datum(self, log_prob: Tensor, site: Any, num_draws: int) -> Tensor:
        log_prob = self.runs.padded(log_prob, 0)
        lead = log_prob.shape[: -self.nesting - 1]
        dim = self.data_dim(site)
        others = [i for i in range(-self.nesting, 0) if i != dim]
        if others:
            log_prob = log_prob.sum(others, keepdim=True)
        # A sum over the data's dimension would count a global site once for each datum.
        num_data = 1 if dim is None else self.num_data
        return log_prob.reshape(*lead, -1, num_data).expand(*lead, num_draws, num_data)

    def _check_plates(self) -> None:
        """Raise unless model and guide have each latent site in the same plates."""
        for site in sample_sites(self.guide_trace):
            if site["name"] in self.model_trace:
                prior: Any = self.model_trace.nodes[site["name"]]
                plates = [sorted(f.name for f in s["cond_indep_stack"] if f.vectorized) for s in (prior, site)]
                if plates[0] != plates[1]:
                    raise ValueError(
                        f"Expected site '{site['name']}' in the same plates of model and guide, got {plates[0]} in "
                        f"the model and {plates[1]} in the guide"
                    )

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


def without_deterministic(guide_trace: Trace, model_trace: Trace) -> tuple[Trace, Trace]:
    """The traces without sites that have no density: indices of plates and deterministic values.

    What the model observes is also left out of a guide that runs the model.
    """
    return _without(guide_trace, set(model_trace.nodes)), _without(model_trace, set())


def _without(trace: Trace, observed_elsewhere: set[str]) -> Trace:
    kept = {
        site["name"]
        for site in sample_sites(trace)
        if not is_deterministic(site) and not (site["is_observed"] and site["name"] in observed_elsewhere)
    }
    pruned = trace.copy()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and name not in kept:
            pruned.remove_node(name)
    return pruned


def _check_shape(site: Any) -> None:
    """Raise if a dimension of the log density is neither in a plate nor a part of the event."""
    shape = site_shape(site)
    if any(size > 1 and plate is None for plate, size in zip(shape.plates, shape.batch, strict=True)):
        raise ValueError(
            f"Expected all batch dimensions of site '{site['name']}' in plates, got shape {shape.batch} in plates "
            f"{shape.plates}: declare a plate, or an event by .to_event(...)"
        )
