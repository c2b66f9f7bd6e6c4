"""Measures of posterior collapse: active units, and the data or dimensions that are at the prior."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CollapsedFraction(NamedTuple):
    """The fraction of data at each epsilon, of shape (\\*len(epsilons), \\*unit), and its standard error."""

    epsilons: Tensor
    fractions: Tensor
    standard_errors: Tensor


def collapsed_fraction(kl: Tensor, epsilons: Sequence[float] | Tensor | None = None) -> CollapsedFraction:
    r"""The fraction of data whose divergence is at most epsilon, as a curve over epsilon.

    .. math:: P_x(\mathrm{KL}(x) \le \epsilon).

    epsilon-posterior collapse [1] is this fraction being 1: every datum's divergence is at most epsilon. For
    divergences per dimension it is what (epsilon, delta)-collapse [2] thresholds.

    Args:
        kl: divergences in nats, of shape (N,) for each datum or (N, \*unit) for each of its dimensions, from
            :func:`~pyro_ilvae.diagnostics.kl_divergence` or :func:`~pyro_ilvae.diagnostics.kl_per_dimension`.
        epsilons: where to take the curve, in nats; if None, at the divergences themselves for shape (N,), otherwise at
            50 logarithmic steps from 0.001 to 10.

    Returns:
        The epsilons, the fractions of shape (len(epsilons), \*unit), and their standard errors over the data.

    Raises:
        ValueError: for divergences that are NaN, or epsilons that are not finite.

    References:
        | [1] Kinoshita et al. 2023, https://arxiv.org/abs/2304.12770
        | [2] Lucas et al. 2019, Don't blame the ELBO!, https://arxiv.org/abs/1911.02469

    Example:
        >>> collapsed_fraction(torch.tensor([0.001, 0.5, 2.0, 3.0]), [0.01, 1.0]).fractions
        tensor([0.2500, 0.5000])
    """
    if kl.dim() < 1 or len(kl) == 0 or kl.isnan().any():
        raise ValueError(f"Expected kl of shape (N, ...) with N >= 1 and no NaN, got shape {tuple(kl.shape)}")
    finite = kl[kl.isfinite()]
    if epsilons is None and kl.dim() == 1 and len(finite):
        grid = finite.sort().values
    elif epsilons is None:
        grid = torch.logspace(-3, 1, 50, dtype=kl.dtype, device=kl.device)
    else:
        grid = torch.as_tensor(epsilons, dtype=kl.dtype, device=kl.device).reshape(-1)
    if not grid.isfinite().all():
        raise ValueError("Expected finite epsilons, got NaN or infinity")
    # One epsilon at a time: all at once would take len(epsilons) times the memory of the divergences.
    fractions = torch.stack([(kl <= epsilon).to(kl.dtype).mean(0) for epsilon in grid])
    return CollapsedFraction(grid, fractions, (fractions * (1 - fractions) / len(kl)).sqrt())
