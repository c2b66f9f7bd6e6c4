"""Densities of draws under the aggregate posterior, and the mutual information that follows from them."""

import math

import torch
from torch import Tensor

from pyro_ilvae.diagnostics._engine.data_posteriors import DataPosterior


def exact(
    posteriors: list[DataPosterior], values: Tensor, log_prior: Tensor, values_per_pass: int | None
) -> tuple[float, float]:
    """The mutual information as the gain in entropy, and the divergence of the aggregate posterior from the prior."""
    total = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    entropy, size = 0.0, 0
    for posterior in posteriors:
        passes = posterior.passes(values, values_per_pass)
        probs = torch.cat([posterior.log_prob(values[part]) for part in passes]).double().exp()
        total += probs.sum(1)
        entropy += float(torch.special.entr(probs).sum())
        size += probs.shape[1]
    aggregate = total / size
    information = max(0.0, float(torch.special.entr(aggregate).sum()) - entropy / size)
    terms = aggregate * (aggregate.log() - log_prior.double())
    return information, float(torch.where(aggregate > 0, terms, 0.0).sum())


def log_sum(
    posteriors: list[DataPosterior], draws: Tensor, log_own: Tensor, own: Tensor, draws_per_pass: int | None
) -> Tensor:
    """The log of the summed densities of each draw, with ``log_own`` in place of the posterior of index ``own``."""
    rows, own = draws.flatten(0, 1), own.to(draws.device).repeat(len(draws))
    log_others = torch.full_like(log_own, -math.inf).flatten()
    start = 0
    for posterior in posteriors:
        for part in posterior.passes(rows, draws_per_pass):
            log_pairs = posterior.log_prob(rows[part])
            index = torch.arange(start, start + log_pairs.shape[1], device=own.device)
            log_pairs = log_pairs.masked_fill(index == own[part, None], -math.inf)
            log_others[part] = torch.logaddexp(log_others[part], log_pairs.logsumexp(1))
        start += log_pairs.shape[1]
    return torch.logaddexp(log_own, log_others.reshape(log_own.shape))


def controlled(values: Tensor, errors: Tensor) -> Tensor:
    """Values of shape (S, N) without the noise that ``errors`` explains; each error has a mean known to be 0."""
    if not errors.isfinite().all():
        return values
    result, over = values.clone(), 0 if len(values) > 1 else 1
    halves = slice(0, None, 2), slice(1, None, 2)
    # The slope comes from the other half of the data, because a slope correlated with the errors brings a bias.
    for half, other in (halves, halves[::-1]):
        noise, error = (x[:, other] - x[:, other].mean(over, keepdim=True) for x in (values, errors))
        slope = (noise * error).sum() / error.square().sum().clamp(min=torch.finfo(error.dtype).tiny)
        result[:, half] -= slope.clamp(0, 1) * errors[:, half]
    return result


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of values of shape (S, N) and its standard error."""
    if values.numel() == 1:
        return float(values), math.nan
    spread = values.var(0).mean() if len(values) > 1 else values.var()
    return float(values.mean()), math.sqrt(spread / values.numel())
