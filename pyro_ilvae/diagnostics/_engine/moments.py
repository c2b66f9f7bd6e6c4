"""Means with their standard errors: over draws that come in passes, and over data."""

from typing import Any

import torch
from torch import Tensor


class Moments:
    """Mean and standard error over the first dimension of what is added, in one pass (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = None
        self.squares: Any = None

    def add(self, values: Tensor) -> None:
        """Add values of shape (draws, ...)."""
        values = values.detach()
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        if self.count:
            difference = mean - self.mean
            total = self.count + count
            squares = self.squares + squares + difference.square() * (self.count * count / total)
            # A weighted mean, because a mean plus a share of the difference is NaN where both are infinite.
            mean = self.mean * (self.count / total) + mean * (count / total)
        self.count, self.mean, self.squares = self.count + count, mean, squares

    def mean_and_error(self, estimator: str) -> tuple[Tensor, str, Tensor]:
        """The mean, the estimator, and the standard error of the mean; NaN for one draw."""
        if self.count == 1:
            return self.mean, estimator, torch.full_like(self.mean, float("nan"))
        return self.mean, estimator, (self.squares / (self.count - 1) / self.count).sqrt()


def mean_over_data(values: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean of values of shape (N, \*unit) over data, and its standard error, each of shape (\*unit,).

    The spread over the data contains the Monte Carlo ``errors`` of the values; a single datum has no other error.
    """
    values = values.double()
    if len(values) > 1:
        return values.mean(0), values.std(0) / len(values) ** 0.5
    return values[0], errors[0].double()
