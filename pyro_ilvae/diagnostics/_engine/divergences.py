"""KL divergences from guide to prior, of a site, of its dimensions, and of all latent sites together."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae._programs import sample_sites, site_log_prob
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.densities import check_numbers, log_density, shared_sites
from pyro_ilvae.diagnostics._engine.moments import Moments
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError, correlated, factors, site_posterior
from pyro_ilvae.diagnostics._engine.sites import check_no_points, check_not_flat, check_samples


class KLDivergence(NamedTuple):
    """KL divergences from posterior to prior for each datum, in nats, with their Monte Carlo errors."""

    #: the divergences in nats, of shape (N,) for a site or all sites, (N, \*other plates, \*event shape) for dimensions
    values: Tensor
    estimator: str  #: "analytic" if every value has a formula, otherwise "sampled"
    standard_errors: Tensor  #: the Monte Carlo standard errors of the values in nats, of their shape; 0 without draws

    def __repr__(self) -> str:
        return printing.described(
            self,
            f"{printing.mean(self.values, self.standard_errors)} nats over {printing.sizes(self.values.shape)}",
            self.estimator,
        )

    @classmethod
    def joined(cls, parts: Iterable[tuple[Tensor, str, Tensor]]) -> Self:
        """The divergences of all batches, from values, estimator and standard errors of each."""
        values, estimators, errors = zip(*parts, strict=True)
        return cls(torch.cat(values), "sampled" if "sampled" in estimators else "analytic", torch.cat(errors))


def expected_kl(
    batch: Batch, name: str, num_samples: int, *, per_dimension: bool, batch_size: int | None, within: int = 0
) -> tuple[Tensor, str, Tensor]:
    """The divergence of one site in the mean over the guide's draws of the others, the estimator, and the error.

    If it is taken per dimension, the last ``within`` event dimensions stay together.
    """
    shared_sites(batch, [batch.site(batch.guide_trace, name, "guide")], batch_size)
    if len(batch.latent_sites) == 1:
        # A draw of the batch is enough for a formula, unless there are sites to sum out of the prior.
        one = batch.traces(1) if batch.enumerated_sites else (batch.guide_trace, batch.model_trace)
        values, analytic = _kl(batch, name, one, per_dimension, within)
        if analytic:
            return values[0], "analytic", torch.zeros_like(values[0])
    moments = Moments()
    for count in batch.passes(num_samples):
        values, analytic = _kl(batch, name, batch.traces(count), per_dimension, within)
        moments.add(values.expand(count, *values.shape[1:]))
    return moments.mean_and_error("analytic" if analytic else "sampled")


def joint_kl(batch: Batch, num_samples: int, batch_size: int | None) -> tuple[Tensor, str, Tensor]:
    """The divergence of all latent sites together, the estimator, and the error."""
    check_samples(batch)
    check_no_points(batch, "the divergence of a point is infinite")
    check_not_flat(batch, batch.latent_sites)
    moments = Moments()
    for count in batch.passes(num_samples):
        guide_trace, model_trace = batch.traces(count)
        latent: list[Any] = [model_trace.nodes[name] for name in [*batch.latent_sites, *batch.enumerated_sites]]
        own = sample_sites(guide_trace)
        together = bool(shared_sites(batch, own + latent, batch_size))
        log_ratio = log_density(batch, own, count, together) - log_density(batch, latent, count, together)
        check_numbers(log_ratio, own + latent)
        moments.add(log_ratio)
    return moments.mean_and_error("sampled")


def _kl(batch: Batch, name: str, traces: tuple[Trace, Trace], per_dimension: bool, within: int) -> tuple[Tensor, bool]:
    """Divergences given each draw of the other sites, or log ratios where there is no formula."""
    guide_trace, model_trace = traces
    site, prior = batch.site(guide_trace, name, "guide"), batch.site(model_trace, name, "model")
    check_not_flat(batch, [name])
    q, p = site_posterior(batch, guide_trace, model_trace, name), prior["fn"]
    summed = len(p.batch_shape) > batch.nesting + 1  # over the values of sites that the guide leaves out
    if summed and not (per_dimension and batch.latent_sites == [name] and _all_local(batch, model_trace)):
        raise UnavailableError(
            f"Expected a prior of site '{name}' that does not depend on sites that the guide leaves out, got one given "
            f"{batch.enumerated_sites}"
        )
    event_dim = 0
    if per_dimension:
        event_dim = q.event_dim - within
        q, p = factors(q, name, within), factors(p, name, within)
    formula = _formula_holds(batch, name) and not summed
    try:
        values = torch.distributions.kl_divergence(q, p) if formula else None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # there is no formula, or one by gradients, as of a Wishart, which are off
        values = None
    analytic = values is not None
    if values is None:
        try:
            with evaluation_mode(q, p):
                log_prior = p.log_prob(site["value"])
                if summed:
                    log_prior = _summed(batch, model_trace, log_prior, event_dim)
                values = q.log_prob(site["value"]) - log_prior
        except ValueError as error:
            raise ValueError(f"Expected draws in the support at site '{name}', got others: {error}") from error
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"], device=values.device)
        values = scale_and_mask(values, mask=mask.reshape(mask.shape + (1,) * event_dim))
    values = batch.data_first(values, site, event_dim)
    if not per_dimension and values.dim() > 2:
        if correlated(batch, name):
            raise UnavailableError(
                f"Expected draws of site '{name}' that are independent in inner plates, got joint ones"
            )
        values = values.flatten(2).sum(2)
    if values.isnan().any():
        raise ValueError(f"Expected log densities of guide and model that are numbers, got NaN at site '{name}'")
    return values, analytic


def _all_local(batch: Batch, model_trace: Trace) -> bool:
    return all(batch.is_local(model_trace.nodes[name]) for name in batch.enumerated_sites)


def _summed(batch: Batch, model_trace: Trace, log_prior: Tensor, event_dim: int) -> Tensor:
    """A log density given enumerated sites, summed over their values, with the last dimensions as they are."""
    for other in batch.enumerated_sites:
        log_prob = site_log_prob(model_trace.nodes[other])
        log_prior = log_prior + log_prob.reshape(*log_prob.shape, *(1,) * event_dim)
    lead = log_prior.dim() - event_dim - batch.nesting - 1
    return log_prior.flatten(0, lead - 1).logsumexp(0)


def _formula_holds(batch: Batch, name: str) -> bool:
    """Whether the mean of the formula over draws of the other sites is the divergence of the site.

    That is so where the guide draws first what the prior depends on. Log ratios always have the right mean.
    """
    if len(batch.latent_sites) == 1:
        return True
    first = batch.latent_sites[0] == name
    return first or (batch.in_model_order(name) and not correlated(batch, name))


class Entangled(NamedTuple):
    """The sites with which a site is drawn in another order than the model's, or jointly."""

    above: list[str]  #: those on which its prior depends: the site's number is at most its divergence given them
    below: list[str]  #: those whose prior depends on it: the site's number is at least its divergence


