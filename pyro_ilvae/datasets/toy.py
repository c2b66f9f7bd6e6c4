"""A Gaussian mixture, and the best accuracy with which its components can be told apart."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.datasets._printing import names_and_shapes

__all__ = ["LabeledData", "gaussian_mixture", "gaussian_mixture_accuracy"]


class LabeledData(NamedTuple):
    """Data and their labels, on the default device."""

    x: Tensor  #: the data, float32 of shape (N, D)
    labels: Tensor  #: the label of each datum, int64 of shape (N,)

    def __repr__(self) -> str:
        return names_and_shapes(self)


def gaussian_mixture(
    num_data: int,
    scale: float,
    centers: Tensor | Sequence[Sequence[float]] = ((0, 0), (10, 10)),
    *,
    seed: int | None = 0,
) -> LabeledData:
    r"""Draws from an equal mixture of isotropic Gaussians.

    .. math:: c_n \sim \operatorname{Uniform}\{0, \dots, C - 1\}, \qquad x_n \sim N(m_{c_n}, \sigma^2 I).

    Args:
        num_data: the number :math:`N` of data.
        scale: the standard deviation :math:`\sigma` around each center.
        centers: the means :math:`m` of shape (C, D).
        seed: a seed for the draws; the global random state if None.

    Returns:
        The data of shape (N, D), and the component of each datum, of shape (N,).

    Raises:
        ValueError: for a number of data below 1, a scale that is not positive, and centers of another shape or with
            values that are not finite.
        TypeError: for centers that are neither a tensor nor an array nor nested lists.

    Example:
        >>> gaussian_mixture(1000, scale=0.1)
        LabeledData(x=float32 (1000, 2), labels=int64 (1000,))
        >>> x, labels = gaussian_mixture(1000, scale=0.1)
        >>> [x[labels == label].mean(0).round().int().tolist() for label in (0, 1)]
        [[0, 0], [10, 10]]
    """
    num_data, scale = _checks.positive_int("num_data", num_data), _checks.positive("scale", scale)
    means = _centers(centers).float()
    with seeded(seed):
        labels = torch.randint(len(means), (num_data,), device="cpu")
        noise = torch.randn(num_data, means.shape[1], dtype=torch.float32, device="cpu")
    # Drawn on the CPU, so that a seed gives the same data on all devices.
    device = torch.empty(0).device
    return LabeledData((means[labels] + noise * scale).to(device), labels.to(device))


def gaussian_mixture_accuracy(scale: float, centers: Tensor | Sequence[Sequence[float]] = ((0, 0), (10, 10))) -> float:
    r"""The expected accuracy of the Bayes classifier, the best there is, on :func:`gaussian_mixture` with two centers.

    .. math:: \Phi\left(\frac{\lVert m_1 - m_0 \rVert}{2 \sigma}\right),

    the probability that a datum and its own center lie on the same side of the hyperplane halfway between the centers.

    Args:
        scale: the standard deviation :math:`\sigma` around each center.
        centers: the two means :math:`m` of shape (2, D).

    Returns:
        The expected fraction of correct labels, in [0.5, 1].

    Raises:
        ValueError: for a scale that is not positive, and unless there are two centers with finite values.
        TypeError: for centers that are neither a tensor nor an array nor nested lists.

    References:
        Hastie, Tibshirani & Friedman 2009, The elements of statistical learning, section 4.3, for equal covariances

    Example:
        >>> round(gaussian_mixture_accuracy(scale=7.5), 3)
        0.827
    """
    scale = _checks.positive("scale", scale)
    means = _centers(centers)
    if len(means) != 2:
        raise ValueError(f"Expected centers of shape (2, D), got {tuple(means.shape)}")
    return NormalDist().cdf(float((means[1] - means[0]).norm()) / (2 * scale))


def _centers(centers: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """The centers in double precision, of shape (C, D)."""
    checked = _checks.tensor("centers", centers)
    if checked.is_complex():
        raise ValueError(f"Expected centers to be real, got {checked.dtype}")
    # From the numbers as they came, which single precision would round.
    values = checked.detach() if isinstance(centers, Tensor) else np.asarray(centers)
    means = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if means.dim() != 2 or means.numel() == 0:
        raise ValueError(f"Expected centers of shape (C, D) with C, D >= 1, got {tuple(means.shape)}")
    if not means.isfinite().all():
        raise ValueError(f"Expected centers to be finite, got {means.tolist()}")
    return means
