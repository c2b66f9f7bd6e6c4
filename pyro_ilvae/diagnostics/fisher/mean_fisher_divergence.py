"""The relative Fisher divergence averaged over the model's own data, which is the trace of a metric on latent space."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.decoded_sites import check_likelihood_of_model, decoded_site
from pyro_ilvae.diagnostics._engine.decoding import (
    certified_constant,
    check_likelihood,
    check_unconditional,
    decode,
    distribution_of,
    jacobian,
    num_features,
    one_draw,
    prior_draws,
    split,
)
from pyro_ilvae.diagnostics._engine.own_draws import draws_of_prior
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.summaries import Call, OfWhole

__all__ = ["MeanFisherDivergence", "mean_fisher_divergence"]

_NUM_DATA = 10  # the draws of x for each z if the Fisher information has no formula


class MeanFisherDivergence(NamedTuple):
    """The relative Fisher divergence averaged over the model's own data, per squared unit of z, and its floor."""

    total: float  #: the sum over latent coordinates, in one over squared units of z
    total_se: float  #: the Monte Carlo standard error of ``total``; NaN for one draw
    per_dimension: Tensor  #: the part of each latent coordinate, in one over squared units of z, of shape (K,)
    per_dimension_se: Tensor  #: the Monte Carlo standard errors of the parts, of shape (K,)
    floor: float | None  #: what the decoder guarantees for ``total`` on the same draws; None without a guarantee
    per_dimension_floor: float | None  #: what the decoder guarantees for each latent coordinate, ``floor`` / K
    estimator: Literal["analytic", "sampled"]  #: how the Fisher information at each draw was computed

    def __repr__(self) -> str:
        return printing.described(
            self,
            f"total {printing.number(self.total, self.total_se)} over {len(self.per_dimension)} dimensions",
            f"floor {printing.number(self.floor)}",
            self.estimator,
        )


