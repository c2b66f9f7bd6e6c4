"""The latent dimensions whose posterior is the prior for almost all data."""

from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._engine.arrays import check_divergences

__all__ = ["collapsed_dimensions"]


def collapsed_dimensions(kl: Tensor, *, epsilon: float = 0.01, delta: float = 0.01) -> Tensor:
    r"""The dimensions that are (epsilon, delta)-collapsed, as booleans of shape (\*unit,).

    .. math:: P_x(\mathrm{KL}_j(x) < \epsilon) \ge 1 - \delta.

    Args:
        kl: divergences in nats for each datum and dimension, of shape (N, \*unit).
        epsilon: the divergence in nats below which a datum counts as collapsed.
        delta: the fraction of data that may lie above epsilon.

    Raises:
        TypeError: for divergences that are no tensor and nothing that can be converted to one.
        ValueError: for an epsilon or delta out of range, no data, and divergences that are NaN.

    References:
        Lucas et al. 2019, Don't blame the ELBO!, https://arxiv.org/abs/1911.02469

    Example:
        >>> import torch
        >>> collapsed_dimensions(torch.tensor([[0.001, 0.5], [0.002, 0.001]]))
        tensor([ True, False])
    """
    _checks.non_negative("epsilon", epsilon)
    _checks.fraction("delta", delta)
    kl = check_divergences(kl, dim=2, shape="(N, *unit)")
    # A count with a tolerance, because neither 1 - delta nor the product with N is exact in floating point.
    return (kl >= epsilon).sum(0) <= delta * len(kl) + 1e-6
