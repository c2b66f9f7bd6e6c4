"""A warning for schedules that nobody steps."""

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from pyro_ilvae.infer.moving import MovingValue

__all__ = ["StepWatch"]

# Losses after which a schedule should have moved. Losses of the same tensors are an epoch each; otherwise a schedule
# may move once an epoch, and most epochs have fewer losses.
_MANY_EPOCHS = 100
_MANY_LOSSES = 1000


class StepWatch:
    """Warns once if many training losses have gone by and a schedule stands where it stood at the first of them."""

    def __init__(self, schedules: Iterable[MovingValue]) -> None:
        self.schedules = list(schedules)
        self._num_losses = 0
        self._first_steps: list[int] = []
        self._data: list[weakref.ref[Tensor]] = []
        self._one_batch = True

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.schedules,)  # weak references cannot be copied

    def count(self, *args: Any, **kwargs: Any) -> None:
        """Count a loss of a model that is called with these arguments."""
        if not self.schedules:
            return
        data = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if self._num_losses == 0:
            self._first_steps = [schedule.num_steps_taken for schedule in self.schedules]
            self._data = [weakref.ref(value) for value in data]
        # An argument that is another object than at the first loss may be a minibatch.
        self._one_batch = (
            self._one_batch
            and len(data) == len(args) + len(kwargs) == len(self._data)
            and all(first() is value for first, value in zip(self._data, data, strict=True))
        )
        self._num_losses += 1
        if self._num_losses == _MANY_LOSSES or (self._num_losses == _MANY_EPOCHS and self._one_batch):
            self._warn()

    def _warn(self) -> None:
        for schedule, first in zip(self.schedules, self._first_steps, strict=True):
            if schedule.num_steps_taken == first and schedule._moves_after(first, _MANY_LOSSES):
                warnings.warn(
                    f"After {self._num_losses} losses beta is still {schedule.value:g}, at step {first} of "
                    f"{schedule.name}: call its step() after each step of the optimizer, or after each epoch.",
                    stacklevel=7,
                )
        self.schedules = []
