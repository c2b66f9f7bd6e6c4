"""The KL divergence of each dimension of a latent site."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.diagnostics._engine.batches import data_batches
from pyro_ilvae.diagnostics._engine.divergences import KLDivergence, entangled_sites, expected_kl
from pyro_ilvae.diagnostics._engine.moments import mean_over_data
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.sites import dims_of_unit, only_site
from pyro_ilvae.diagnostics._engine.summaries import Call, OfSite
from pyro_ilvae.diagnostics.collapsed_dimensions import collapsed_dimensions

__all__ = ["kl_per_dimension"]


def kl_per_dimension(
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
    r"""The divergence of each latent dimension's posterior from its prior, for each datum, in nats.

    .. math:: \mathrm{KL}_j(x_n) = \mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j)).

    Analytic where the two distributions have a formula in PyTorch, otherwise the mean of :math:`\log q(z_j \mid x_n) -
    \log p(z_j)` over draws of the guide. For multivariate Normals and mixtures, and for an ``AutoGuide`` with a joint
    Gaussian, these are the divergences of the marginals, which need not add up to the divergence of the site. Discrete
    sites that the guide does not sample are summed out of the prior. If there are other latent sites, each divergence
    is the mean over the guide's draws of the other sites, and is one where the guide draws first what the site's prior
    depends on. Otherwise the numbers are parts of the joint divergence and may be negative, see
    :func:`~pyro_ilvae.diagnostics.kl_divergence`.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        site: the name of a latent site; if None, the only one that the guide samples.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws where there is no formula, or where there are other latent sites.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        The divergences, of shape (N, \*other plates, \*event shape); the estimator, "analytic" or "sampled"; and the
        Monte Carlo standard errors, 0 where nothing was drawn. A site that all data share has N = 1.

    Raises:
        ValueError: if ``site`` is None and there are several, if the site is not a latent site of model and guide, and
            for a batch size with a site that all data share.
        UnavailableError: if the site does not factorize, or is a point in the guide.

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
    with seeded(seed), torch.no_grad():
        return KLDivergence.joined(
            expected_kl(batch, only_site(batch, site), num_samples, per_dimension=True, batch_size=batch_size)
            for batch in data_batches(model, guide, model_args, model_kwargs, batch_size, plate)
        )


def _kl_per_unit(
    model: Program,
    guide: Program,
    model_args: ModelArgs,
    *,
    model_kwargs: Mapping[str, Any] | None,
    site: str,
    batch_size: int | None,
    num_samples: int,
    seed: int | None,
    plate: str | None,
) -> KLDivergence:
    """As :func:`kl_per_dimension`, of a site whose entries are one variable, as in a one-hot vector."""
    with seeded(seed), torch.no_grad():
        return KLDivergence.joined(
            expected_kl(
                batch,
                site,
                num_samples,
                per_dimension=True,
                batch_size=batch_size,
                within=dims_of_unit(batch.site(batch.model_trace, site, "model")),
            )
            for batch in data_batches(model, guide, model_args, model_kwargs, batch_size, plate)
        )


def _columns(call: Call, site: str) -> dict[str, Any]:
    try:
        kl = call(kl_per_dimension, site=site)
    except UnavailableError as reason:
        if not dims_of_unit(call.batch.model_trace.nodes[site]):
            raise
        kl = call(_kl_per_unit, site=site)
        call.notes.append(f"kl: {reason}: its entries are one unit")
    mean, error = mean_over_data(kl.values, kl.standard_errors)
    epsilon, delta = call.limits["epsilon"], call.limits["delta"]
    # A site without dimensions is one unit.
    rows = kl.values.reshape(len(kl.values), -1)
    with seeded(0), torch.no_grad():
        entangled = entangled_sites(call.batch, site)
    if partners := [*entangled.above, *entangled.below]:
        call.notes.append(
            f"kl: a part of the joint divergence and no divergence of '{site}', which the guide draws with {partners} "
            "in another order than the model, or jointly; kl_divergence without a site has the joint one"
        )
    return {
        "kl": mean,
        "kl_se": error,
        "collapsed_fraction": (kl.values < epsilon).double().mean(0),
        "epsilon_delta_collapsed": collapsed_dimensions(rows, epsilon=epsilon, delta=delta).double(),
        "is_least": bool(entangled.above),
        "is_most": bool(entangled.below),
    }


SUMMARY = OfSite("kl", _columns, units=("kl", "kl_se", "collapsed_fraction", "epsilon_delta_collapsed"))
