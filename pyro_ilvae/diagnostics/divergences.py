"""KL divergences from guide to prior: of each dimension of a site, of a site, and of all latent sites together."""

from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._random import seeded
from pyro_ilvae.diagnostics._batches import Batch, Data, Stochastic, batches, sample_sites
from pyro_ilvae.diagnostics._densities import check_numbers, log_density, shared_sites
from pyro_ilvae.diagnostics._moments import Moments
from pyro_ilvae.diagnostics._posteriors import UnavailableError, correlated, factors, site_posterior


class KLPerDimension(NamedTuple):
    """KL divergences in nats, of shape (N, \\*event shape of the site), their Monte Carlo errors, and the estimator."""

    values: Tensor
    estimator: str
    standard_errors: Tensor


class KLDivergence(NamedTuple):
    """KL divergences in nats, one for each datum, their Monte Carlo errors, and the estimator."""

    values: Tensor
    estimator: str
    standard_errors: Tensor


def kl_per_dimension(
    model: Stochastic,
    guide: Stochastic,
    data: Data,
    *,
    site: str = "z",
    batch_size: int | None = None,
    num_samples: int = 100,
    seed: int | None = None,
    plate: str | None = None,
) -> KLPerDimension:
    r"""The divergence of each latent dimension's posterior from its prior, for each datum, in nats.

    .. math:: \mathrm{KL}_j(x_n) = \mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j)).

    Analytic where the two distributions have a formula in PyTorch, otherwise the mean of
    :math:`\log q(z_j \mid x_n) - \log p(z_j)` over draws of the guide. For a multivariate Normal guide, and for an
    ``AutoGuide`` with a joint Gaussian, these are the divergences of the marginals. With other latent sites it is the
    mean over the guide's draws of them.

    Args:
        model: the model, called with the data.
        guide: its guide.
        data: a tensor, or a tuple of tensors that are the arguments of model and guide, with data along dimension 0.
        site: the name of a latent site.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws where there is no formula, or where there are other latent sites.
        seed: a seed for the draws, which then leave the global random state as it was.
        plate: the name of the plate over the data; if None, the one plate of their number.

    Returns:
        The divergences, of shape (N, \*other plates, \*event shape); the estimator, "analytic" or "sampled"; and their
        Monte Carlo standard errors, 0 where nothing was drawn. A global site has N = 1.

    Raises:
        ValueError: if the site is not a latent site of both, does not factorise, or is a point in the guide.

    References:
        Lucas et al. 2019, Don't blame the ELBO!, https://arxiv.org/abs/1911.02469

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x * torch.tensor([1.0, 0.0]), 1.0).to_event(1))
        >>> kl_per_dimension(model, guide, torch.full((1, 2), 3.0)).values
        tensor([[4.5000, 0.0000]])
    """
    _checks.positive_int("num_samples", num_samples)
    parts = []
    with seeded(seed), torch.no_grad():
        for batch in batches(model, guide, data, batch_size, plate):
            _check_repeatable(batch, site, batch_size)
            parts.append(_expected_kl(batch, site, num_samples, per_dimension=True))
    return KLPerDimension(*_joined(parts))


def kl_divergence(
    model: Stochastic,
    guide: Stochastic,
    data: Data,
    *,
    site: str | None = None,
    batch_size: int | None = None,
    num_samples: int = 100,
    seed: int | None = None,
    plate: str | None = None,
) -> KLDivergence:
    r"""The divergence from posterior to prior for each datum, in nats, of one latent site or of all of them.

    .. math:: \mathrm{KL}(x_n) = E_{q(z \mid x_n)}[\log q(z \mid x_n) - \log p(z)].

    It needs no factorisation, so it holds for guides with flows and for ``AutoGuides`` whose draws are joint. Analytic
    for a site whose two distributions have a formula in PyTorch; sampled otherwise, for several sites together, and
    for a site whose prior depends on one that the guide draws later. For guides that draw one site after the other the
    divergences of the sites add up to that of all together. Sites that the guide does not sample are summed out of the
    prior. Where an ``AutoGuide`` draws all data jointly, the divergence of its only site is that of each datum's
    marginal if it is Gaussian; otherwise, and for several sites, it is the one of the whole data set.

    Args:
        model: the model, called with the data.
        guide: its guide.
        data: a tensor, or a tuple of tensors that are the arguments of model and guide, with data along dimension 0.
        site: the name of a latent site, whose divergence is the mean over the guide's draws of the others; if None,
            the divergence of all latent sites that the guide samples.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws.
        seed: a seed for the draws, which then leave the global random state as it was.
        plate: the name of the plate over the data; if None, the one plate of their number.

    Returns:
        The divergences, of shape (N,); the estimator, "analytic" or "sampled"; and their Monte Carlo standard errors.
        Where a site is global the divergence is one of the whole data set, of shape (1,).

    Raises:
        ValueError: if the site is not a latent site of both, or is a point in the guide; for a batch size with global
            sites, whose divergence belongs to no batch.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.MultivariateNormal(x, torch.eye(2)))
        >>> kl = kl_divergence(model, guide, torch.full((1, 2), 3.0), num_samples=1000, seed=0)
        >>> kl.estimator, bool((kl.values - 9.0).abs() < 5 * kl.standard_errors)
        ('sampled', True)
    """
    _checks.positive_int("num_samples", num_samples)
    parts = []
    with seeded(seed), torch.no_grad():
        for batch in batches(model, guide, data, batch_size, plate):
            only = batch.latent_sites[0] if len(batch.latent_sites) == 1 else None
            if (name := site or only) is None:
                parts.append(_joint_kl(batch, num_samples, batch_size))
            else:
                _check_repeatable(batch, name, batch_size)
                try:
                    parts.append(_expected_kl(batch, name, num_samples, per_dimension=False))
                except UnavailableError:
                    if only is None:
                        raise
                    # The only site has the divergence of all of them, which needs no distribution of its own.
                    parts.append(_joint_kl(batch, num_samples, batch_size))
    return KLDivergence(*_joined(parts))


