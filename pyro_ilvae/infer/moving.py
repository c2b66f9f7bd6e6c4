"""Numbers that a training loop moves, such as the weight of the KL divergence."""

from abc import ABC, abstractmethod

__all__ = ["MovingValue"]


class MovingValue(ABC):
    """A number with a current value, which changes when the training loop says so and at no other time."""

    name: str
    num_steps_taken: int
    # The values that all others lie between, where they are known.
    _ends: tuple[float, ...] = ()

    @property
    @abstractmethod
    def value(self) -> float:
        """The value at the current step."""

    @property
    def _shown(self) -> float:
        """The value for those who only show it, and compute nothing from it."""
        return self.value

    @abstractmethod
    def _moves_after(self, step: int, num_steps: int) -> bool:
        """Whether so many steps after a step would change the value."""
