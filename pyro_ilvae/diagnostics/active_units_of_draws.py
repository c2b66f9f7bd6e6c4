"""Active units from posterior draws."""

from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._engine.arrays import check_finite
from pyro_ilvae.diagnostics.active_units import ActiveUnits, variances_over_data

__all__ = ["active_units_of_draws"]


def active_units_of_draws(draws: Tensor, *, threshold: float = 0.01) -> ActiveUnits:
    r"""The latent dimensions whose posterior mean moves with the data, from posterior draws of MCMC or of a guide.

    .. math:: A_j = \operatorname{Var}_n(\bar z_{nj}) - \tfrac{1}{N} \sum_n \widehat{\operatorname{Var}}(\bar z_{nj}),
        \qquad \bar z_n = \tfrac{1}{S} \sum_s z_{sn}.

    The second term subtracts what the sampling of each mean adds if draws are independent. The draws of a chain are
    correlated: the term is then too small and :math:`A_j` too large.

    Args:
        draws: draws of one site, of shape (S, N, \*event shape) with at least two data, as in
            ``mcmc.get_samples()["z"]``.
        threshold: the variance above which a unit counts as active.

    Returns:
        What :func:`~pyro_ilvae.diagnostics.active_units` returns.

    Raises:
        ValueError: for fewer than two data, draws that are not finite, or a negative threshold.

    Example:
        >>> import torch
        >>> draws = torch.randn(2000, 50, 2) + torch.randn(50, 2) * torch.tensor([1.0, 0.0])
        >>> active_units_of_draws(draws).active.tolist()
        [True, False]
    """
    draws = _checks.tensor("draws", draws)
    if not draws.is_floating_point():
        raise ValueError(f"Expected draws of floating point, got {draws.dtype}")
    if draws.dim() < 2 or len(draws) == 0:
        raise ValueError(f"Expected draws of shape (S, N, *event shape), got {tuple(draws.shape)}")
    check_finite("draws", draws)
    sampling = draws.var(0).mean(0) / len(draws) if len(draws) > 1 else 0.0
    return variances_over_data(draws.mean(0), threshold, sampling)
