"""How far apart two values of the latent variable are as distributions of the data, measured and guaranteed."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.decoding import (
    certified_constant,
    check_likelihood,
    check_unconditional,
    distribution_of,
    one_draw,
    parameters_of,
    prior_draws,
    split,
)
from pyro_ilvae.distributions import without_event

__all__ = ["Separation", "separation"]

# For likelihoods that do not know their own divergence: PyTorch's distributions, and what to build them from.
_PARAMETERS: dict[Any, tuple[str, ...]] = {
    torch.distributions.Normal: ("loc", "scale"),
    torch.distributions.Categorical: ("logits",),
    torch.distributions.Bernoulli: ("logits",),
    torch.distributions.NegativeBinomial: ("total_count", "logits"),
}
_LINEAR = (torch.distributions.Bernoulli, torch.distributions.NegativeBinomial)


class Separation(NamedTuple):
    """The divergence KL(p(x | z) || p(x | z')) in nats for independent pairs of prior draws, each of shape (P,)."""

    kl: Tensor  #: the measured divergence of each pair in nats, of shape (P,)
    guaranteed: Tensor | None  #: the divergence in nats that the decoder guarantees, of shape (P,); None if it does not
    distances: Tensor  #: the distance ||z - z'|| of each pair in units of z, of shape (P,)
    smallest_ratio: float | None  #: the smallest ratio of measured to guaranteed, at least 1 up to rounding
    spread: float  #: the mean of the measured divergences in nats; 0 if and only if p(x | z) ignores z
    spread_se: float  #: the Monte Carlo standard error of ``spread`` in nats; NaN for one pair
    estimator: Literal["analytic", "sampled"]  #: how the divergence of a pair was measured

    def __repr__(self) -> str:
        return printing.described(
            self,
            f"mean {printing.number(self.spread, self.spread_se)} nats over {printing.sizes(self.kl.shape, 'pairs')}",
            f"smallest ratio to the guarantee {printing.number(self.smallest_ratio)}",
            self.estimator,
        )


def separation(
    decoder: Callable[[Tensor], Tensor],
    likelihood: Callable[[Tensor], Any],
    *,
    latent_dim: int | None = None,
    num_pairs: int = 1000,
    num_samples: int = 100,
    scale: float = 1.0,
    sampler: Callable[[int], Tensor] | None = None,
    samples_per_pass: int | None = None,
    seed: int | None = None,
) -> Separation:
    r"""How well data tell values of the latent variable apart, and what the decoder guarantees.

    .. math:: \mathrm{KL}(p(x \mid z) \| p(x \mid z')) = \frac{\|f(z) - f(z')\|^2}{2 \sigma^2}
        \ge \frac{L^2 \|z - z'\|^2}{2 \sigma^2}

    for Normal noise with one scale :math:`\sigma` around f(z), and L the constant that the decoder carries. If each
    entry has a scale of its own, the guarantee has the largest of them. The divergence of other likelihoods is measured
    without a guarantee, because a guarantee would depend on their curvature, which may vanish.

    The mean over independent pairs, the *spread*, is 0 if and only if p(x | z) does not depend on z, up to values of z
    that have no probability. This is latent non-identifiability [1]. The spread is the sum of the mutual information of
    x and z under the model and their lautum information [2], so that it is never less than the mutual information. With
    a guarantee and a standard normal prior the spread is at least :math:`K L^2 / \sigma^2`.

    Divergences are analytic if the likelihood has the method ``divergence``, as the likelihoods of the package do, or
    if PyTorch has a formula. Otherwise they are averages of log p(x | z) - log p(x | z') over draws from p(x | z),
    which are unbiased but noisy enough to be negative.

    Args:
        decoder: a module or function of z alone, from (N, K) to natural parameters (N, \*event_shape).
        likelihood: a function from natural parameters to a distribution, see
            :class:`~pyro_ilvae.protocols.Likelihood`. Its attribute ``noise_scale`` or a Normal around the natural
            parameters gives :math:`\sigma`. Modules are used in evaluation mode.
        latent_dim: the dimension :math:`K`, if the decoder lacks this attribute and there is no ``sampler``.
        num_pairs: the number :math:`P` of pairs of independent prior draws.
        num_samples: the number of draws of x for each pair if there is no formula.
        scale: the standard deviation of the prior, N(0, scale^2 I).
        sampler: a function that draws from another prior, from n to a tensor of shape (n, K), in place of ``scale``.
        samples_per_pass: the number of pairs treated at a time; if None, as many as fit in bounded memory.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.

    Returns:
        Divergences, guarantee and distance of each pair, of shape (P,), and the spread with its standard error.

    Raises:
        ValueError: for a decoder whose dimension is not known or another, or whose output is not finite or has another
            length, for divergences that are NaN, and for arguments out of range.
        TypeError: for a decoder, likelihood or sampler that is no function, or that returns something else.
        UnavailableError: for a decoder that needs more than z.

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
    check_unconditional(decoder)
    check_likelihood(likelihood)
    constant = certified_constant(decoder)
    estimators = set()

    def divergences_and_scales(pairs: Tensor, num_samples: int = num_samples) -> tuple[Tensor, Tensor | None]:
        """The divergences of pairs of shape (P, 2, K), of shape (P,), and the noise scale of each if there is one."""
        # One call, so that weights with a prior are the same for both.
        eta, other_eta = parameters_of(decoder, pairs.transpose(0, 1).flatten(0, 1)).chunk(2)
        with one_draw(likelihood):
            p, q = (without_event(distribution_of(likelihood, parameters)) for parameters in (eta, other_eta))
            divergence, estimator = _divergence(likelihood, p, q, eta, other_eta, num_samples)
            noise = _noise_scale(likelihood, p, q, eta, other_eta)
        estimators.add(estimator)
        return divergence.reshape(len(eta), -1).sum(1), None if noise is None else noise.expand(len(eta))

    with torch.no_grad(), evaluation_mode(decoder, likelihood), seeded(seed):
        z, other = prior_draws(decoder, 2 * num_pairs, latent_dim, scale, sampler).chunk(2)
        # Draws of x come one after the other, so that one of them counts.
        rows = split(torch.stack([z, other], 1), 1, samples_per_pass, lambda pairs: divergences_and_scales(pairs, 1))
        divergences, scales = zip(*map(divergences_and_scales, rows), strict=True)
    kl = torch.cat(divergences)
    if kl.isnan().any():
        raise ValueError(f"Expected likelihood to have divergences, got NaN for {int(kl.isnan().sum())} pairs")
    distances = (z - other).double().norm(dim=-1)
    guaranteed, smallest_ratio = None, None
    if constant is not None and all(noise is not None for noise in scales):
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


def _divergence(
    likelihood: Callable[[Tensor], Any], p: Any, q: Any, eta: Tensor, other: Tensor, num_samples: int
) -> tuple[Tensor, Literal["analytic", "sampled"]]:
    """KL(p || q) of each entry in double precision, and how it was computed."""
    if hasattr(likelihood, "divergence"):
        return likelihood.divergence(eta, other).double(), "analytic"
    p, q = _in_double(p), _in_double(q)
    if isinstance(p, _LINEAR) and (not hasattr(p, "total_count") or torch.equal(p.total_count, q.total_count)):
        # log p(x) - log q(x) is linear in x, so its expectation is its value at the mean. PyTorch has no formula, or a
        # formula that is infinite as soon as a probability rounds to one.
        mean = p.mean
        return p.log_prob(mean) - q.log_prob(mean), "analytic"
    try:
        return torch.distributions.kl_divergence(p, q).double(), "analytic"
    except NotImplementedError:
        total = torch.zeros((), dtype=torch.float64, device=eta.device)
        for _ in range(num_samples):
            x = p.sample()
            total = total + (p.log_prob(x) - q.log_prob(x)).double()
        return total / num_samples, "sampled"


def _in_double(distribution: Any) -> Any:
    """A distribution of PyTorch in double precision, without checks of values; any other as it is."""
    for kind, names in _PARAMETERS.items():
        if isinstance(distribution, kind):
            parameters = {name: getattr(distribution, name).double() for name in names}
            return kind(**parameters, validate_args=False)
    return distribution


def _noise_scale(likelihood: Callable[[Tensor], Any], p: Any, q: Any, eta: Tensor, other: Tensor) -> Tensor | None:
    """The largest scale of Normal noise around the natural parameters, if that is what the likelihood is."""
    known: Tensor | float | None = getattr(likelihood, "noise_scale", None)
    if known is not None:
        # A divergence is at least that of equal scales, all as large as the largest.
        return torch.as_tensor(known, dtype=torch.float64, device=eta.device).max()
    if not (isinstance(p, torch.distributions.Normal) and isinstance(q, torch.distributions.Normal)):
        return None
    scale = p.scale.flatten()[0]
    around = p.loc.shape == eta.shape and torch.equal(p.loc, eta) and torch.equal(q.loc, other)
    return scale.double() if around and bool((p.scale == scale).all() and (q.scale == scale).all()) else None
