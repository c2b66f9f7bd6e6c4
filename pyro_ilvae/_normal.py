"""Normal noise around the decoder's output."""

import math
from typing import Literal

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._exponential_family import ExponentialFamily, as_eta, as_mean, log_of
from pyro_ilvae.distributions import IsotropicNormal
from pyro_ilvae.networks import public_method


class Normal(ExponentialFamily):
    r"""Independent Normal noise around the decoder's output.

    .. math:: p(x \mid \eta) = \prod_d N(x_d \mid \eta_d, \sigma_d^2).

    A scale for each feature suits data in different units. A feature that the decoder fits without error has a density
    without bound as its scale is estimated, so that images with blank borders want one scale.

    Args:
        scale: the standard deviation :math:`\sigma`, or the value at which its estimate starts: a number, equal for all
            entries of a datum, or a tensor or array of the shape of a datum, with a scale :math:`\sigma_d` for each.
        estimate: how :math:`\sigma` is found:

            - "fixed": :math:`\sigma` stays at ``scale``.
            - "learned": :math:`\sigma` is a parameter of the shape of ``scale``, trained with the other parameters.
            - "optimal": :math:`\sigma^2 = \operatorname{mean} (x - \eta)^2` over each training batch, the maximum
              likelihood value (sigma-VAE [1]); the mean is over data alone if there is a scale for each entry. A
              running average of these values replaces it without gradients, in ``eval()`` mode and without data, so
              that evaluation does not depend on how the data are batched.

    Raises:
        ValueError: for scales that are not positive, for natural parameters whose shape does not end in the
            shape of ``scale``, and for another ``estimate``.
        TypeError: for a scale that is neither a number nor a tensor nor an array.

    References:
        [1] Rybkin, Daniilidis & Levine 2021, Simple and effective VAE training with calibrated decoders,
        https://arxiv.org/abs/2006.13202

    Example:
        >>> likelihood = Normal(scale=0.1)
        >>> likelihood(torch.zeros(5, 8)).scale.unique()
        tensor([0.1000])
        >>> likelihood = Normal(scale=torch.tensor([0.1, 20.0]))
        >>> likelihood(torch.zeros(5, 2)).scale[0]
        tensor([ 0.1000, 20.0000])
    """

    support = constraints.real
    _momentum = 0.05

    def __init__(self, scale: float | Tensor = 1.0, estimate: Literal["fixed", "learned", "optimal"] = "fixed") -> None:
        super().__init__()
        self.estimate = _checks.choice("estimate", estimate, ("fixed", "learned", "optimal"))
        log_scale = log_of("scale", scale)
        if estimate == "learned":
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.register_buffer("num_updates", torch.zeros_like(log_scale, dtype=torch.int64))

    log_scale: Tensor
    num_updates: Tensor

    def extra_repr(self) -> str:
        """The scale and its estimate, for ``print``."""
        return f"scale={self._shown('log_scale')}, estimate={self.estimate!r}"

    @property
    def scale(self) -> Tensor:
        r"""The standard deviation :math:`\sigma` that is used without data, of shape () or of the shape of a datum."""
        return self.log_scale.exp()

    @property
    def noise_scale(self) -> Tensor:
        r"""The standard deviation :math:`\sigma` of the Normal noise around eta, of all entries or of each."""
        return self.scale

    @property
    def depends_on_batch(self) -> bool:  # type: ignore[override]
        """Whether the density of a datum depends on the other data of its batch."""
        return self.estimate == "optimal"

    def forward(self, eta: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; only the optimal scale uses ``x``, where ``mask`` is True."""
        eta = as_eta(eta)
        scale = self._beside("log_scale", eta).exp()
        if self.estimate == "optimal" and x is not None and self.training and torch.is_grad_enabled():
            # The loss is stationary in the scale at its optimum, so the scale needs no gradient.
            mask = None if mask is None else _checks.mask("mask", mask, x.shape)
            log_scale, seen = self._optimal((x - eta.detach()).square(), mask)
            scale = log_scale.exp()
            if log_scale.isfinite().all():  # a step with a loss that is not finite must not enter the average
                weight = torch.where(self.num_updates == 0, 1.0, self._momentum).to(self.log_scale.dtype)
                self.log_scale.lerp_(log_scale.to(self.log_scale.dtype), weight)
                self.num_updates += seen
        return IsotropicNormal(eta, scale)

    def _optimal(self, squares: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """The log scale at which squared errors are most probable, and 1 where there are errors, for each scale."""
        shape = self.log_scale.shape
        if mask is None:
            mean = squares.reshape(-1, *shape).mean(0) if shape else squares.mean()
            return 0.5 * mean.clamp(min=1e-12).log(), 1
        there = mask.expand_as(squares)
        squares = torch.where(there, squares, 0.0)
        dims = tuple(range(squares.dim() - len(shape)))
        total, count = squares.sum(dims), there.sum(dims)
        found = 0.5 * (total / count.clamp(min=1)).clamp(min=1e-12).log()
        # A feature that no datum of the batch has keeps its scale.
        return torch.where(count > 0, found, self.log_scale), (count > 0).long()

    @public_method
    def smallest_information(self, eta: Tensor) -> Tensor:
        r"""The Fisher information of each entry, :math:`1 / \sigma_d^2`, of the shape of ``eta``.

        The scale is the one that is used without data.
        """
        eta = as_eta(eta)
        return torch.ones_like(eta) / self._beside("log_scale", eta).exp().square()

    def natural_parameters(self, mean: Tensor) -> Tensor:
        r"""The natural parameters with this mean, which are the mean: :math:`\eta = m`, of the shape of ``mean``."""
        return as_mean(mean, -math.inf, math.inf)

    def _interior_mean(self, average: Tensor, num_data: int) -> Tensor:
        """The average itself: every number is a mean."""
        return average
