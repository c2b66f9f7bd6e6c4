"""Self-normalized importance weights: Pareto smoothing with its diagnostic, and weighted means with their errors."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_FLAT = 1e-3  # the largest log weights count as equal within so many nats
_FEWEST = 30  # draws for a tail of six, the fewest that ArviZ fits in all its versions


class Weights(NamedTuple):
    """Weights that sum to one over their S draws, of shape (S, N), and the Pareto k-hat of their tails, (N,)."""

    values: Tensor
    pareto_k: Tensor

    @property
    def effective_sample_sizes(self) -> Tensor:
        """The number of equal weights that would be as good, of shape (N,)."""
        return 1 / self.values.square().sum(0)


def smoothed_weights(log_weights: Tensor) -> Weights:
    r"""Weights by ArviZ's Pareto-smoothed importance sampling, from log weights in nats of shape (S, N).

    k-hat is -inf where the largest weights are equal, as they are for the exact posterior; infinite where so few draws
    carry all weight that no tail can be fitted; NaN for fewer than 30 draws, whose weights stay as they are.
    """
    num_samples = len(log_weights)
    raw = log_weights.double().mT.cpu().numpy()
    smoothed = raw - np.logaddexp.reduce(raw, axis=1, keepdims=True)
    pareto_k = np.full(len(raw), math.nan)
    if num_samples >= _FEWEST:
        tail = math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))
        for n, row in enumerate(raw):
            top = np.partition(row, -tail)[-tail:]
            if top.max() - top.min() < _FLAT:
                pareto_k[n] = -math.inf
            else:
                smoothed[n], pareto_k[n] = _psis(row)
    weights = torch.from_numpy(np.exp(smoothed)).mT.to(log_weights)
    return Weights(weights, torch.from_numpy(pareto_k).to(log_weights))


def weighted_mean(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of ``values`` of shape (S, N), and its standard error by the delta method; NaN for one draw."""
    # A draw without weight may have no gradient.
    values = torch.where(weights > 0, values, torch.zeros_like(values))
    mean = (weights * values).sum(0)
    size = len(values)
    correction = size / (size - 1) if size > 1 else math.nan
    return mean, (correction * (weights * (values - mean)).square().sum(0)).sqrt()


def _psis(log_weights: np.ndarray) -> tuple[Any, float]:
    import arviz  # here, because it takes seconds

    if arviz.__version__.startswith("0."):
        smoothed, k = arviz.psislw(log_weights)
    else:
        from arviz_stats.base import array_stats  # type: ignore[import-not-found, attr-defined, unused-ignore]

        # ArviZ 1 takes log densities of the data that are left out, whose negatives are the log weights.
        smoothed, k = array_stats.psislw(-log_weights)
    # Both generations of ArviZ leave the weights as they are if the fit fails; only one of them returns infinity then.
    return smoothed, math.inf if math.isnan(k) else float(k)
