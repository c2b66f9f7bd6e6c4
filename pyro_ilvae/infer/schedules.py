"""Schedules: pure functions of the step, with a position that the training loop moves and a checkpoint saves."""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial

from pyro_ilvae import _checks
from pyro_ilvae.infer.moving import MovingValue

__all__ = ["Schedule", "constant", "cosine", "cyclical", "exponential", "linear"]


def __dir__() -> list[str]:
    return __all__


class Schedule(MovingValue):
    r"""A pure function of the step, together with the current step.

    Only :meth:`step` moves the schedule: evaluating a loss never does.

    Args:
        function: a function from a step 0, 1, 2, ... to the value at that step. If the function can be pickled, the
            schedule can.
        name: the schedule's name for ``print``; the name of the function if None.

    Raises:
        ValueError: where the function's value at a step is not a finite number; step 0 is tried at once.
        TypeError: for a ``function`` that is none.

    Example:
        >>> beta = linear(0.0, 1.0, num_steps=4)
        >>> [beta.at(step) for step in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
        >>> beta.step()
        >>> beta
        linear(0.0, 1.0, num_steps=4) at step 1: 0.25
        >>> beta.value, beta.state_dict()
        (0.25, {'num_steps_taken': 1})
    """

    # Unlike the position, the number of calls of step() is nothing that a checkpoint restores.
    _num_calls = 0

    def __init__(self, function: Callable[[int], float], *, name: str | None = None) -> None:
        _checks.function("function", function, "a function from a step to a number")
        self.function = _checks.takes("function", function, "a step")
        self.name = f"Schedule({getattr(function, '__name__', function)})" if name is None else name
        self.num_steps_taken = 0
        self.at(0)

    def __repr__(self) -> str:
        return f"{self.name} at step {self.num_steps_taken}: {self.value:g}"

    def at(self, step: int) -> float:
        """The value at any step; the current step does not matter."""
        step = _checks.positive_int("step", step, at_least=0)
        return _checks.finite(f"the value of {self.name} at step {step}", self.function(step))

    @property
    def value(self) -> float:
        """The value at the current step."""
        return self.at(self.num_steps_taken)

    def _moves_after(self, step: int, num_steps: int) -> bool:
        return self.at(step + num_steps) != self.at(step)

    def step(self) -> None:
        """Move to the next step."""
        self.num_steps_taken += 1
        self._num_calls += 1

    def state_dict(self) -> dict[str, int]:
        """The position, for a checkpoint."""
        return {"num_steps_taken": self.num_steps_taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Return to a saved position."""
        if not isinstance(state, Mapping) or "num_steps_taken" not in state:
            raise ValueError(f"Expected state to be a dictionary with num_steps_taken, got {state!r}")
        self.num_steps_taken = _checks.positive_int("num_steps_taken", state["num_steps_taken"], at_least=0)


def constant(value: float) -> Schedule:
    """The same value at every step.

    Args:
        value: the value.

    Example:
        >>> constant(0.5).at(1000)
        0.5
    """
    value = _checks.finite("value", value)
    function = partial(_ramp, start=value, end=value, num_steps=1, shape=_linear)
    return Schedule(function, name=f"constant({value})")


def linear(start: float, end: float, num_steps: int, *, planned_steps: int | None = None) -> Schedule:
    r"""A straight line from the start value to the end value, and the end value afterwards.

    .. math:: v(t) = v_0 + (v_1 - v_0) p, \qquad p = \min(t / T, 1).

    Args:
        start: the value :math:`v_0` at step 0.
        end: the value :math:`v_1` from step :math:`T` on.
        num_steps: the number :math:`T` of steps.
        planned_steps: the number of steps of the training, if known: a schedule that takes more steps warns, because
            the training never reaches its end value.

    Example:
        >>> linear(1.0, 0.0, num_steps=2).at(1)
        0.5
    """
    return _build("linear", _linear, start, end, num_steps, planned_steps)


def cosine(start: float, end: float, num_steps: int, *, planned_steps: int | None = None) -> Schedule:
    r"""Half a cosine wave, flat at both ends, and the end value afterwards.

    .. math:: v(t) = v_0 + (v_1 - v_0) \tfrac{1}{2}(1 - \cos \pi p), \qquad p = \min(t / T, 1).

    Args:
        start: the value :math:`v_0` at step 0.
        end: the value :math:`v_1` from step :math:`T` on.
        num_steps: the number :math:`T` of steps.
        planned_steps: the number of steps of the training, if known: a schedule that takes more steps warns, because
            the training never reaches its end value.

    Example:
        >>> round(cosine(0.0, 1.0, num_steps=2).at(1), 12)
        0.5
    """
    return _build("cosine", _cosine, start, end, num_steps, planned_steps)


def exponential(start: float, end: float, num_steps: int, *, planned_steps: int | None = None) -> Schedule:
    r"""A geometric path between two positive values, and the end value afterwards.

    .. math:: v(t) = v_0 (v_1 / v_0)^p, \qquad p = \min(t / T, 1).

    Args:
        start: the value :math:`v_0 > 0` at step 0.
        end: the value :math:`v_1 > 0` from step :math:`T` on.
        num_steps: the number :math:`T` of steps.
        planned_steps: the number of steps of the training, if known: a schedule that takes more steps warns, because
            the training never reaches its end value.

    Raises:
        ValueError: for a start or end value that is not positive, because a geometric path never reaches 0.

    Example:
        >>> round(exponential(0.01, 1.0, num_steps=2).at(1), 12)
        0.1
    """
    _checks.positive("start", start)
    _checks.positive("end", end)
    return _build("exponential", _exponential, start, end, num_steps, planned_steps)


def cyclical(
    start: float,
    end: float,
    num_steps: int,
    *,
    num_cycles: int = 4,
    ramp: float = 0.5,
    planned_steps: int | None = None,
) -> Schedule:
    r"""Cycles of a linear ramp and a plateau, and the end value afterwards.

    .. math:: v(t) = v_0 + (v_1 - v_0) \min(\tau / R, 1), \qquad \tau = (M t / T) \bmod 1.

    Args:
        start: the value :math:`v_0` at the start of each cycle.
        end: the value :math:`v_1` on the plateaus and from step :math:`T` on.
        num_steps: the number :math:`T` of steps.
        num_cycles: the number :math:`M` of cycles.
        ramp: the fraction :math:`R \in (0, 1]` of each cycle that the ramp takes.
        planned_steps: the number of steps of the training, if known: a schedule that takes more steps warns, because
            the training never reaches its end value.

    References:
        Fu et al. 2019, Cyclical annealing schedule, https://arxiv.org/abs/1903.10145

    Example:
        >>> beta = cyclical(0.0, 1.0, num_steps=8, num_cycles=2)
        >>> [beta.at(step) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """
    _checks.positive_int("num_cycles", num_cycles)
    _checks.positive("ramp", _checks.fraction("ramp", ramp))
    shape = partial(_cyclical, num_cycles=num_cycles, ramp=ramp)
    options = f", num_cycles={num_cycles}, ramp={ramp}"
    return _build("cyclical", shape, start, end, num_steps, planned_steps, options)


_Shape = Callable[[float, float, float], float]  # from start, end and the fraction of the steps taken to the value


def _build(
    name: str,
    shape: _Shape,
    start: float,
    end: float,
    num_steps: int,
    planned_steps: int | None,
    options: str = "",
) -> Schedule:
    _checks.positive_int("num_steps", num_steps)
    start, end = _checks.finite("start", start), _checks.finite("end", end)
    _checks.finite("end - start", end - start)
    function = partial(_ramp, start=start, end=end, num_steps=num_steps, shape=shape)
    if planned_steps is not None and num_steps > _checks.positive_int("planned_steps", planned_steps):
        warnings.warn(
            f"The schedule takes {num_steps} steps and the training {planned_steps}: it stops at "
            f"{function(planned_steps):.3g} and never reaches {end:g}.",
            stacklevel=3,
        )
    schedule = Schedule(function, name=f"{name}({start}, {end}, num_steps={num_steps}{options})")
    schedule._ends = (start, end)
    return schedule


def _ramp(step: int, *, start: float, end: float, num_steps: int, shape: _Shape) -> float:
    return end if step >= num_steps else shape(start, end, step / num_steps)


def _linear(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return start + (end - start) * 0.5 * (1 - math.cos(math.pi * progress))


def _exponential(start: float, end: float, progress: float) -> float:
    return start ** (1 - progress) * end**progress  # end / start may overflow


def _cyclical(start: float, end: float, progress: float, *, num_cycles: int, ramp: float) -> float:
    return start + (end - start) * min((num_cycles * progress) % 1 / ramp, 1.0)
