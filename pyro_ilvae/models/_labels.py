"""Components that are known for a part of the data."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ilvae import _checks

# The log of 0 as a number, so that 0 times it is 0 and not NaN.
_LOG_OF_ZERO = -1e20
# The log of a probability that changes no sum, but is not 0: Pyro takes terms with probability 0 out of an expectation,
# and the number of these terms is no constant of a graph.
_LOG_OF_TINY = -80.0


class LabelledCategorical(dist.Categorical):
    """A component of which some data have a known one: the probability of the component, or 0 if another is known.

    Args:
        logits: the logits of the components, of shape (C,) or (N, C).
        labels: the known component of each datum, of shape (N,), or -1.
    """

    arg_constraints = dist.Categorical.arg_constraints

    def __init__(self, logits: Tensor, labels: Tensor, validate_args: bool | None = None) -> None:
        self.labels = labels
        super().__init__(logits=logits.expand(*labels.shape, logits.shape[-1]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(LabelledCategorical, _instance)
        new.labels = self.labels
        return super().expand(batch_shape, _instance=new)

    def log_prob(self, value: Tensor) -> Tensor:
        other = (self.labels >= 0) & (value != self.labels)
        return torch.where(other, _LOG_OF_ZERO, super().log_prob(value))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        drawn: Tensor = super().sample(sample_shape)
        return torch.where(self.labels >= 0, self.labels, drawn)


def known(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Logits of shape (N, C) of the components, where a known one has the probability 1 up to rounding."""
    if labels is None:
        return logits
    labels = labels.unsqueeze(-1)
    others = torch.arange(logits.shape[-1], device=labels.device) != labels
    return torch.where(labels >= 0, others * _LOG_OF_TINY, logits)


def checked_labels(y: Any, num_data: int, num_components: int, like: Tensor) -> Tensor | None:
    """Labels as int64 of shape (N,) on the device of ``like``; None if there are none."""
    if y is None:
        return None
    labels = _checks.tensor("y", y)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"Expected y, labels for site 'y', to hold ints, got {labels.dtype}")
    if labels.shape != (num_data,):
        raise ValueError(
            f"Expected y, labels for site 'y', of shape ({num_data},), one for each datum, got {tuple(labels.shape)}"
        )
    labels = labels.to(like.device, torch.int64)
    if ((labels < -1) | (labels >= num_components)).any():
        raise ValueError(
            f"Expected y, labels for site 'y', from 0 to {num_components - 1}, or -1 where the component is unknown, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return labels