def _expected_kl(batch: Batch, name: str, num_samples: int, per_dimension: bool) -> tuple[Tensor, str, Tensor]:
    """Mean, estimator and Monte Carlo error over the draws of a guide."""
    if len(batch.latent_sites) == 1:
        # A draw of the batch is enough for a formula, unless there are sites to sum out of the prior.
        one = batch.traces(1) if batch.enumerated_sites else (batch.guide_trace, batch.model_trace)
        values, analytic = _kl(batch, name, one, per_dimension)
        if analytic:
            return values[0], "analytic", torch.zeros_like(values[0])
    moments = Moments()
    for count in batch.passes(num_samples):
        values, analytic = _kl(batch, name, batch.traces(count), per_dimension)
        moments.add(values.expand(count, *values.shape[1:]))
    return moments.mean_and_error("analytic" if analytic else "sampled")


def _kl(batch: Batch, name: str, traces: tuple[Trace, Trace], per_dimension: bool) -> tuple[Tensor, bool]:
    """Divergences given each draw of the other sites, or log ratios where there is no formula."""
    guide_trace, model_trace = traces
    site, prior = batch.site(guide_trace, name, "guide"), batch.site(model_trace, name, "model")
    q, p = site_posterior(batch, guide_trace, model_trace, name), prior["fn"]
    if len(p.batch_shape) > batch.nesting + 1:
        raise UnavailableError(
            f"Expected a prior of site '{name}' that does not depend on sites that the guide leaves out, got one given "
            f"{batch.enumerated_sites}"
        )
    event_dim = 0
    if per_dimension:
        event_dim = q.event_dim
        q, p = factors(q, name), factors(p, name)
    formula = _formula_holds(batch, name)
    try:
        values = torch.distributions.kl_divergence(q, p) if formula else None
    except NotImplementedError:
        values = None
    analytic = values is not None
    if values is None:
        try:
            values = q.log_prob(site["value"]) - p.log_prob(site["value"])
        except ValueError as error:
            raise ValueError(f"Expected draws in the support at site '{name}', got others: {error}") from error
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"], device=values.device)
        values = scale_and_mask(values, mask=mask.reshape(*mask.shape, *(1,) * event_dim))
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


def _formula_holds(batch: Batch, name: str) -> bool:
    """Whether the divergence given each draw of the other sites is, in the mean, that of the site.

    It is where the guide draws what the prior depends on first. Log ratios always have the right mean.
    """
    if len(batch.latent_sites) == 1:
        return True
    first = batch.latent_sites[0] == name
    return first or (batch.in_model_order(name) and not correlated(batch, name))


def _joint_kl(batch: Batch, num_samples: int, batch_size: int | None) -> tuple[Tensor, str, Tensor]:
    if not batch.latent_sites:
        raise UnavailableError("Expected a guide that samples a latent site of the model, got none")
    if points := batch.points():
        raise UnavailableError(
            f"Expected a guide that draws its sites from distributions, got a Delta for each of {points}: the "
            "divergence of a point is infinite"
        )
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


def _check_repeatable(batch: Batch, name: str, batch_size: int | None) -> None:
    if batch_size is not None and not batch.is_local(batch.site(batch.guide_trace, name, "guide")):
        raise ValueError(f"Expected batch_size=None for a site that all data share, got {batch_size}")


def _joined(parts: list[tuple[Tensor, str, Tensor]]) -> tuple[Tensor, str, Tensor]:
    values, estimators, errors = zip(*parts, strict=True)
    return torch.cat(values), "sampled" if "sampled" in estimators else "analytic", torch.cat(errors)
