"""The mutual information, in nats, that a decoder guarantees under Normal noise on the model's own data."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.channels import Channel, channel_of
from pyro_ilvae.diagnostics._engine.decoded_sites import check_likelihood_of_model, decoded_site, part_of
from pyro_ilvae.diagnostics._engine.decoding import (
    at_any_context,
    certified_constant,
    check_likelihood,
    jacobian,
    prior_draws,
    split,
)
from pyro_ilvae.diagnostics._engine.latent_priors import (
    Spread,
    check_prior,
    draws_by_component,
    own_prior,
    prior_of_site,
    spread_of,
)
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.summaries import Call, OfSite

__all__ = ["GuaranteedInformation", "guaranteed_information"]


class GuaranteedInformation(NamedTuple):
    """Lower bounds on the mutual information of data and latent variable, in nats; NaN where nothing is guaranteed."""

    floor: float  #: what L and the noise guarantee by themselves, in nats
    floor_se: float  #: its standard error, 0 unless the entropy of the prior has no formula
    nats_per_dimension: float  #: ``floor`` / K, in nats
    by_jacobian: float  #: what the decoder's Jacobian over draws of the prior guarantees, at least ``floor``, in nats
    by_jacobian_se: float  #: its standard error, by the delta method; NaN for one draw
    #: for a projected decoder, what is guaranteed for each coordinate given all others, in nats, of shape (K,)
    per_coordinate: Tensor | None
    entropy_power: float  #: the entropy power of the prior, in squared units of z: 1 for N(0, I)
    entropy_power_se: float  #: its standard error, 0 in closed form
    reason: str | None  #: why nothing is guaranteed; None where the numbers are guaranteed

    def __repr__(self) -> str:
        if self.reason is not None:
            return printing.described(self, f"nothing is guaranteed: {self.reason}")
        return printing.described(
            self,
            f"floor {printing.number(self.floor, self.floor_se or None)} nats",
            f"{printing.number(self.nats_per_dimension)} per dimension",
            f"by the Jacobian {printing.number(self.by_jacobian, self.by_jacobian_se)} nats",
            f"entropy power of the prior {printing.number(self.entropy_power, self.entropy_power_se or None)}",
        )


def guaranteed_information(
    model_or_decoder: Any,
    likelihood: Callable[[Tensor], Any] | None = None,
    *,
    prior: Any = None,
    num_samples: int = 1000,
    samples_per_pass: int | None = None,
    seed: int | None = None,
) -> GuaranteedInformation:
    r"""The nats of information about z that a decoder guarantees under Normal noise, with no posterior and no fit.

    .. math:: I(x; z) \ge \tfrac K2 \log\Bigl(1 + \frac{e^{\frac2K (h(z) + E \log |\det \nabla m(z)|)}}{2 \pi e\,
        (\det C)^{1/K}}\Bigr) \ge \tfrac K2 \log\Bigl(1 + \frac{L^2 N_z}{\sigma^2}\Bigr), \qquad
        N_z = \frac{e^{2 h(z) / K}}{2 \pi e},

    for x = f(z) + noise and z from the prior, whose entropy is h(z) and whose entropy power :math:`N_z` is 1 for
    N(0, I). With ``Nats(kappa)`` as the constant and this prior, the right-hand side is K kappa. For other likelihoods
    a noise unit is a reference, and no such bound is known.

    I(x; z) is the information of the model on its own data, which is -h(noise) - E log p(x). What a guide finds,
    :func:`~pyro_ilvae.diagnostics.mutual_information` and the mean KL, may be lower: on data that the model fits badly,
    where the guide is far from the posterior, and because an estimate from N data is at most log N.

    Proof. Let :math:`P x` be the decoder's K coordinates of a datum (:math:`P = Q^\top` for a frame Q). Then
    :math:`P x = m(z) + e` with :math:`m = P f` and Normal noise e of covariance :math:`C = P S^2 P^\top`, which is
    :math:`\sigma^2 I` if all entries have the scale :math:`\sigma`. For the projected decoder m is the gradient of a
    strongly convex function, up to a shift; for the composition it is the composition of two of them, because
    :math:`u \mapsto B^\top g_2(B u)` is one; and for K = D it may be f itself. In each case m is one to one with
    :math:`|\det \nabla m| \ge L^K`. So :math:`h(m(z)) = h(z) + E \log |\det \nabla m(z)| \ge h(z) + K \log L` by the
    change of variables. The entropy power inequality [1, 2, 3] says of the independent m(z) and e that
    :math:`e^{2 h(m(z) + e) / K} \ge e^{2 h(m(z)) / K} + 2 \pi e\, (\det C)^{1/K}`. Take :math:`\tfrac K2 \log` of both
    sides and subtract :math:`h(e) = \tfrac K2 \log(2 \pi e\, (\det C)^{1/K})`. The left-hand side becomes
    :math:`h(P x) - h(P x \mid z) = I(P x; z) \le I(x; z)`, and the right-hand side the bound. With L = 0, m is one to
    one where its Jacobian is not singular, and a singular one makes the bound 0.

    A mixture with components y has :math:`I(x; z) = I(x; y) + I(x; z \mid y)`, so the average of the components'
    bounds, by their weights, is a bound too. The floor is this average, in closed form. ``by_jacobian`` is the larger
    of this average and the bound by the entropy of the whole mixture, which is sampled.

    For a projected decoder :math:`\partial m_j / \partial z_j \ge L` for each j, since :math:`\nabla m` is symmetric
    with eigenvalues of at least L. Given all other coordinates, the same proof in one dimension says
    :math:`I(z_j; x \mid z_{-j}) \ge \tfrac12 \log(1 + L^2 N_j / C_{jj})`, with :math:`N_j` the entropy power of
    :math:`z_j` given the others: its variance for a Normal prior with independent coordinates, and one over the j-th
    diagonal entry of the precision matrix for any other Normal prior. Mixtures average over components as above.

    Args:
        model_or_decoder: a model with the attributes ``decoder``, ``likelihood`` and ``prior``, the distribution of the
            z that the decoder takes, such as a :class:`~pyro_ilvae.VAE`, or its method ``model``, which is not run; or
            a decoder. With a context c, a :class:`~pyro_ilvae.ProjectedDecoder` guarantees the same
            :math:`I(x; z \mid c)` for every c; for any other decoder with a context, pass ``decoder.given(context)``.
            A known shift of its value changes nothing. For K < D the decoder needs the method ``coordinates``, see
            :class:`~pyro_ilvae.protocols.Decoder`.
        likelihood: for a decoder, a function from its value to the distribution of the data. It has to be Normal around
            this value, with one scale :math:`\sigma` or a scale for each entry, the same for all z.
        prior: the distribution of z, of event shape (K,); if None, the model's, and N(0, I) for a decoder. An entropy
            without a formula is the mean of -log p(z) over the draws.
        num_samples: the number of draws of the prior, of a mixture at least 2 of each component.
        samples_per_pass: the number of draws treated at a time; if None, as many as fit in bounded memory.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.

    Returns:
        The floor from L, noise and prior; the tighter bound by the Jacobian; what is guaranteed for each coordinate, or
        None; and the entropy power of the prior. Where nothing is guaranteed, the numbers are NaN and ``reason`` says
        why: noise that is not Normal, differs between draws of z, or has a prior on its scale; a decoder without a
        constant, without K coordinates (a composition has more with a context), with a context that is not given, or
        that breaks its constant at a draw; a prior without a density or draws, or with a mask.

    Raises:
        ValueError: for a model with a ``likelihood`` beside its own, or without a prior; for a prior of another shape;
            for a decoder whose output is not finite, differs between two calls, or has lost its derivative, and for
            arguments out of range.
        TypeError: for what is no model, decoder, likelihood or distribution.

    References:
        | [1] Shannon 1948, A mathematical theory of communication, Bell System Technical Journal 27
        | [2] Stam 1959, Some inequalities satisfied by the quantities of information of Fisher and Shannon, Information
          and Control 2
        | [3] Cover & Thomas 2006, Elements of Information Theory, Theorem 17.7.3

    Example:
        >>> from pyro_ilvae import ProjectedDecoder, likelihoods, mlp
        >>> decoder = ProjectedDecoder(mlp(2, (16,), 8), latent_dim=2, event_shape=8, inverse_lipschitz=0.5)
        >>> guaranteed = guaranteed_information(decoder, likelihoods.Normal(0.5), seed=0)
        >>> round(guaranteed.floor, 4), guaranteed.by_jacobian > guaranteed.floor  # log(1 + 0.5^2 / 0.5^2)
        (0.6931, True)
        >>> guaranteed_information(decoder, likelihoods.Bernoulli()).reason
        'Expected a likelihood with Normal noise, got Bernoulli, whose noise unit is a reference, not a bound'
    """
    _checks.positive_int("num_samples", num_samples)
    if samples_per_pass is not None:
        _checks.positive_int("samples_per_pass", samples_per_pass)
    _checks.function("model_or_decoder", model_or_decoder, "a model or a decoder")
    # Outside of inference mode, which has no derivatives.
    with torch.inference_mode(False), torch.no_grad(), evaluation_mode(model_or_decoder, likelihood), seeded(seed):
        try:
            decoder, likelihood, prior = _parts(model_or_decoder, likelihood, prior)
            decoder = at_any_context(decoder)
            spread = spread_of(prior)
            counts = _counts(spread.weights, num_samples)
            drawn = draws_by_component(prior, spread.numbers, counts)
            z = prior_draws(decoder, len(drawn), None, sampler=lambda _: drawn)
            channel = channel_of(decoder, likelihood, z, samples_per_pass)
            log_det = _log_determinants(decoder, channel, z, samples_per_pass)
            mixed = spread.log_powers is None or len(counts) > 1
            surprise = -prior.log_prob(drawn).double().to(z.device) if mixed else None
        except UnavailableError as reason:
            numbers = dict.fromkeys(GuaranteedInformation._fields, math.nan)
            return GuaranteedInformation(**numbers | {"per_coordinate": None, "reason": str(reason)})  # type: ignore
    return _bounds(spread, counts, channel, log_det, surprise)._replace(
        per_coordinate=_per_coordinate(spread, channel, z.dtype)
    )


def _parts(model_or_decoder: Any, likelihood: Any, prior: Any) -> tuple[Any, Any, Any]:
    """The decoder, the likelihood and the prior."""
    own = {name: part_of(model_or_decoder, name) for name in ("decoder", "likelihood")}
    if all(part is not None for part in own.values()):
        if likelihood is not None:
            raise ValueError("Expected likelihood=None for a model, which has a likelihood, got another one")
        decoder, likelihood = own.values()
        if prior is None:
            prior = own_prior(model_or_decoder)
            if prior is None:
                raise ValueError("Expected prior=..., or a model with the attribute prior, a distribution, got neither")
            _check_fixed(prior, part_of(model_or_decoder, "prior"))
    else:
        decoder = model_or_decoder
        check_likelihood(likelihood)
    latent_dim = getattr(decoder, "latent_dim", None)
    if prior is None:
        if latent_dim is None:
            raise ValueError("Expected prior=..., or a decoder with the attribute latent_dim, got neither")
        state = [*decoder.parameters(), *decoder.buffers()] if isinstance(decoder, nn.Module) else []
        like = next((tensor for tensor in state if tensor.is_floating_point()), torch.empty(0))
        loc = torch.zeros(latent_dim, dtype=like.dtype, device=like.device)
        prior = dist.Normal(loc, torch.ones_like(loc)).to_event(1)
    check_prior(prior, latent_dim)
    return decoder, likelihood, prior


def _check_fixed(prior: Any, again: Any) -> None:
    """Raise if a model's prior is another one when it is read again, as with components drawn from a prior."""
    with seeded(0):  # so that no draw of the caller's is used up
        point = prior.sample()
    if not torch.equal(prior.log_prob(point), again.log_prob(point)):
        raise UnavailableError("Expected a prior whose parameters are fixed, got ones that are drawn from a prior")


