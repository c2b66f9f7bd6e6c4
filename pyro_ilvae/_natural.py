"""What the distributions of one natural parameter share."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_ilvae import _checks


class Natural(TorchDistribution):
    """A univariate distribution with a single parameter ``eta``."""

    arg_constraints = {"eta": constraints.real}  # noqa: RUF012 - PyTorch's name and form

    def __init__(self, eta: Tensor, validate_args: bool | None = None) -> None:
        self.eta = eta = _checks.tensor("eta", eta)
        super().__init__(eta.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        new.eta = self.eta.expand(batch_shape)
        super(Natural, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new
