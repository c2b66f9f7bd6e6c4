"""The mean of the losses of several steps."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks

_MOST_KEPT = 1000  # losses that wait to be read


class Losses:
    """The mean of losses, which are numbers or tensors of one number, on any device.

    Tensors are kept and read later and together, because each reading waits for the device.
    """

    def __init__(self) -> None:
        self._kept: list[float | Tensor] = []
        self._total, self._num_losses, self._num_non_finite = 0.0, 0, 0

    def add(self, loss: Any) -> None:
        """Add the loss of a step."""
        if isinstance(loss, Tensor):
            if loss.numel() != 1 or loss.is_complex():
                raise ValueError(f"Expected loss to be one real number, got {loss.dtype} of shape {tuple(loss.shape)}")
            self._kept.append(loss.detach().reshape(()))
        else:
            try:
                self._kept.append(float(loss))
            except (TypeError, ValueError) as error:
                raise TypeError(f"Expected loss to be a number, got a {type(loss).__name__}") from error
        if len(self._kept) >= _MOST_KEPT:
            self._read()

    def take(self) -> tuple[float | None, int]:
        """The mean of all losses since the last time, None without any, and how many of them are not finite."""
        self._read()
        mean = self._total / self._num_losses if self._num_losses else None
        result = mean, self._num_non_finite
        self._total, self._num_losses, self._num_non_finite = 0.0, 0, 0
        return result

    def state_dict(self) -> dict[str, Any]:
        """The losses so far, as numbers."""
        self._read()
        return {"total": self._total, "num_losses": self._num_losses, "num_non_finite": self._num_non_finite}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to saved losses."""
        if not isinstance(state, Mapping) or not self.state_dict().keys() <= state.keys():
            raise ValueError(
                f"Expected state['losses'] to be a dictionary with {list(self.state_dict())}, got {state!r}"
            )
        total = state["total"]
        if isinstance(total, bool) or not isinstance(total, int | float):  # it may be infinite, or none
            raise ValueError(f"Expected state['losses']['total'] to be a number, got {total!r}")
        counts = [
            _checks.positive_int(f"state['losses']['{name}']", state[name], at_least=0)
            for name in ("num_losses", "num_non_finite")
        ]
        self._kept, self._total = [], float(total)
        self._num_losses, self._num_non_finite = counts

    def _read(self) -> None:
        kept, self._kept = self._kept, []
        tensors = [loss for loss in kept if isinstance(loss, Tensor)]
        together = len(tensors) == len(kept) > 1 and len({(loss.device, loss.dtype) for loss in tensors}) == 1
        values = torch.stack(tensors).tolist() if together else map(float, kept)
        # One after the other, so that the sum is the same whenever the losses are read.
        for value in values:
            self._total += value
            self._num_losses += 1
            self._num_non_finite += not math.isfinite(value)