def _counts(weights: Tensor, num_samples: int) -> list[int]:
    """How many draws there are of each component."""
    if len(weights) == 1:
        return [num_samples]
    return [max(2, round(num_samples * weight)) for weight in weights.tolist()]


def _log_determinants(
    decoder: Callable[[Tensor], Tensor], channel: Channel, z: Tensor, samples_per_pass: int | None
) -> Tensor:
    """log |det grad m| at each row of ``z``, of shape (N,), in double precision; raises if it is below its bound."""
    latent_dim, parts = z.shape[1], []
    slack = 1 - 10 * torch.finfo(z.dtype).eps ** 0.5  # for rounding
    least = latent_dim * math.log(channel.constant * slack) if channel.constant else -math.inf
    slope = None if channel.coordinate_constant is None else channel.coordinate_constant * slack
    compute = partial(jacobian, channel.mean)
    for rows in split(z, latent_dim**2, samples_per_pass, compute):
        slopes = compute(rows).double()
        log_det = torch.linalg.slogdet(slopes)[1]
        if not (log_det >= least).all() or (slope and (slopes.diagonal(dim1=1, dim2=2) < slope).any()):
            raise UnavailableError(
                f"Expected a decoder that keeps the constant that it carries, got a Jacobian of "
                f"{type(decoder).__name__} that is too small at a draw"
            )
        parts.append(log_det)
    return torch.cat(parts)


