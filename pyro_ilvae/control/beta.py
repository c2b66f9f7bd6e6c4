"""Controllers of beta, the weight of the KL divergence: by a target, by a constraint (GECO), or by PI control."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pyro_ilvae import _checks
from pyro_ilvae.control._multiplicative import MultiplicativeController
from pyro_ilvae.control.controller import Controller, checked_bounds
from pyro_ilvae.control.measures import Measure

__all__ = ["GECO", "BetaController", "PIController"]

# The smallest positive beta relative to the upper bound: from 0, factors lead nowhere.
_SMALLEST = 1e-4


class BetaController(MultiplicativeController):
    r"""Moves beta, the weight of the KL, until a measure is on target, and freezes it.

    .. math:: \log \beta \leftarrow \log \beta - r\, c\big(e + H \dot e\big), \qquad
        e = \log \frac{\text{target}}{\bar m},

    as :class:`InverseLipschitzController` moves L. It is passed to :class:`~pyro_ilvae.AnnealedELBO` as beta. A beta
    guarantees nothing; what it reached on the training batches is the estimate.

    Args:
        measure: what is to be on target, such as ``measures.total_kl(model, guide)``, or a function of the arguments of
            model and guide that returns a positive number.
        target: the target, positive, in the unit of the measure.
        num_steps: the number of steps after which beta is frozen.
        start: beta at the start.
        every: the number of steps between two moves.
        bounds: the smallest and the largest beta.
        tolerance: as for :class:`InverseLipschitzController`.
        window: the number of batches in the running mean.
        at_least: whether more information than the target asks for is as good, as for
            :class:`InverseLipschitzController`.
        planned_steps: the number of steps of the training, if known: a warning tells if it is below ``num_steps``.

    Raises:
        ValueError: for a target that is not positive, and bounds without ``start`` between them. :meth:`step` raises it
            for a measure that is not finite.
        TypeError: for a measure that is none.

    Example:
        >>> beta = BetaController(lambda: 10.0 / beta.value, target=20.0, num_steps=2000)
        >>> for _ in range(2000):
        ...     beta.step()
        >>> abs(beta.value - 0.5) < 0.05
        True
    """

    _symbol = "beta"
    _more_information = False

    def __init__(
        self,
        measure: Measure | Callable[..., Any],
        target: float,
        *,
        num_steps: int,
        start: float = 1.0,
        every: int = 10,
        bounds: tuple[float, float] = (0.01, 10.0),
        tolerance: float = 0.02,
        window: int = 10,
        at_least: bool = False,
        planned_steps: int | None = None,
    ) -> None:
        super().__init__(
            measure,
            target,
            start=_checks.non_negative("start", start),
            num_steps=num_steps,
            every=every,
            bounds=bounds,
            tolerance=tolerance,
            window=window,
            at_least=at_least,
            planned_steps=planned_steps,
        )

    def _position_of(self, value: float) -> float:
        return math.log(max(value, self.bounds[0], _SMALLEST * self.bounds[1]))

    def _value_at(self, position: float) -> float:
        return self.bounds[0] if position <= self._lowest else math.exp(position)


class _BetaLaw(Controller):
    """A law of its own for beta, without an end unless one is asked for."""

    _symbol = "beta"
    _remembered: str  # what the law remembers from step to step

    def __init__(
        self,
        measure: Measure | Callable[..., Any],
        target: float,
        *,
        start: float,
        num_steps: int | None,
        every: int,
        bounds: tuple[float, float],
        window: int,
        planned_steps: int | None,
    ) -> None:
        super().__init__(
            measure,
            _checks.finite("target", target),
            num_steps=num_steps,
            every=every,
            bounds=bounds,
            window=window,
            at_least=False,
            planned_steps=planned_steps,
            start=_checks.non_negative("start", start),
        )
        self._memory = 0.0

    def _law_state(self) -> dict[str, Any]:
        return {self._remembered: self._memory}

    def _load_law_state(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or self._remembered not in state:
            raise ValueError(f"Expected state['law'] with {self._remembered}, got {state!r}")
        self._memory = _checks.finite(f"state['law']['{self._remembered}']", state[self._remembered])


class GECO(_BetaLaw):
    r"""Beta as one over the multiplier of a constraint on the reconstruction error.

    .. math:: \min \mathrm{KL} \ \text{ so that } \ -E_q \log p(x \mid z) \le \text{target}, \qquad
        \log \lambda \leftarrow \log \lambda + \nu\,(\bar m - \text{target}), \qquad \beta = 1 / \lambda,

    with :math:`\bar m` the running mean of the reconstruction error. While the constraint is violated beta falls, and
    reconstruction counts for more; then beta rises again. The paper weights the reconstruction by :math:`\lambda`,
    which is the same objective up to its scale.

    Args:
        measure: ``measures.distortion(model, guide)``, or another measure that falls as information rises.
        target: the largest reconstruction error of a datum, in nats.
        rate: the rate :math:`\nu`, per step and nat.
        start: beta at the start.
        num_steps: the number of steps after which beta is frozen; never if None.
        every: the number of steps between two moves.
        bounds: the smallest and the largest beta.
        window: the number of batches in the running mean.
        planned_steps: the number of steps of the training, if known: a warning tells if it is below ``num_steps``.

    Raises:
        ValueError: for a rate that is not positive, a measure that rises with information, and bounds without ``start``
            between them. :meth:`step` raises it for a measure that is not finite.
        TypeError: for a measure that is none.

    References:
        Rezende & Viola 2018, Taming VAEs, https://arxiv.org/abs/1810.00597

    Example:
        >>> from pyro_ilvae import measures
        >>> error = measures.Measure(lambda: 50.0 + 20.0 * beta.value, name="distortion", rises=False)
        >>> beta = GECO(error, target=60.0)
        >>> for _ in range(2000):
        ...     beta.step()
        >>> abs(beta.value - 0.5) < 0.01
        True
    """

    _remembered = "log_beta"

    def __init__(
        self,
        measure: Measure | Callable[..., Any],
        target: float,
        *,
        rate: float = 1e-3,
        start: float = 1.0,
        num_steps: int | None = None,
        every: int = 10,
        bounds: tuple[float, float] = (0.01, 10.0),
        window: int = 10,
        planned_steps: int | None = None,
    ) -> None:
        self.rate = _checks.positive("rate", rate)
        super().__init__(
            measure,
            target,
            start=_checks.positive("start", start),
            num_steps=num_steps,
            every=every,
            bounds=bounds,
            window=window,
            planned_steps=planned_steps,
        )
        if isinstance(measure, Measure) and measure.rises:
            raise ValueError(f"Expected measure to fall as information rises, got {measure!r}")
        self.measure.rises = False
        low = self.bounds[0]
        if low == 0:
            raise ValueError("Expected bounds[0] > 0, got 0: the multiplier of a constraint is one over beta")
        self._memory = math.log(start)

    @property
    def on_target(self) -> bool:
        """Whether the constraint is met at the last estimate, up to a tenth of the target's size."""
        slack = 0.1 * max(abs(self.target), 1.0)
        return self.estimate is not None and self.estimate <= self.target + slack

    def _side(self) -> str:
        return "at most "

    def _moved(self, estimate: float) -> float:
        change = self.rate * self.every * (self.target - estimate)
        low, high = self.bounds
        self._memory = min(max(self._memory + change, math.log(low)), math.log(high))
        return math.exp(self._memory)


