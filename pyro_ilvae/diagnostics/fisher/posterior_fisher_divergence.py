"""The relative Fisher divergence of the true posterior from the prior, by weighted draws of the guide."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.diagnostics._engine.batches import data_batches
from pyro_ilvae.diagnostics._engine.scores import differentiable_sites
from pyro_ilvae.diagnostics._engine.weighted_scores import (
    PosteriorFisherDivergence,
    weighted_divergence,
    weighted_squares,
)

__all__ = ["PosteriorFisherDivergence", "posterior_fisher_divergence"]


def posterior_fisher_divergence(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    num_samples: int = 1000,
    batch_size: int | None = None,
    samples_per_pass: int | None = None,
    seed: int | None = None,
    plate: str | None = None,
) -> PosteriorFisherDivergence:
    r"""The relative Fisher divergence from the *true* posterior to the prior, for each datum.

    .. math:: F(p(z \mid x) \,\|\, p(z)) = E_{p(z \mid x)} \|\nabla_z \log p(z \mid x) - \nabla_z \log p(z)\|^2
        = E_{p(z \mid x)} \|\nabla_z \log p(x \mid z)\|^2,

    in one over squared units of z. No normalizer is needed. The estimator is self-normalized importance sampling from
    the guide with Pareto-smoothed weights [1],

    .. math:: \sum_s \bar w_s \|\nabla_z \log p(x \mid z_s)\|^2, \qquad
        \bar w_s \propto \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q(z \mid x).

    Do not trust the estimate or its standard error where k-hat exceeds 0.7: the guide then misses a part of the
    posterior that matters, and more draws do not help. Observed sites, ``pyro.factor`` statements among them, make up
    :math:`p(x \mid z)`. With other latent sites :math:`y` the result is the divergence of the joint posterior in the
    direction of :math:`z`, which is the mean over :math:`p(y \mid x)` of the divergence given :math:`y`. Where y
    depends on z in the model, as a lower layer on an upper one, it leaves out what the data say about z through y. If
    that is nearly all that they say, so that :math:`\nabla_z \log p(x \mid y, z)` has less than a hundredth of the root
    mean square of :math:`\nabla_z \log p(y \mid z)`, it would be near 0 and is an error: take both layers together.
    Discrete sites that the guide
    does not sample are summed over, so that :math:`p(x \mid z) = \sum_y p(x, y, z) / \sum_y p(y, z)`. Where data share
    a latent or observed site, all data have the same weights, whose effective sample size falls quickly with the number
    of data. For a standard normal prior, KL(p(z|x) || p(z)) <= F/2 in nats, and F >= \|E[z|x]\|^2.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        sites: the names of the latent sites :math:`z`; if None, all continuous ones in the plate over the data.
        num_samples: the number of draws for each datum; below 30 there is neither smoothing nor k-hat.
        batch_size: the number of data treated at a time; all at once if None.
        samples_per_pass: the number of draws treated at a time, which bounds the memory and changes nothing else; if
            None, as many as fit in bounded memory, and at least one draw of ``batch_size`` data.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        The divergences; their standard errors by the delta method, NaN for one draw; the effective sample sizes
        :math:`1 / \sum_s \bar w_s^2`; and k-hat, which is -inf for equal weights, infinite where few draws carry all
        weight, and NaN for fewer than 30 draws. Each has shape (N,).

    Raises:
        ValueError: for a site that is not latent, not in the guide or not in the plate over the data, for densities
            that are not numbers, and for a batch size where data share a site.
        UnavailableError: for a discrete site, a site whose support has no interior, a guide that puts a site at a
            point, straight-through sites, whose density is not at their values, and a site that reaches the data nearly
            only through other sites that are drawn, or through a discrete one.

    References:
        [1] Vehtari et al. 2024, Pareto smoothed importance sampling, https://arxiv.org/abs/1507.02646

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> x = torch.tensor([0.0, 2.0])
        >>> divergence = posterior_fisher_divergence(model, guide, x, seed=0)
        >>> exact = x**2 / 4 + 0.5  # E (x - z)^2 for z ~ N(x / 2, 1 / 2)
        >>> bool(((divergence.values - exact).abs() < 5 * divergence.standard_errors).all())
        True
    """
    _checks.positive_int("num_samples", num_samples)
    parts = []
    with seeded(seed):
        for batch in data_batches(model, guide, model_args, model_kwargs, batch_size, plate):
            names = differentiable_sites(batch, sites)
            weights, (squares,) = weighted_squares(
                batch, names, num_samples, samples_per_pass=samples_per_pass, batch_size=batch_size
            )
            parts.append(weighted_divergence(weights, squares))
    return PosteriorFisherDivergence(*(torch.cat(part) for part in zip(*parts, strict=True)))
