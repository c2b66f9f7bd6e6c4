"""Means over draws that come in passes, with their standard errors."""

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
        values = values.detach()
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        if self.count:
            difference = mean - self.mean
            total = self.count + count
            squares = self.squares + squares + difference.square() * (self.count * count / total)
            # Not the mean and a share of the difference, which is NaN for two infinite ones.
            mean = self.mean * (self.count / total) + mean * (count / total)
        self.count, self.mean, self.squares = self.count + count, mean, squares

    def mean_and_error(self, estimator: str) -> tuple[Tensor, str, Tensor]:
        if self.count == 1:
            return self.mean, estimator, torch.full_like(self.mean, float("nan"))
        return self.mean, estimator, (self.squares / (self.count - 1) / self.count).sqrt()
