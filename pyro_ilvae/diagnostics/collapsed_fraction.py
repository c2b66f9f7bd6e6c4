"""The fraction of data whose posterior is within epsilon of the prior."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.arrays import check_divergences, check_finite

__all__ = ["CollapsedFraction", "collapsed_fraction"]


class CollapsedFraction(NamedTuple):
    """The fraction of data whose divergence is at most epsilon, as a curve over E epsilons."""

    epsilons: Tensor  #: the epsilons in nats, of shape (E,)
    fractions: Tensor  #: the fraction of data at each epsilon, in [0, 1], of shape (E, \*unit)
    standard_errors: Tensor  #: the standard errors of the fractions over the data, of shape (E, \*unit)

    def __repr__(self) -> str:
        ends = [
            f"{printing.number(self.fractions[i].mean(), self.standard_errors[i].mean())} "
            f"at {printing.number(self.epsilons[i])} nats"
            for i in (0, -1)
        ]
        return printing.described(self, " to ".join(ends), printing.sizes(self.fractions.shape, "epsilons"))


def collapsed_fraction(kl: Tensor, epsilons: Sequence[float] | Tensor | None = None) -> CollapsedFraction:
    r"""The fraction of data whose divergence is at most epsilon, as a curve over epsilon.

    .. math:: P_x(\mathrm{KL}(x) \le \epsilon).

    There is epsilon-posterior collapse [1] where this fraction is 1: every datum's divergence is at most epsilon.
    (epsilon, delta)-collapse [2] sets a threshold for the fraction of a single dimension.

    Args:
        kl: divergences in nats, of shape (N,) for each datum or (N, \*unit) for each of its dimensions, from
            :func:`~pyro_ilvae.diagnostics.kl_divergence` or :func:`~pyro_ilvae.diagnostics.kl_per_dimension`.
        epsilons: the points of the curve, in nats; if None, the divergences themselves for shape (N,), otherwise 50
            logarithmic steps from 0.001 to 10.

    Returns:
        The epsilons, the fractions of shape (len(epsilons), \*unit), and their standard errors over the data.

    Raises:
        TypeError: for divergences or epsilons that are no tensor and nothing that can be converted to one.
        ValueError: for no data, divergences that are NaN, and epsilons that are none or not finite.

    References:
        | [1] Kinoshita et al. 2023, https://arxiv.org/abs/2304.12770
        | [2] Lucas et al. 2019, Don't blame the ELBO!, https://arxiv.org/abs/1911.02469

    Example:
        >>> collapsed_fraction(torch.tensor([0.001, 0.5, 2.0, 3.0]), [0.01, 1.0]).fractions
        tensor([0.2500, 0.5000])
    """
    kl = check_divergences(kl, dim=1, shape="(N, ...)")
    finite = kl[kl.isfinite()]
    if epsilons is None and kl.dim() == 1 and len(finite):
        grid = finite.sort().values
    elif epsilons is None:
        grid = torch.logspace(-3, 1, 50, dtype=kl.dtype, device=kl.device)
    else:
        grid = _checks.tensor("epsilons", epsilons).to(kl).reshape(-1)
    check_finite("epsilons", grid)
    if len(grid) == 0:
        raise ValueError("Expected at least one of epsilons, got none")
    # One epsilon at a time, because all at once would take E times the memory of the divergences.
    fractions = torch.stack([(kl <= epsilon).to(kl.dtype).mean(0) for epsilon in grid])
    return CollapsedFraction(grid, fractions, (fractions * (1 - fractions) / len(kl)).sqrt())
