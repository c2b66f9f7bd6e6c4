"""Which components of a mixture lie on top of each other."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.arrays import check_finite
from pyro_ilvae.diagnostics._engine.assignments import float_dtype, numbers

__all__ = ["CoincidingComponents", "coinciding_components"]


class CoincidingComponents(NamedTuple):
    """The overlap of each pair of components, and the groups of components that overlap by more than a threshold."""

    overlap: Tensor  #: Bhattacharyya coefficients in [0, 1], of shape (C, C), 1 on the diagonal
    groups: tuple[tuple[int, ...], ...]  #: the indices of two or more coinciding components in each disjoint group

    def __repr__(self) -> str:
        largest = (self.overlap - self.overlap.diag().diag()).max()
        return printing.described(
            self,
            f"{sum(map(len, self.groups))} of {len(self.overlap)} components coincide",
            f"largest overlap {printing.number(largest)}",
        )


def coinciding_components(
    loc: Tensor | npt.ArrayLike,
    scale: Tensor | npt.ArrayLike,
    *,
    threshold: float = 0.9,
) -> CoincidingComponents:
    r"""The Gaussian components that lie on top of each other, by their Bhattacharyya coefficients.

    .. math:: B_{ij} = \int \sqrt{N(z; m_i, s_i^2)\, N(z; m_j, s_j^2)} \, dz = \prod_k \sqrt{\frac{2 s_{ik} s_{jk}}
        {s_{ik}^2 + s_{jk}^2}} \exp\left( -\frac{(m_{ik} - m_{jk})^2}{4 (s_{ik}^2 + s_{jk}^2)} \right).

    The coefficient is 1 if and only if the two components are the same. The best guess at which of two equally probable
    components a z was drawn from is wrong with a probability between :math:`\tfrac12 (1 - \sqrt{1 - B_{ij}^2})` and
    :math:`\tfrac12 B_{ij}` [1]. Above the default threshold this probability is at least 0.28, and a guess without z
    has 0.5: z says little about its component. Components with one scale in all dimensions then have means less than
    0.92 scales apart.

    Components are in one group if a chain of coinciding pairs connects them. The ends of a long chain may differ, as
    ``overlap`` shows.

    Args:
        loc: the means :math:`m`, of shape (C, K); ``component_loc`` of a :class:`~pyro_ilvae.MixtureVAE`.
        scale: the standard deviations :math:`s`, of shape (C, K); ``component_log_scale.exp()`` of a
            :class:`~pyro_ilvae.MixtureVAE`.
        threshold: the coefficient in [0, 1] above which two components coincide.

    Returns:
        The coefficients, of shape (C, C), and the groups of coinciding components, each in ascending order.

    Raises:
        ValueError: for other or different shapes, means that are not finite, standard deviations that are not finite
            and positive, and a threshold out of range.

    References:
        [1] Kailath 1967, The divergence and Bhattacharyya distance measures in signal selection, IEEE Transactions on
        Communication Technology 15

    Example:
        >>> result = coinciding_components(torch.tensor([[0.0], [5.0], [0.1]]), torch.ones(3, 1))
        >>> result.groups, result.overlap[0]
        (((0, 2),), tensor([1.0000, 0.0439, 0.9988]))
    """
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    _checks.fraction("threshold", threshold)
    means, deviations = numbers("loc", loc), numbers("scale", scale)
    if means.dim() != 2 or means.numel() == 0:
        raise ValueError(f"Expected loc of shape (C, K), got {tuple(means.shape)}")
    if deviations.shape != means.shape:
        raise ValueError(f"Expected scale of the shape {tuple(means.shape)} of loc, got {tuple(deviations.shape)}")
    check_finite("loc", means)
    others = deviations[~(deviations.isfinite() & (deviations > 0))]
    if len(others):
        raise ValueError(f"Expected scale to be finite and > 0, got {others[0].item()}")
    deviations = deviations.to(means.device)
    # One row at a time, because all rows at once would take C times the memory.
    rows = [_log_overlap(mean, deviation, means, deviations) for mean, deviation in zip(means, deviations, strict=True)]
    overlap = torch.stack(rows).exp()
    _, labels = connected_components((overlap > threshold).numpy(force=True), directed=False)
    groups = [tuple(np.flatnonzero(labels == label).tolist()) for label in range(labels.max() + 1)]
    return CoincidingComponents(overlap.to(float_dtype(loc)), tuple(group for group in groups if len(group) > 1))


def _log_overlap(mean: Tensor, deviation: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
    """Log Bhattacharyya coefficients of one component with all, of shape (C,)."""
    # 2 s t / (s^2 + t^2) = 1 / cosh(log s - log t), which squares nothing that could overflow.
    ratio = deviation.log() - deviations.log()
    log_cosh = torch.logaddexp(ratio, -ratio) - math.log(2)
    distance = (mean - means) / torch.hypot(deviation, deviations)
    return -(0.5 * log_cosh + 0.25 * distance.square()).sum(1).clamp(min=0)
