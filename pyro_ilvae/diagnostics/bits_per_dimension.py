"""The evidence of each datum: its ELBO and its importance-weighted log likelihood, and their per-part forms."""

import math

from torch import Tensor

from pyro_ilvae import _checks


def bits_per_dimension(log_likelihood: Tensor, num_dimensions: int) -> Tensor:
    r"""The code length of *discrete* data per dimension of a datum, in bits.

    .. math:: -\log_2 p(x) / D.

    For densities of continuous data it depends on their unit, and compares models on the same data only.

    Args:
        log_likelihood: log p(x) in nats, of any shape.
        num_dimensions: the number :math:`D` of dimensions of a datum.

    Example:
        >>> import math
        >>> import torch
        >>> bits_per_dimension(torch.tensor(-8 * math.log(2.0)), num_dimensions=8)
        tensor(1.)
    """
    return -log_likelihood / (_checks.positive_int("num_dimensions", num_dimensions) * math.log(2.0))