class PIController(_BetaLaw):
    r"""Beta by proportional-integral control of the KL divergence, the control of ControlVAE.

    .. math:: \beta = \frac{k_p}{1 + e^{\epsilon}} - k_i \sum_s \epsilon_s + \beta_{\min}, \qquad
        \epsilon = \text{target} - \bar m,

    within the bounds, with :math:`\bar m` the running mean of the KL divergence and the sum over steps. The sum does
    not grow while beta is at a bound and the error would drive it further.

    Args:
        measure: ``measures.total_kl(model, guide)``, or another measure that rises with information.
        target: the KL divergence of a datum that is aimed at, in nats.
        proportional: the gain :math:`k_p`.
        integral: the gain :math:`k_i` per step and nat.
        num_steps: the number of steps after which beta is frozen; never if None.
        every: the number of steps between two moves.
        bounds: :math:`\beta_{\min}` and the largest beta; beta starts at the smallest.
        window: the number of batches in the running mean; 1 as in the paper.
        planned_steps: the number of steps of the training, if known: a warning tells if it is below ``num_steps``.

    Raises:
        ValueError: for gains that are negative, and a measure that falls as information rises. :meth:`step` raises it
            for a measure that is not finite.
        TypeError: for a measure that is none.

    References:
        Shao et al. 2020, ControlVAE: controllable variational autoencoder, https://arxiv.org/abs/2004.05988

    Example:
        >>> beta = PIController(lambda: 10.0 / (0.1 + beta.value), target=20.0)
        >>> for _ in range(5000):
        ...     beta.step()
        >>> abs(beta.value - 0.4) < 0.05
        True
    """

    _remembered = "sum_of_errors"

    def __init__(
        self,
        measure: Measure | Callable[..., Any],
        target: float,
        *,
        proportional: float = 0.01,
        integral: float = 1e-4,
        num_steps: int | None = None,
        every: int = 10,
        bounds: tuple[float, float] = (0.0, 1.0),
        window: int = 1,
        planned_steps: int | None = None,
    ) -> None:
        self.proportional = _checks.non_negative("proportional", proportional)
        self.integral = _checks.positive("integral", integral)
        low, _ = checked_bounds(bounds)
        super().__init__(
            measure,
            target,
            start=low,
            num_steps=num_steps,
            every=every,
            bounds=bounds,
            window=window,
            planned_steps=planned_steps,
        )
        if not self.measure.rises:
            raise ValueError(f"Expected measure to rise with information, got {measure!r}")

    def _moved(self, estimate: float) -> float:
        error = self.target - estimate
        # The logistic function without overflow.
        value = self.proportional * 0.5 * (1 - math.tanh(error / 2)) + self.bounds[0]
        low, high = self.bounds
        memory = self._memory - self.integral * self.every * error
        beta = value + memory
        # What would only drive beta beyond a bound is not remembered, so that it comes back at once.
        if low <= beta <= high or (beta < low and error < 0) or (beta > high and error > 0):
            self._memory = memory
        return self._clipped(value + self._memory)
