"""Measures of posterior collapse: KL per dimension and active units."""

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._traces import (
    Data,
    Stochastic,
    data_batches,
    guide_and_model_trace,
    local_site,
)
from pyro_ilvae.distributions import innermost


class KLPerDimension(NamedTuple):
    """KL divergences in nats, of shape (N, \\*event shape of the site), and how they were obtained."""

    values: Tensor
    estimator: str


class ActiveUnits(NamedTuple):
    """Variances over the data of the posterior means, the threshold, and which units lie above it."""

    variances: Tensor
    threshold: float
    active: Tensor

    @property
    def num_active(self) -> int:
        """The number of active units."""
        return int(self.active.sum())


def kl_per_dimension(
    model: Stochastic,
    guide: Stochastic,
    data: Data,
    *,
    site: str = "z",
    batch_size: int | None = None,
    num_samples: int = 100,
) -> KLPerDimension:
    r"""The divergence of each latent dimension's posterior from its prior, for each datum, in nats.

    .. math:: \mathrm{KL}_j(x_n) = \mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j)).

    Analytic where the two distributions have a formula in PyTorch, otherwise the mean of
    :math:`\log q(z_j \mid x_n) - \log p(z_j)` over draws of the guide.

    Args:
        model: the model, called with the data.
        guide: its guide, in which the site factorises over its dimensions.
        data: a tensor, or a tuple of tensors that are the arguments of model and guide, with data along dimension 0.
        site: the name of a latent site in a plate over the data.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws where there is no formula.

    Returns:
        The divergences, of shape (N, \*event shape), and the estimator, "analytic" or "sampled".

    Raises:
        ValueError: if the site is not a latent site of both, is not local to the data or does not factorise.

    References:
        Lucas et al. 2019, Don't blame the ELBO!, https://arxiv.org/abs/1911.02469

    Example:
        >>> import pyro
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
    values, estimators = [], set()
    for args in data_batches(data, batch_size):
        guide_trace, model_trace = guide_and_model_trace(model, guide, args)
        q = _factors(local_site(guide_trace, site, len(args[0]), "guide"), "guide")
        p = _factors(local_site(model_trace, site, len(args[0]), "model"), "model")
        with torch.no_grad():
            try:
                divergence = torch.distributions.kl_divergence(q, p)
                estimators.add("analytic")
            except NotImplementedError:
                draws = q.sample(torch.Size([num_samples]))
                divergence = (q.log_prob(draws) - p.log_prob(draws)).mean(0)
                estimators.add("sampled")
        values.append(divergence.expand(q.batch_shape))
    return KLPerDimension(torch.cat(values), "sampled" if "sampled" in estimators else "analytic")


def active_units(
    model: Stochastic,
    guide: Stochastic,
    data: Data,
    *,
    site: str = "z",
    threshold: float = 0.01,
    batch_size: int | None = None,
    num_samples: int = 100,
) -> ActiveUnits:
    r"""The latent dimensions whose posterior mean moves with the data.

    .. math:: A_j = \operatorname{Var}_x(E_{q(z_j \mid x)}[z_j]), \qquad \text{active if } A_j > \text{threshold}.

    The variance is the unbiased one over all data, in two passes. A mean that has no formula is estimated by draws,
    which adds its sampling variance, Var(z_j | x) / ``num_samples``, to :math:`A_j`.

    Args:
        model: the model, called with the data.
        guide: its guide.
        data: a tensor, or a tuple of tensors that are the arguments of model and guide, with at least two data along
            dimension 0.
        site: the name of a latent site in a plate over the data.
        threshold: the variance above which a unit counts as active.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws where the mean has no formula.

    Returns:
        The variances (in the squared units of z), the threshold and the active units, of the site's event shape.

    Raises:
        ValueError: for fewer than two data, a negative threshold, or a site that is not latent or not local.

    References:
        Burda, Grosse & Salakhutdinov 2016, Importance weighted autoencoders, https://arxiv.org/abs/1509.00519

    Example:
        >>> import pyro
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x * torch.tensor([1.0, 0.0]), 1.0).to_event(1))
        >>> active_units(model, guide, torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
        ActiveUnits(variances=tensor([2., 0.]), threshold=0.01, active=tensor([ True, False]))
    """
    _checks.constant("threshold", threshold)
    _checks.positive_int("num_samples", num_samples)
    means = []
    for args in data_batches(data, batch_size):
        guide_trace, _ = guide_and_model_trace(model, guide, args)
        fn = local_site(guide_trace, site, len(args[0]), "guide")["fn"]
        _refuse_delta(fn, site, "guide")
        with torch.no_grad():
            try:
                mean = fn.mean
            except NotImplementedError:
                mean = fn.sample(torch.Size([num_samples])).mean(0)
        means.append(mean)
    posterior_means = torch.cat(means)
    if len(posterior_means) < 2:
        raise ValueError("Expected at least two data for a variance over data, got 1")
    variances = posterior_means.var(0)
    return ActiveUnits(variances, float(threshold), variances > threshold)


def _refuse_delta(fn: Any, site: str, source: str) -> None:
    """Raise where a distribution says nothing: its density is at another site, or it is a point."""
    if isinstance(innermost(fn), dist.Delta):
        raise ValueError(
            f"Expected a {source} that samples site '{site}' from its own distribution, got a Delta, as of AutoDelta "
            "and of guides such as AutoNormal that transform an auxiliary site; write the guide by hand or use "
            "AutoNormalMessenger"
        )


def _factors(site: Any, source: str) -> TorchDistribution:
    """The site's distribution with its dimensions as batch dimensions."""
    fn = site["fn"]
    _refuse_delta(fn, site["name"], source)
    while isinstance(fn, dist.Independent | torch.distributions.Independent):
        fn = fn.base_dist
    if fn.event_shape:
        raise ValueError(
            f"Expected site '{site['name']}' to factorise over its dimensions, got a {type(fn).__name__} with event "
            f"shape {tuple(fn.event_shape)}"
        )
    expanded: TorchDistribution = fn.expand(site["fn"].batch_shape + site["fn"].event_shape)
    return expanded
