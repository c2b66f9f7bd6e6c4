"""What controllers share: a measure, its running mean, moves every so many steps, and a freeze at the end."""

import math
import sys
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.control.measures import Measure
from pyro_ilvae.infer.moving import MovingValue

__all__ = ["Controller", "checked_bounds"]

_PACKAGE = f"{__name__.partition('.')[0]}."

_CLOSE = 0.1  # an estimate as close to its target, relative to it, is on target
_SMALLEST_BOUND = 1e-300  # parts of it are still numbers above 0
_STATE = ("kind", "value", "num_steps_taken", "frozen", "frozen_at", "mean", "weight", "law", "shape")


class Controller(MovingValue):
    r"""A number that moves until a measure of training batches is on target, and then stays where it is.

    The running mean of the measure is updated every ``every`` steps,

    .. math:: \bar m \leftarrow (1 - \tfrac{1}{M}) \bar m + \tfrac{1}{M} m(\text{batch}),

    and the number moves after each update until ``num_steps`` steps have been taken. It is then frozen, at its mean
    over the last moves where the estimate was near its target; training goes on with this number. A warning says so if
    the controller is deleted, or the process ends, before it froze, and if it froze far from its target.

    This class is for annotations: users make one of :class:`InverseLipschitzController`, :class:`NatsController`,
    :class:`BetaController`, :class:`GECO` and :class:`PIController`.
    """

    _symbol: str

    def __init__(
        self,
        measure: Measure | Callable[..., Any],
        target: float,
        *,
        num_steps: int | None,
        every: int,
        bounds: tuple[float, float],
        window: int,
        at_least: bool,
        planned_steps: int | None,
        start: float,
    ) -> None:
        if not isinstance(measure, Measure):
            _checks.function("measure", measure, "a Measure, such as measures.smallest_kl(model, guide), or a function")
            measure = Measure(measure, name=getattr(measure, "__name__", type(measure).__name__), unit="")
        self.measure = measure
        self.target = target
        self.num_steps = None if num_steps is None else _checks.positive_int("num_steps", num_steps)
        self.every = _checks.positive_int("every", every)
        if self.num_steps is not None and self.num_steps < self.every:
            raise ValueError(f"Expected num_steps >= every, got num_steps={num_steps} and every={every}")
        self.window = _checks.positive_int("window", window)
        self.at_least = _checks.boolean("at_least", at_least)
        self.bounds = checked_bounds(bounds)
        self._ends = self.bounds
        low, high = self.bounds
        if not low <= start <= high:
            raise ValueError(f"Expected bounds with the value at the start, {start:g}, in between, got {bounds}")
        self._value = start
        self.num_steps_taken = 0
        self.frozen, self._frozen_at = False, 0
        self._mean: Tensor | None = None
        self._weight = 0.0
        self.name = type(self).__name__
        if planned_steps is not None:
            _checks.positive_int("planned_steps", planned_steps)
            if self.num_steps is not None and self.num_steps > planned_steps:
                warnings.warn(
                    f"{self.name} freezes after {num_steps} steps and the training has {planned_steps}: "
                    f"{self._symbol} will still be moving at its end.",
                    stacklevel=_stacklevel(),
                )
        self._watch()

    def __repr__(self) -> str:
        estimate = "not measured yet" if self.estimate is None else f"{self.estimate:.4g}"
        unit = f" {self.measure.unit}" if self.measure.unit else ""
        of_steps = "" if self.num_steps is None else f" of {self.num_steps}"
        state = f"frozen at step {self._frozen_at}" if self.frozen else f"at step {self.num_steps_taken}{of_steps}"
        return (
            f"{self.name}({self.measure.name} {estimate} for {self._side()}{self.target:g}{unit}) {state}: "
            f"{self._symbol} = {self.value:.4g}"
        )

    def _side(self) -> str:
        """On which side of the target the measure may be, in words."""
        if not self.at_least:
            return ""
        return "at least " if self.measure.rises else "at most "

    @property
    def value(self) -> float:
        """The number that is moved, as it is now."""
        return self._value

    @property
    def estimate(self) -> float | None:
        """The measure at its running mean when it was last measured, which is not after the freeze; None before."""
        return None if self._mean is None else self.measure.estimate(self._mean)

    @property
    def on_target(self) -> bool:
        """Whether the estimate is within a tenth of the target, or beyond it on the side that ``at_least`` allows."""
        estimate = self.estimate
        if estimate is None:
            return False
        beyond = estimate >= self.target if self.measure.rises else estimate <= self.target
        return (self.at_least and beyond) or abs(estimate - self.target) <= _CLOSE * abs(self.target)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Take note of a step of training, and measure and move if it is time to.

        Args:
            *args: the arguments of the step of SVI before, which the measure takes.
            **kwargs: their named arguments.

        Raises:
            ValueError: for a measure that is not finite.
        """
        self.num_steps_taken += 1
        if self.frozen:
            return
        if self.num_steps_taken % self.every == 0:
            with seeded(self.num_steps_taken):
                self._follow(self.measure(*args, **kwargs))
            self._set(self._clipped(self._moved(self.estimate)))  # type: ignore[arg-type]
        if self.num_steps is not None and self.num_steps_taken >= self.num_steps:
            self.freeze()

    def freeze(self) -> float:
        """End all moves, with a warning if the estimate is far from its target.

        Returns:
            the value from now on.
        """
        if not self.frozen:
            self._set(self._clipped(self._settled()))
            self.frozen, self._frozen_at = True, self.num_steps_taken
            self._watched["moving"] = False
            if not self.on_target:
                warnings.warn(f"{self.name} froze off target: {self!r}{self._why()}.", stacklevel=_stacklevel())
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: numbers, lists and booleans."""
        return {
            "kind": self.name,
            "value": self._value,
            "num_steps_taken": self.num_steps_taken,
            "frozen": self.frozen,
            "frozen_at": self._frozen_at,
            "mean": None if self._mean is None else self._mean.flatten().tolist(),
            "shape": None if self._mean is None else list(self._mean.shape),
            "weight": self._weight,
            "law": self._law_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to a saved state, and set the value."""
        missing = sorted(set(_STATE) - set(state)) if isinstance(state, Mapping) else _STATE
        if missing:
            raise ValueError(f"Expected state to be the state_dict() of a {self.name}, got none of {missing}")
        if state["kind"] != self.name:
            raise ValueError(f"Expected state of a {self.name}, got one of a {state['kind']}")
        value = _checks.finite("state['value']", state["value"])
        low, high = self.bounds
        if not low <= value <= high:
            raise ValueError(f"Expected state['value'] within the bounds {self.bounds}, got {value:g}")
        steps = _checks.positive_int("state['num_steps_taken']", state["num_steps_taken"], at_least=0)
        weight = _checks.non_negative("state['weight']", state["weight"])
        frozen = _checks.boolean("state['frozen']", state["frozen"])
        frozen_at = _checks.positive_int("state['frozen_at']", state["frozen_at"], at_least=0)
        mean = _checked_mean(state["mean"], state["shape"])
        # The last that may raise: a state that is none changes nothing.
        self._load_law_state(state["law"])
        self._mean, self._weight, self.num_steps_taken = mean, weight, steps
        self.frozen, self._frozen_at = frozen, frozen_at
        self._set(value)
        self._watched["moving"] = self._has_to_freeze

    @abstractmethod
    def _moved(self, estimate: float) -> float:
        """The next value at an estimate."""

    def _settled(self) -> float:
        """The value to freeze at."""
        return self._value

    @abstractmethod
    def _law_state(self) -> dict[str, Any]:
        """What the law of motion remembers."""

    @abstractmethod
    def _load_law_state(self, state: Mapping[str, Any]) -> None:
        """Return to what the law of motion remembered."""

    def _set(self, value: float) -> None:
        self._value = value
        self._watched["text"] = self._last_words()

    def _clipped(self, value: float) -> float:
        low, high = self.bounds
        return min(max(value, low), high)

    def _why(self) -> str:
        for end, value in zip(("lower", "upper"), self.bounds, strict=True):
            if math.isclose(self._value, value, rel_tol=1e-6):
                return f", at its {end} bound"
        return ""

    def _follow(self, measured: Tensor) -> None:
        if self._mean is not None and measured.shape != self._mean.shape:
            raise ValueError(
                f"Expected the measure '{self.measure.name}' to have the shape {tuple(self._mean.shape)} of the batch "
                f"before, got {tuple(measured.shape)}"
            )
        # The weights of all batches add up to 1 from the first batch on.
        self._weight = 1.0 + (1.0 - 1.0 / self.window) * self._weight
        mean = measured if self._mean is None else self._mean + (measured - self._mean) / self._weight
        self._mean = mean

    def _moves_after(self, step: int, num_steps: int) -> bool:
        return not self.frozen and num_steps >= self.every

    def _last_words(self) -> str:
        steps = "" if self.num_steps is None else f" of {self.num_steps}"
        return (
            f"Training ended before {self.name} froze, at step {self.num_steps_taken}{steps}: {self._symbol} = "
            f"{self._value:.4g} was still moving. Call its freeze(), or give it a smaller num_steps."
        )

    @property
    def _has_to_freeze(self) -> bool:
        """Whether the value is still to be fixed; without a number of steps it moves as long as the training goes."""
        return not self.frozen and self.num_steps is not None

    def _watch(self) -> None:
        """Warn where the controller goes away while its value is still to be fixed."""
        self._watched: dict[str, Any] = {"moving": self._has_to_freeze, "text": ""}
        weakref.finalize(self, _warn_of_end, self._watched)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_watched"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._watch()


def _warn_of_end(watched: Mapping[str, Any]) -> None:
    if watched["moving"] and watched["text"]:
        warnings.warn(watched["text"], stacklevel=2)


def _stacklevel() -> int:
    """The level of the first caller outside of this package, whom a warning is for."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level


def _checked_mean(mean: Any, shape: Any) -> Tensor | None:
    """A running mean from a state."""
    if mean is None:
        return None
    if not isinstance(mean, list | tuple):
        raise ValueError(f"Expected state['mean'] to be a list of numbers or None, got {mean!r}")
    values = torch.tensor([_checks.finite("state['mean']", value) for value in mean], dtype=torch.float64)
    whole = isinstance(shape, list | tuple) and all(_checks.is_int(size) and size >= 0 for size in shape)
    if not whole or math.prod(shape) != len(values):
        raise ValueError(f"Expected state['shape'] to be the shape of {len(values)} numbers, got {shape!r}")
    return values.reshape(tuple(shape))


def checked_bounds(bounds: Any) -> tuple[float, float]:
    """Return ``bounds`` as two numbers, or raise."""
    try:
        low, high = bounds
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected bounds to be a pair of numbers, got {bounds!r}") from error
    low, high = _checks.non_negative("bounds[0]", low), _checks.positive("bounds[1]", high)
    if not low < high:
        raise ValueError(f"Expected bounds[0] < bounds[1], got {bounds!r}")
    if high < _SMALLEST_BOUND:
        raise ValueError(f"Expected bounds[1] >= {_SMALLEST_BOUND:g}, got {high:g}")
    return low, high
