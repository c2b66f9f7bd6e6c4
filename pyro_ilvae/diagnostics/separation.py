"""How far apart two values of the latent variable are as distributions of the data, measured and guaranteed."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.diagnostics._engine.decoding import certified_constant, prior_draws
from pyro_ilvae.distributions import NaturalContinuousBernoulli, NaturalPoisson, without_event

# The distributions of the package's likelihoods and what to build them from.
_PARAMETERS: dict[Any, tuple[str, ...]] = {
    torch.distributions.Normal: ("loc", "scale"),
    torch.distributions.Categorical: ("logits",),
    torch.distributions.Bernoulli: ("logits",),
    torch.distributions.NegativeBinomial: ("total_count", "logits"),
    NaturalContinuousBernoulli: ("eta",),
    NaturalPoisson: ("eta",),
}


_LINEAR = (
    torch.distributions.Bernoulli,
    torch.distributions.NegativeBinomial,
    NaturalContinuousBernoulli,
    NaturalPoisson,
)


class Separation(NamedTuple):
    """The divergence KL(p(x | z) || p(x | z')) in nats for independent pairs of prior draws, each of shape (P,)."""

    kl: Tensor  #: the measured divergence of each pair, in nats
    guaranteed: Tensor | None  #: the divergence that the decoder guarantees, in nats; None without a guarantee
    distances: Tensor  #: the distance ||z - z'|| of each pair
    smallest_ratio: float | None  #: the smallest of measured over guaranteed, >= 1 up to rounding
    spread: float  #: the mean of the measured divergences, in nats; 0 if and only if p(x | z) ignores z
    spread_se: float  #: its Monte Carlo standard error; NaN for one pair
    estimator: Literal["analytic", "sampled"]  #: how the divergence of a pair was measured


def separation(
    decoder: Callable[[Tensor], Tensor],
    likelihood: Callable[[Tensor], Any],
    *,
    latent_dim: int | None = None,
    num_pairs: int = 1000,
    num_samples: int = 100,
    scale: float = 1.0,
    sampler: Callable[[int], Tensor] | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Separation:
    r"""How well the data tell values of the latent variable apart, against what the decoder guarantees.

    .. math:: \mathrm{KL}(p(x \mid z) \| p(x \mid z')) = \frac{\|f(z) - f(z')\|^2}{2 \sigma^2}
        \ge \frac{L^2 \|z - z'\|^2}{2 \sigma^2}

    for Normal noise with one scale :math:`\sigma` around f(z), and L the constant that the decoder carries. Other
    likelihoods have a divergence that is measured, but no guarantee: it depends on their curvature, which may vanish.

    The mean over independent pairs, the *spread*, is 0 if and only if p(x | z) does not depend on z, which is latent
    non-identifiability [1], up to values of z that have no probability. It is the mutual information of x and z under
    the model plus the lautum information [2], so never less than the former. For the guarantee and a standard normal
    prior it is at least :math:`K L^2 / \sigma^2`.

    Analytic divergences are exact for the likelihoods of the package and what PyTorch has a formula for. Others are
    averages of log p(x | z) - log p(x | z') over draws from p(x | z): unbiased, but noisy enough to be negative.

    Args:
        decoder: a module or function from (N, K) to natural parameters (N, \*event_shape).
        likelihood: from natural parameters to a distribution, see :mod:`pyro_ilvae.likelihoods`. Modules are used in
            evaluation mode.
        latent_dim: the dimension :math:`K`, where the decoder lacks the attribute and there is no ``sampler``.
        num_pairs: the number :math:`P` of pairs of independent prior draws.
        num_samples: the number of draws for each pair where there is no formula.
        scale: the standard deviation of the prior, N(0, scale^2 I).
        sampler: draws from another prior: a function from n to a tensor of shape (n, K).
        batch_size: the number of pairs treated at a time; all at once if None.
        seed: for the draws; None for the global random state.

    Returns:
        Divergences, guarantee and distance of each pair, of shape (P,), and the spread with its standard error.

    Raises:
        ValueError: for a decoder whose dimension is not known, and arguments out of range.

    References:
        | [1] Wang, Blei & Cunningham 2021, Posterior collapse and latent variable non-identifiability,
          https://arxiv.org/abs/2301.00537
        | [2] Palomar & Verdú 2008, Lautum information, IEEE Transactions on Information Theory 54

    Example:
        >>> from pyro_ilvae import InverseLipschitzDecoder, likelihoods
        >>> decoder = InverseLipschitzDecoder(latent_dim=2, event_shape=8, inverse_lipschitz=0.5, map_features=(16,))
        >>> result = separation(decoder, likelihoods.Normal(0.1), num_pairs=100)
        >>> result.smallest_ratio >= 0.999, result.spread > 2 * 0.5**2 / 0.1**2
        (True, True)
    """
    _checks.positive_int("num_pairs", num_pairs)
    _checks.positive_int("num_samples", num_samples)
    size = num_pairs if batch_size is None else _checks.positive_int("batch_size", batch_size)
    constant = certified_constant(decoder)
    divergences, scales, estimators = [], [], set()
    with torch.no_grad(), evaluation_mode(decoder, likelihood), seeded(seed):
        z, other = prior_draws(decoder, 2 * num_pairs, latent_dim, scale, sampler).chunk(2)
        for pair in zip(z.split(size), other.split(size), strict=True):
            # In one call, so that weights that have a prior are the same for both.
            eta, other_eta = decoder(torch.cat(pair)).chunk(2)
            p, q = (_without_events(likelihood(parameters)) for parameters in (eta, other_eta))
            divergence, estimator = _divergence(p, q, num_samples)
            divergences.append(divergence.reshape(len(eta), -1).sum(1))
            noise = _common_scale(p, q, eta, other_eta)
            scales += [] if noise is None else [noise.expand(len(eta))]
            estimators.add(estimator)
    kl = torch.cat(divergences)
    distances = (z - other).double().norm(dim=-1)
    guaranteed, smallest_ratio = None, None
    if constant is not None and len(scales) == len(divergences):
        guaranteed = 0.5 * (constant * distances / torch.cat(scales)).square()
        smallest_ratio = float(torch.where(guaranteed > 0, kl / guaranteed, math.inf).min())
    return Separation(
        kl=kl.to(z.dtype),
        guaranteed=None if guaranteed is None else guaranteed.to(z.dtype),
        distances=distances.to(z.dtype),
        smallest_ratio=smallest_ratio,
        spread=float(kl.mean()),
        spread_se=float(kl.std()) / math.sqrt(num_pairs) if num_pairs > 1 else math.nan,
        estimator="sampled" if "sampled" in estimators else "analytic",
    )


def _without_events(distribution: Any) -> Any:
    """The distribution in double precision, with no dimensions declared as events and no check of values."""
    distribution = without_event(distribution)
    for kind, names in _PARAMETERS.items():
        if isinstance(distribution, kind):
            parameters = {name: getattr(distribution, name).double() for name in names}
            return kind(**parameters, validate_args=False)
    return distribution


def _divergence(p: Any, q: Any, num_samples: int) -> tuple[Tensor, Literal["analytic", "sampled"]]:
    """KL(p || q) of the shape of p's batch, and how it was computed."""
    if isinstance(p, _LINEAR) and _same_base_measure(p, q):
        # log p(x) - log q(x) is linear in x, so its expectation is its value at the mean; the formulas that PyTorch
        # has are infinite as soon as a probability rounds to one.
        mean = p.mean
        return p.log_prob(mean) - q.log_prob(mean), "analytic"
    try:
        return torch.distributions.kl_divergence(p, q), "analytic"
    except NotImplementedError:
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(num_samples):
            x = p.sample()
            total = total + (p.log_prob(x) - q.log_prob(x)).double()
        return total / num_samples, "sampled"


def _same_base_measure(p: Any, q: Any) -> bool:
    return not isinstance(p, torch.distributions.NegativeBinomial) or bool((p.total_count == q.total_count).all())


def _common_scale(p: Any, q: Any, eta: Tensor, other_eta: Tensor) -> Tensor | None:
    """The scale of Normal noise around the natural parameters, if that is what the likelihood is."""
    if not (isinstance(p, torch.distributions.Normal) and isinstance(q, torch.distributions.Normal)):
        return None
    scale = p.scale.flatten()[0]
    around = p.loc.shape == eta.shape and torch.equal(p.loc, eta.double()) and torch.equal(q.loc, other_eta.double())
    return scale if around and bool((p.scale == scale).all() and (q.scale == scale).all()) else None
