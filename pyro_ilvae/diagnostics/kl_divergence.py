"""KL divergences from guide to prior: of each dimension of a site, of a site, and of all latent sites together."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import Arguments, ModelArgs, Program
from pyro_ilvae.diagnostics._engine.batches import batches
from pyro_ilvae.diagnostics._engine.divergences import KLDivergence, _check_repeatable, _expected_kl, _joined, _joint_kl
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError


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

    It needs no factorization, so it holds for guides with flows and for ``AutoGuides`` whose draws are joint. Analytic
    for a site whose two distributions have a formula in PyTorch; sampled otherwise, for several sites together, and
    for a site whose prior depends on one that the guide draws later. For guides that draw one site after the other the
    divergences of the sites add up to that of all together. Sites that the guide does not sample are summed out of the
    prior. Where an ``AutoGuide`` draws all data jointly, the divergence of its only site is that of each datum's
    marginal if it is Gaussian; otherwise, and for several sites, it is the one of the whole data set.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple, or a single tensor. Tensors whose first dimension is
            the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
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
        for batch in batches(model, guide, Arguments.of(model_args, model_kwargs), batch_size, plate):
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
