"""A part of the joint draw of a guide."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class Part(dist.TorchDistribution):
    """The joint draw of a guide, with the density of some of its entries.

    Args:
        whole: the distribution of all entries.
        positions: the entries that count; None where they are not known.
        message: what an error says first where the density is unknown.
    """

    arg_constraints = {}  # noqa: RUF012 - PyTorch's name and form

    def __init__(self, whole: Any, positions: Tensor | None, message: str) -> None:
        self.whole, self.positions, self.message = whole, positions, message
        super().__init__(whole.batch_shape, whole.event_shape, validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        return self.whole.support

    def log_prob(self, value: Tensor) -> Tensor:
        fn, index = self.whole, self.positions
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if index is not None:
            index = index.to(value.device)
        if index is not None and isinstance(fn, torch.distributions.Normal):
            log_prob: Tensor = fn.log_prob(value)[..., index].sum(-1)
            return log_prob
        gaussian = torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal
        if index is None or not isinstance(fn, gaussian):
            raise ValueError(f"{self.message}, got a {type(fn).__name__}: its density without them is not known here")
        if len(index) == 0:
            return value.new_zeros(value.shape[:-1])
        covariance = fn.covariance_matrix[..., index, :][..., index]
        marginal = torch.distributions.MultivariateNormal(fn.mean[..., index], covariance)
        return marginal.log_prob(value[..., index])
