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
    """The prior of a component that some data have a known one of: 0 for all others.

    Only ``log_prob`` and draws know of the labels. The density is not normalized: it is the probability of the known
    component by the logits, and not 1. ``probs`` and what follows from them are the prior of a datum without a label.

    Args:
        logits: the logits of the components, of shape (..., C).
        labels: the known component of each datum, of shape (N,), or -1.
    """

    arg_constraints = dist.Categorical.arg_constraints

    def __init__(self, logits: Tensor, labels: Tensor, validate_args: bool | None = None) -> None:
        self.labels = labels
        batch_shape = torch.broadcast_shapes(logits.shape[:-1], labels.shape)
        super().__init__(logits=logits.expand(*batch_shape, logits.shape[-1]), validate_args=validate_args)

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
        raise ValueError(f"Expected y to hold ints, the labels of site 'y', got {labels.dtype}")
    if labels.shape != (num_data,):
        raise ValueError(
            f"Expected y of shape ({num_data},), a label of site 'y' for each datum, got {tuple(labels.shape)}"
        )
    labels = labels.to(like.device, torch.int64)
    if ((labels < -1) | (labels >= num_components)).any():
        raise ValueError(
            f"Expected y to hold labels of site 'y' from 0 to {num_components - 1}, or -1 where there is none, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    return labels