def _bounds(
    spread: Spread, counts: Sequence[int], channel: Channel, log_det: Tensor, surprise: Tensor | None
) -> GuaranteedInformation:
    """The bounds, from log determinants and, where the prior's entropy is sampled, -log p(z) at the same draws."""
    latent_dim = len(channel.covariance)
    log_noise = float(torch.linalg.slogdet(channel.covariance)[1]) / latent_dim
    log_constant = 2 * math.log(channel.constant) if channel.constant else -math.inf
    unit = math.log(2 * math.pi * math.e)
    weights = spread.weights.to(log_det.device)
    per_nat = 2 / latent_dim

    def bound(log_powers: Tensor, errors: Tensor, weights: Tensor) -> tuple[float, float]:
        """The mean of K / 2 log(1 + signal / noise), for log powers of the signal, and its standard error."""
        ratio = log_powers - log_noise
        slope = torch.sigmoid(ratio)  # the error of the logarithm of a signal's power is 2 / K of that of the nats
        errors = torch.where(slope == 0, 0.0, slope * errors)
        return float((weights * softplus(ratio)).sum() * latent_dim / 2), float((weights * errors).norm())

    means, errors = _by_component(log_det, counts)
    one, nothing = torch.ones_like(weights[:1]), torch.zeros_like(weights)
    candidates = []
    if spread.log_powers is not None:
        log_powers = spread.log_powers.to(log_det.device)
        floor, floor_se = bound(log_powers + log_constant, nothing, weights)
        candidates.append(bound(log_powers + per_nat * means, errors, weights))
    if surprise is None:
        assert spread.log_powers is not None
        log_power, power_error = float(spread.log_powers[0]), 0.0
    else:
        entropy, entropy_error = _overall(surprise, counts, weights)
        log_power, power_error = per_nat * float(entropy) - unit, per_nat * float(entropy_error)
        both, both_error = _overall(surprise + log_det, counts, weights)
        candidates.append(bound(per_nat * both - unit, both_error, one))
        if spread.log_powers is None:
            floor, floor_se = bound(per_nat * entropy - unit + log_constant, entropy_error, one)
    by_jacobian, by_jacobian_se = max(candidates)
    return GuaranteedInformation(
        floor=floor,
        floor_se=floor_se,
        nats_per_dimension=floor / latent_dim,
        by_jacobian=by_jacobian,
        by_jacobian_se=by_jacobian_se,
        per_coordinate=None,
        entropy_power=math.exp(log_power),
        entropy_power_se=math.exp(log_power) * power_error,
        reason=None,
    )


