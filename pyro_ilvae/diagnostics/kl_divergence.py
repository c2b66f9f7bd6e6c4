"""The KL divergence of a latent site, or of all latent sites together."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.diagnostics._engine.batches import data_batches
from pyro_ilvae.diagnostics._engine.divergences import KLDivergence, expected_kl, joint_kl
from pyro_ilvae.diagnostics._engine.moments import mean_over_data
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.sites import only_site
from pyro_ilvae.diagnostics._engine.summaries import Call, OfSite

__all__ = ["KLDivergence", "kl_divergence"]


def kl_divergence(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    site: str | None = None,
    batch_size: int | None = None,
    num_samples: int = 100,
    seed: int | None = None,
    plate: str | None = None,
) -> KLDivergence:
    r"""The divergence from posterior to prior for each datum, in nats, of one latent site or of all of them.

    .. math:: \mathrm{KL}(x_n) = E_{q(z \mid x_n)}[\log q(z \mid x_n) - \log p(z)].

    The divergence needs no factorization, so it holds for guides with flows and for ``AutoGuides`` whose draws are
    joint. It is analytic for a site whose two distributions have a formula in PyTorch. It is sampled otherwise, for
    several sites together, and for a site whose prior depends on a site that the guide draws later. If the guide draws
    one site after the other, the divergences of the sites add up to the divergence of all sites together. If it draws
    the layers of a hierarchy in another order than the model, from the data up, they are only parts of that sum: a part
    may be negative, and differ from 0 although the posterior is the prior. Sites that
    the guide does not sample are summed out of the prior. If an ``AutoGuide`` draws all data jointly, the divergence of
    its only site is the divergence of each datum's marginal where the joint draw is Gaussian; otherwise, and for
    several sites, there is one divergence for the whole data set.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        site: the name of a latent site, whose divergence is the mean over the guide's draws of the other sites; if
            None, the result is the divergence of all latent sites together that the guide samples.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        The divergences, of shape (N,); the estimator, "analytic" or "sampled"; and the Monte Carlo standard errors.
        If data share a site, there is one divergence for the whole data set, of shape (1,).

    Raises:
        ValueError: if the site is not a latent site of model and guide, and for a batch size with sites that data
            share, whose divergence belongs to no batch.
        UnavailableError: if a site is a point in the guide, and if the guide has no distribution of the site.

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
        for batch in data_batches(model, guide, model_args, model_kwargs, batch_size, plate):
            only = batch.latent_sites[0] if len(batch.latent_sites) == 1 else None
            if site is not None:
                only_site(batch, site)
            if (name := only if site is None else site) is None:
                parts.append(joint_kl(batch, num_samples, batch_size))
                continue
            try:
                parts.append(expected_kl(batch, name, num_samples, per_dimension=False, batch_size=batch_size))
            except UnavailableError:
                if only is None:
                    raise
                # The only site has the divergence of all sites, which needs no distribution of the site alone.
                parts.append(joint_kl(batch, num_samples, batch_size))
    return KLDivergence.joined(parts)


def _columns(call: Call, site: str) -> dict[str, Any]:
    kl = call(kl_divergence, site=site)
    node = call.batch.model_trace.nodes[site]
    if len(kl.values) == 1 < call.arguments.num_data and call.batch.is_local(node):
        raise UnavailableError("Expected a divergence for each datum, got one for the whole data set from a joint draw")
    mean, error = mean_over_data(kl.values, kl.standard_errors)
    return {"kl_total": float(mean), "kl_total_se": float(error), "kl_estimator": kl.estimator}


SUMMARY = OfSite(
    "kl", _columns, missing={"kl_total": float("nan"), "kl_total_se": float("nan"), "kl_estimator": "none"}
)
