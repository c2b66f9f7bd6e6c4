"""The code length of discrete data per dimension."""

import math

import torch
from torch import Tensor

from pyro_ilvae import _checks

__all__ = ["bits_per_dimension"]


def bits_per_dimension(log_likelihood: Tensor, num_dimensions: int) -> Tensor:
    r"""The code length of *discrete* data per dimension of a datum, in bits.

    .. math:: -\log_2 p(x) / D.

    For continuous data, the number depends on the unit of the data and only compares models of the same data.

    Args:
        log_likelihood: log p(x) in nats, of any shape.
        num_dimensions: the number :math:`D` of dimensions of a datum.

    Returns:
        The code lengths in bits, of the shape of ``log_likelihood``.

    Raises:
        ValueError: for a ``num_dimensions`` that is no positive int, and log likelihoods that are NaN or +infinity.
        TypeError: for log likelihoods that are neither a tensor nor an array nor a number.

    Example:
        >>> import math
        >>> import torch
        >>> bits_per_dimension(torch.tensor(-8 * math.log(2.0)), num_dimensions=8)
        tensor(1.)
    """
    size = _checks.positive_int("num_dimensions", num_dimensions)
    nats = _checks.real(
        "log_likelihood", torch.tensor(log_likelihood) if isinstance(log_likelihood, float) else log_likelihood
    )
    if not (nats < math.inf).all():
        raise ValueError(f"Expected log_likelihood < infinity, got {nats[~(nats < math.inf)][0]}")
    return -nats / (size * math.log(2.0))