def _by_component(values: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean over the draws of each component and its standard error, each of shape (C,)."""
    parts = values.split(list(counts))
    errors = [part.std() / math.sqrt(len(part)) if len(part) > 1 else part.new_tensor(math.nan) for part in parts]
    return torch.stack([part.mean() for part in parts]), torch.stack(errors)


def _overall(values: Tensor, counts: Sequence[int], weights: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the mixture and its standard error, each of shape (1,)."""
    means, errors = _by_component(values, counts)
    return (weights * means).sum().reshape(1), (weights * errors).norm().reshape(1)


def _per_coordinate(spread: Spread, channel: Channel, dtype: torch.dtype) -> Tensor | None:
    """What each coordinate tells given all others, of shape (K,); None where that is not known."""
    log_powers = spread.log_powers_of_coordinates
    if channel.coordinate_constant is None or log_powers is None:
        return None
    noise = channel.covariance.diagonal()
    ratio = channel.coordinate_constant**2 * log_powers.to(noise.device).exp() / noise
    return (spread.weights.to(noise.device)[:, None] * ratio.log1p() / 2).sum(0).to(dtype)


def _columns(call: Call, site: str) -> dict[str, Any]:
    """What the decoder guarantees for the site that it decodes; nothing for a decoder that promises nothing."""
    try:
        found = decoded_site(call.batch)
    except UnavailableError:
        return {}
    if found is None or found.site != site or certified_constant(found.decoder) is None:
        return {}
    check_likelihood_of_model(call.batch, found)
    result = guaranteed_information(
        found.decoder,
        found.likelihood,
        prior=prior_of_site(call.batch, site, found.trace),
        num_samples=call.options["num_samples"],
        seed=call.options["seed"],
    )
    if result.reason is not None:
        raise UnavailableError(result.reason)
    return {
        "guaranteed_nats": result.by_jacobian,
        "guaranteed_nats_se": result.by_jacobian_se,
        "guaranteed_floor": result.floor,
    }


SUMMARY = OfSite(
    "guaranteed_information",
    _columns,
    missing=dict.fromkeys(("guaranteed_nats", "guaranteed_nats_se", "guaranteed_floor"), math.nan),
)
