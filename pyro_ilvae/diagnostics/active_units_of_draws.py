"""Measures of posterior collapse: active units, and the data or dimensions that are at the prior."""

from torch import Tensor

from pyro_ilvae.diagnostics.active_units import ActiveUnits, _active_units


def active_units_of_draws(draws: Tensor, *, threshold: float = 0.01) -> ActiveUnits:
    r"""The latent dimensions whose posterior mean moves with the data, from posterior draws of MCMC or of a guide.

    .. math:: A_j = \operatorname{Var}_n(\bar z_{nj}) - \tfrac{1}{N} \sum_n \widehat{\operatorname{Var}}(\bar z_{nj}),
        \qquad \bar z_n = \tfrac{1}{S} \sum_s z_{sn}.

    The second term takes out what the sampling of each mean adds, as if draws were independent; correlated chains leave
    some of it in, so that :math:`A_j` is then too large.

    Args:
        draws: draws of one site, of shape (S, N, \*event shape) with at least two data, as in
            ``mcmc.get_samples()["z"]``.
        threshold: the variance above which a unit counts as active.

    Returns:
        As :func:`active_units`.

    Raises:
        ValueError: for fewer than two data, draws that are not finite, or a negative threshold.

    Example:
        >>> import torch
        >>> draws = torch.randn(2000, 50, 2) + torch.randn(50, 2) * torch.tensor([1.0, 0.0])
        >>> active_units_of_draws(draws).active.tolist()
        [True, False]
    """
    if draws.dim() < 2:
        raise ValueError(f"Expected draws of shape (S, N, *event shape), got {tuple(draws.shape)}")
    if not draws.isfinite().all():
        raise ValueError("Expected finite draws, got NaN or infinity")
    sampling = draws.var(0).mean(0) / len(draws) if len(draws) > 1 else 0.0
    return _active_units(draws.mean(0), threshold, sampling)