def entangled_sites(batch: Batch, name: str) -> Entangled:
    """The sites that depend on each other in the model in one way and in the guide in the other.

    The numbers of such sites add up to the joint divergence, but none of them is a divergence: for a posterior that is
    the prior, drawn from the last layer up, they are plus and minus the mutual information of the layers.
    """
    others = [other for other in batch.latent_sites if other != name]
    if not others:
        return Entangled([], [])
    first, second = ({n: batch.traces(1)[0].nodes[n]["value"] for n in batch.latent_sites} for _ in range(2))

    def changes(sources: list[str], target: str, *, in_guide: bool) -> bool:
        """Whether other draws of some sites change the distribution of another."""
        log_probs = []
        for values in (first, second):
            given = first | {source: values[source] for source in sources}
            guide_trace, model_trace = batch.traces(1, conditioned=given)
            trace: Any = guide_trace if in_guide else model_trace
            log_probs.append(trace.nodes[target]["fn"].log_prob(first[target]))
        before, after = log_probs
        return not torch.allclose(before, after, rtol=1e-4, atol=1e-4, equal_nan=True)

    rank, order = batch.latent_sites.index, batch.drawn_sites.index
    joint = correlated(batch, name)
    above = [other for other in others if rank(other) < rank(name) and (joint or order(other) > order(name))]
    below = [] if joint else [other for other in others if rank(other) > rank(name) and order(other) < order(name)]
    # Most sites depend on no other, which one comparison shows.
    if above and changes(above, name, in_guide=False):
        above = [other for other in above if changes([other], name, in_guide=False)]
        above = [other for other in above if joint or changes([name], other, in_guide=True)]
    else:
        above = []
    if below and changes(below, name, in_guide=True):
        below = [other for other in below if changes([other], name, in_guide=True)]
        below = [other for other in below if changes([name], other, in_guide=False)]
    else:
        below = []
    return Entangled(above, below)
