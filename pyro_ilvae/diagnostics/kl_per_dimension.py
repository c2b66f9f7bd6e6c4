"""KL divergences from guide to prior: of each dimension of a site, of a site, and of all latent sites together."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import Arguments, ModelArgs, Program
from pyro_ilvae.diagnostics._engine.batches import batches
from pyro_ilvae.diagnostics._engine.divergences import KLPerDimension, _check_repeatable, _expected_kl, _joined


def kl_per_dimension(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
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
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple, or a single tensor. Tensors whose first dimension is
            the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        site: the name of a latent site.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws where there is no formula, or where there are other latent sites.
        seed: a seed for the draws, which then leave the global random state as it was.
        plate: the name of the plate over the data; if None, the one plate of their number.

    Returns:
        The divergences, of shape (N, \*other plates, \*event shape); the estimator, "analytic" or "sampled"; and their
        Monte Carlo standard errors, 0 where nothing was drawn. A global site has N = 1.

    Raises:
        ValueError: if the site is not a latent site of both, does not factorize, or is a point in the guide.

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
        for batch in batches(model, guide, Arguments.of(model_args, model_kwargs), batch_size, plate):
            _check_repeatable(batch, site, batch_size)
            parts.append(_expected_kl(batch, site, num_samples, per_dimension=True))
    return KLPerDimension(*_joined(parts))
