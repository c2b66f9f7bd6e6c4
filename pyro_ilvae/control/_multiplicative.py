"""A controller that moves a number until a positive measure is on target."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from pyro_ilvae import _checks
from pyro_ilvae.control._law import LogLaw
from pyro_ilvae.control.controller import Controller
from pyro_ilvae.control.measures import Measure

__all__ = ["MultiplicativeController"]


class MultiplicativeController(Controller):
    """Moves the position of a number, such as its logarithm, by the logarithm of target over estimate."""

    # Whether a larger number means more information in the latent variable.
    _more_information: bool

    def __init__(
        self,
        measure: Measure | Callable[..., Any],
        target: float,
        *,
        start: float,
        num_steps: int,
        every: int,
        bounds: tuple[float, float],
        tolerance: float,
        window: int,
        at_least: bool,
        planned_steps: int | None,
    ) -> None:
        super().__init__(
            measure,
            _checks.positive("target", target),
            num_steps=num_steps,
            every=every,
            bounds=bounds,
            window=window,
            at_least=at_least,
            planned_steps=planned_steps,
            start=start,
        )
        self.tolerance = _checks.positive("tolerance", _checks.fraction("tolerance", tolerance))
        self._direction = 1.0 if self._more_information == self.measure.rises else -1.0
        self._law = LogLaw(num_steps // every, math.log1p(tolerance))
        self._position = self._position_of(start)

    @abstractmethod
    def _position_of(self, value: float) -> float:
        """The position of a value within the bounds."""

    @abstractmethod
    def _value_at(self, position: float) -> float:
        """The value at a position, which lies between the positions of the bounds."""

    @property
    def _lowest(self) -> float:
        """The lowest position."""
        return self._position_of(self.bounds[0])

    def _moved(self, estimate: float) -> float:
        goal = self.target
        if self.at_least:  # a little more, so that the measure does not rest below
            goal *= (1.0 + 2.0 * self.tolerance) ** (1 if self.measure.rises else -1)
        # An estimate of 0 or below, as noise may give it, is far too small.
        error = math.log(goal) - math.log(estimate) if estimate > goal * 1e-6 else math.log(1e6)
        change = self._direction * self._law.change(error)
        self._position = min(max(self._position + change, self._lowest), self._position_of(self.bounds[1]))
        self._law.remember(self._position)
        return self._value_at(self._position) if change else self._value

    def _settled(self) -> float:
        if self._law.recent:
            self._position = math.fsum(self._law.recent) / len(self._law.recent)
        return self._value_at(self._position)

    def _law_state(self) -> dict[str, Any]:
        return {"position": self._position, **self._law.state()}

    def _load_law_state(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or "position" not in state:
            raise ValueError(f"Expected state['law'] with a position, got {state!r}")
        position = _checks.finite("state['law']['position']", state["position"])
        self._law.load(state)
        self._position = position