def mean_fisher_divergence(
    decoder: Callable[[Tensor], Tensor],
    likelihood: Callable[[Tensor], Any],
    *,
    latent_dim: int | None = None,
    num_samples: int = 1000,
    scale: float = 1.0,
    sampler: Callable[[int], Tensor] | None = None,
    samples_per_pass: int | None = None,
    seed: int | None = None,
) -> MeanFisherDivergence:
    r"""The relative Fisher divergence from true posterior to prior, averaged over the model's own data.

    .. math:: E_{p(x)} F(p(z \mid x) \,\|\, p(z)) = E_{p(z)} \operatorname{tr}(J_f(z)^\top I(f(z)) J_f(z))
        = \sum_k E_{p(x, z)} (\partial_{z_k} \log p(x \mid f(z)))^2

    with :math:`J_f` the decoder's Jacobian and :math:`I(\eta) = E_{p(x \mid \eta)}[s s^\top]`,
    :math:`s = \nabla_\eta \log p(x \mid \eta)`, the Fisher information of one datum. The middle expression is the trace
    of the Fisher metric pulled back to the latent space [2] and needs no posterior. The divergence is in one over
    squared units of z and not in nats, and it changes when z is rescaled. A coordinate that the decoder ignores has
    0. For a standard normal prior, half of the total is an upper bound, in nats, on the mutual information of x and
    z under the model (log-Sobolev).

    A decoder with inverse Lipschitz constant L stretches every coordinate by at least L at every z, so that the total
    is at least

    .. math:: \text{floor} = K L^2 \, E_{p(z)} \lambda_{\min}(I(f(z))),

    and each latent coordinate has at least one K-th of the floor, for any K <= D: no coordinate is collapsed on the
    model's own data. For Normal noise the floor is :math:`K L^2 / \sigma^2`, with the largest scale if there are
    several. The inequality holds at each z and both sides are means over the same draws, so that the floor is at most
    the total up to rounding, however few draws there are. The floor is 0 for categories, since a shift of all their
    logits has no information.

    Args:
        decoder: a module or function :math:`f` of z alone, from (N, K) to natural parameters (N, \*event_shape), that
            decodes each row by itself.
        likelihood: a function from natural parameters to a distribution, see
            :class:`~pyro_ilvae.protocols.Likelihood`. If it lacks the methods ``information_product`` and
            ``smallest_information``, the information is estimated from ten draws of x for each z ("sampled"), and there
            is no floor. Modules are used in evaluation mode.
        latent_dim: the dimension :math:`K`, if the decoder lacks this attribute and there is no ``sampler``.
        num_samples: the number of prior draws.
        scale: the standard deviation of the prior, N(0, scale^2 I).
        sampler: a function that draws from another prior, from n to a tensor of shape (n, K), in place of ``scale``.
        samples_per_pass: the number of prior draws treated at a time; if None, as many as fit in bounded memory. It
            changes draws of x, if there are any, and nothing else.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.

    Returns:
        The total and the part of each latent coordinate with their standard errors; what the decoder guarantees for
        both, None without a constant and for "sampled"; and the estimator.

    Raises:
        ValueError: for a decoder whose dimension is not known or another, whose output is not finite, has another
            length, differs between two calls, or has lost its derivative, for an infinite information, and for
            arguments out of range.
        TypeError: for a decoder, likelihood or sampler that is no function, or that returns something else.
        UnavailableError: for a decoder that needs more than z.

    References:
        | [1] Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder
          network, https://arxiv.org/abs/2304.12770
        | [2] Arvanitidis et al. 2022, Pulling back information geometry, https://arxiv.org/abs/2106.05367

    Example:
        >>> from pyro_ilvae import InverseLipschitzDecoder, likelihoods
        >>> decoder = InverseLipschitzDecoder(latent_dim=2, event_shape=8, inverse_lipschitz=0.5, map_features=(16,))
        >>> divergence = mean_fisher_divergence(decoder, likelihoods.Normal(0.1))
        >>> round(divergence.floor, 3), divergence.total > divergence.floor  # 2 * 0.5^2 / 0.1^2
        (50.0, True)
    """
    _checks.positive_int("num_samples", num_samples)
    check_unconditional(decoder)
    check_likelihood(likelihood)
    known = hasattr(likelihood, "information_product") and hasattr(likelihood, "smallest_information")

    def parts_and_smallest(z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part of each coordinate at each z, of shape (N, K), and the smallest information, (N,), if known."""
        eta = decode(decoder, z).reshape(len(z), *event_shape)
        slopes = jacobian(decoder, z)
        if not known:
            return _sampled_squares(likelihood, eta, slopes), None
        tangents = slopes.movedim(-1, 0).reshape(-1, *eta.shape)
        with one_draw(likelihood):
            products = likelihood.information_product(eta, tangents)  # type: ignore[attr-defined]
            smallest = likelihood.smallest_information(eta).reshape(len(eta), -1).amin(-1)  # type: ignore[attr-defined]
        return (tangents * products).reshape(*tangents.shape[:2], -1).sum(-1).T, smallest

    # Outside of inference mode, which has no derivatives.
    with torch.inference_mode(False), torch.no_grad(), evaluation_mode(decoder, likelihood), seeded(seed):
        z = prior_draws(decoder, num_samples, latent_dim, scale, sampler)
        features = num_features(decoder, z[:2])
        event_shape = decoder(z[:1]).shape[1:]
        rows = split(z, features * z.shape[1], samples_per_pass, parts_and_smallest)
        parts, smallest = zip(*map(parts_and_smallest, rows), strict=True)
    values = torch.cat(parts).double()
    if not values.isfinite().all():
        raise ValueError(
            f"Expected a finite Fisher information, got {int((~values.isfinite()).any(-1).sum())} z where it is not"
        )
    constant = certified_constant(decoder)
    guaranteed = None if constant is None or not known else constant**2 * float(torch.cat(smallest).double().mean())
    errors = values.std(0) / math.sqrt(num_samples) if num_samples > 1 else torch.full_like(values[0], math.nan)
    total = values.sum(1)
    return MeanFisherDivergence(
        total=float(total.mean()),
        total_se=float(total.std()) / math.sqrt(num_samples) if num_samples > 1 else math.nan,
        per_dimension=values.mean(0).to(z.dtype),
        per_dimension_se=errors.to(z.dtype),
        floor=None if guaranteed is None else z.shape[1] * guaranteed,
        per_dimension_floor=guaranteed,
        estimator="analytic" if known else "sampled",
    )


def _sampled_squares(likelihood: Callable[[Tensor], Any], eta: Tensor, jacobian: Tensor) -> Tensor:
    """Means of the squared derivatives of log p(x | f(z)) by z, over draws of x for each z, of shape (N, K)."""
    total = torch.zeros_like(jacobian[:, 0])
    for _ in range(_NUM_DATA):
        with torch.enable_grad():
            at = eta.detach().requires_grad_()
            distribution = distribution_of(likelihood, at)
            log_prob = distribution.log_prob(distribution.sample())
            (score,) = torch.autograd.grad(log_prob.sum(), at)
        total += torch.einsum("nd,ndk->nk", score.reshape(len(eta), -1), jacobian).square()
    return total / _NUM_DATA


def _variables(call: Call) -> dict[str, Any]:
    found = decoded_site(call.batch)
    if found is None:
        raise UnavailableError(
            "Expected a model that calls a decoder, a module, with the value of a latent site, got none; call "
            "mean_fisher_divergence(decoder, likelihood, sampler=...) for one that is written otherwise"
        )
    check_unconditional(found.decoder)
    if found.shift is not None:
        raise UnavailableError(
            "Expected a likelihood of the decoder's value, got one of this value and an offset, on which the Fisher "
            "information depends: call mean_fisher_divergence(decoder.given(offset=...), likelihood)"
        )
    check_likelihood_of_model(call.batch, found)
    with seeded(call.options["seed"]):
        z = draws_of_prior(call, str(found.site))
    own = mean_fisher_divergence(
        found.decoder,
        found.likelihood,
        num_samples=len(z),
        sampler=lambda _: z,
        seed=call.options["seed"],
    )
    return {
        "model_fisher": (own.total, {"units": "1 / units of z squared"}),
        "model_fisher_se": own.total_se,
        "model_fisher_floor": math.nan if own.floor is None else own.floor,
    }


SUMMARY = OfWhole("model_fisher", _variables)
