"""Bounds on the information that a decoder with Normal noise has about its latent variable."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ilvae.diagnostics._engine.channels import Channel, channel_of, noise_scale
from pyro_ilvae.diagnostics._engine.decoding import (
    decode,
    jacobian,
    lipschitz_constant,
    parameters_of,
    prior_draws,
    split,
)
from pyro_ilvae.diagnostics._engine.latent_priors import Spread, draws_by_component, spread_of
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError

LOG_UNIT = math.log(2 * math.pi * math.e)  # of an entropy power
_PAIRED = 64  # draws whose distances are compared with a Lipschitz constant


class Bounds(NamedTuple):
    """Bounds in nats, lower ones with their standard errors, and the entropy power that they rest on."""

    floor: float
    floor_se: float
    nats_per_dimension: float
    by_jacobian: float
    by_jacobian_se: float
    per_coordinate: Tensor | None
    entropy_power: float
    entropy_power_se: float
    ceiling: float | None = None
    ceiling_reason: str | None = "Expected a prior whose variance has a formula, got a site with another one above"


class Entropy(NamedTuple):
    """Lower bounds on the entropy of a latent site that has a site above it, in nats."""

    floor: float  #: by the constants of the decoders above
    floor_se: float
    by_jacobian: float  #: by their Jacobians
    by_jacobian_se: float
    log_powers_of_coordinates: Tensor  #: of each coordinate given all others, of shape (K,)


def bounds_for_prior(
    decoder: Any, likelihood: Any, prior: Any, num_samples: int, samples_per_pass: int | None
) -> Bounds:
    """The bounds for z from a prior that is a distribution; raises where nothing is guaranteed."""
    spread = spread_of(prior)
    counts = _counts(spread.weights, num_samples)
    drawn = draws_by_component(prior, spread.numbers, counts)
    z = prior_draws(decoder, len(drawn), None, sampler=lambda _: drawn)
    channel = channel_of(decoder, likelihood, z, samples_per_pass)
    log_det = _log_determinants(decoder, channel, z, samples_per_pass)
    mixed = spread.log_powers is None or len(counts) > 1
    surprise = -prior.log_prob(drawn).double().to(z.device) if mixed else None
    ceiling, reason = _ceiling(decoder, likelihood, prior, z)
    return _bounds(spread, counts, channel, log_det, surprise)._replace(
        per_coordinate=_per_coordinate(spread, channel, z.dtype), ceiling=ceiling, ceiling_reason=reason
    )


def bounds_for_entropy(
    decoder: Any, likelihood: Any, entropy: Entropy, drawn: Tensor, samples_per_pass: int | None
) -> Bounds:
    """The bounds for z of which draws and bounds of the entropy are known; raises where nothing is guaranteed."""
    z = prior_draws(decoder, len(drawn), None, sampler=lambda _: drawn)
    channel = channel_of(decoder, likelihood, z, samples_per_pass)
    log_det = _log_determinants(decoder, channel, z, samples_per_pass)
    latent_dim = len(channel.covariance)
    log_noise = float(torch.linalg.slogdet(channel.covariance)[1])
    (mean,), (error,) = _by_component(log_det, [len(log_det)])

    def bound(entropy_of_mean: float, error: float) -> tuple[float, float]:
        """K / 2 log(1 + signal / noise), for the entropy of m(z), and its standard error."""
        ratio = torch.tensor(2 / latent_dim * entropy_of_mean - LOG_UNIT - log_noise / latent_dim, dtype=torch.float64)
        slope = float(torch.sigmoid(ratio))
        return latent_dim / 2 * float(softplus(ratio)), slope * error if slope else 0.0

    log_constant = math.log(channel.constant) if channel.constant else -math.inf
    floor, floor_se = bound(entropy.floor + latent_dim * log_constant, entropy.floor_se)
    by_jacobian = bound(entropy.by_jacobian + float(mean), math.hypot(entropy.by_jacobian_se, float(error)))
    one = torch.ones(1, dtype=torch.float64)
    spread = Spread(one, one.long(), None, entropy.log_powers_of_coordinates[None])
    power = math.exp(2 / latent_dim * entropy.floor - LOG_UNIT)
    return Bounds(
        floor=floor,
        floor_se=floor_se,
        nats_per_dimension=floor / latent_dim,
        by_jacobian=by_jacobian[0],
        by_jacobian_se=by_jacobian[1],
        per_coordinate=_per_coordinate(spread, channel, z.dtype),
        entropy_power=power,
        entropy_power_se=power * 2 / latent_dim * entropy.floor_se,
    )


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
) -> Bounds:
    """The bounds, from log determinants and, where the prior's entropy is sampled, -log p(z) at the same draws."""
    latent_dim = len(channel.covariance)
    log_noise = float(torch.linalg.slogdet(channel.covariance)[1]) / latent_dim
    log_constant = 2 * math.log(channel.constant) if channel.constant else -math.inf
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
        log_power, power_error = per_nat * float(entropy) - LOG_UNIT, per_nat * float(entropy_error)
        both, both_error = _overall(surprise + log_det, counts, weights)
        candidates.append(bound(per_nat * both - LOG_UNIT, both_error, one))
        if spread.log_powers is None:
            floor, floor_se = bound(per_nat * entropy - LOG_UNIT + log_constant, entropy_error, one)
    by_jacobian, by_jacobian_se = max(candidates)
    return Bounds(
        floor=floor,
        floor_se=floor_se,
        nats_per_dimension=floor / latent_dim,
        by_jacobian=by_jacobian,
        by_jacobian_se=by_jacobian_se,
        per_coordinate=None,
        entropy_power=math.exp(log_power),
        entropy_power_se=math.exp(log_power) * power_error,
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


def _ceiling(decoder: Any, likelihood: Any, prior: Any, z: Tensor) -> tuple[float | None, str | None]:
    """The capacity of the channel from f(z) to x in nats, for draws ``z``; or None and why there is no ceiling."""
    constant, kind = lipschitz_constant(decoder), type(decoder).__name__
    if constant is None:
        return None, f"Expected a decoder that carries lipschitz, got {kind}"
    try:
        variance = float(prior.variance.detach().double().sum())
    except (AttributeError, NotImplementedError):
        variance = math.nan
    if not math.isfinite(variance):
        return None, f"Expected a prior whose variance is finite and has a formula, got {type(prior).__name__}"
    some = z[:_PAIRED]
    moved = (decode(decoder, some) - decode(decoder, some.flip(0))).double().norm(dim=-1)
    rounding = 10 * torch.finfo(z.dtype).eps ** 0.5
    if not (moved <= constant * (1 + rounding) * (some - some.flip(0)).double().norm(dim=-1)).all():
        raise UnavailableError(
            f"Expected a decoder that keeps the constant that it carries, got values of {kind} that are farther from "
            f"each other than lipschitz = {constant:g} allows"
        )
    noise = noise_scale(likelihood, parameters_of(decoder, z[:2])).flatten().square()
    return capacity(constant**2 * variance, noise), None


def capacity(power: float, noise: Tensor) -> float:
    """The capacity of independent Normal channels of these noise variances under a total power, in nats.

    The power fills up the noisiest last, as water fills a vessel.
    """
    noise = noise.sort().values
    levels = (power + noise.cumsum(0)) / torch.arange(1, len(noise) + 1, dtype=noise.dtype, device=noise.device)
    filled = max(1, int((levels > noise).sum()))
    return float((levels[filled - 1] / noise[:filled]).log().sum() / 2)
