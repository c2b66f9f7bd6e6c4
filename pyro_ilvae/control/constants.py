"""Controllers of a decoder's inverse Lipschitz constant, as a number or in nats per dimension."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pyro_ilvae import _checks
from pyro_ilvae.control._multiplicative import MultiplicativeController
from pyro_ilvae.control.measures import Measure
from pyro_ilvae.infer.moving import MovingValue
from pyro_ilvae.infer.schedulers import InverseLipschitzScheduler, NatsScheduler

__all__ = ["InverseLipschitzController", "NatsController"]


class _ControlledBeta(MovingValue):
    """The weight of the KL divergence that a controller of a constant moves."""

    def __init__(self, name: str, largest: float) -> None:
        self.name = name
        self.num_steps_taken = 0
        self._ends = (1.0, largest)
        self._value = 1.0
        self.was_read = True

    def __repr__(self) -> str:
        return f"the beta of {self.name} at step {self.num_steps_taken}: {self._value:g}"

    @property
    def value(self) -> float:
        """Beta at the current step."""
        self.was_read = True
        return self._value

    @property
    def _shown(self) -> float:
        return self._value

    def _set(self, value: float) -> None:
        self.was_read = self.was_read and value == self._value
        self._value = value

    def _moves_after(self, step: int, num_steps: int) -> bool:
        return self._ends[1] > 1


class _ConstantController(MultiplicativeController):
    """Sets an attribute of a decoder to the number that it moves, and beta where that number is at its lower bound."""

    _attribute: str
    _largest: float
    _more_information = True
    _unit: float  # relative to the upper bound: above it the number moves by factors, below it by steps

    def __init__(self, decoder: Any, *args: Any, largest_beta: float, **options: Any) -> None:
        self.decoder = decoder
        self.largest_beta = _checks.positive("largest_beta", largest_beta)
        if self.largest_beta < 1:
            raise ValueError(f"Expected largest_beta >= 1, got {largest_beta}")
        #: the weight of the KL, for AnnealedELBO
        self.beta = _ControlledBeta(type(self).__name__, self.largest_beta)
        super().__init__(*args, start=float(getattr(decoder, self._attribute)), **options)
        if self.bounds[1] > self._largest:
            raise ValueError(f"Expected bounds up to {self._largest:g}, got {self.bounds}")
        largest = getattr(decoder, "lipschitz", None)
        if largest is not None and self.bounds[1] > largest:
            raise ValueError(f"Expected bounds up to the decoder's lipschitz, {largest:g}, got {self.bounds}")

    def __repr__(self) -> str:
        return super().__repr__() + (f", beta = {self.beta._value:.4g}" if self.largest_beta > 1 else "")

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Take note of a step of training, and measure and move if it is time to.

        Args:
            *args: the arguments of the step of SVI before, which the measure takes.
            **kwargs: their named arguments.

        Raises:
            ValueError: for a measure that is not finite, and if beta has moved and no objective read it.
        """
        if not self.beta.was_read and self.beta._value != 1:
            raise ValueError(
                f"Expected an objective with the beta of this {self.name}, got none that read it: pass "
                "beta=controller.beta to AnnealedELBO, or leave out largest_beta"
            )
        self.beta.num_steps_taken += 1
        super().step(*args, **kwargs)

    def _position_of(self, value: float) -> float:
        return math.log1p(value / (self._unit * self.bounds[1]))

    def _value_at(self, position: float) -> float:
        return max(self._unit * self.bounds[1] * math.expm1(position), self.bounds[0])

    @property
    def _lowest(self) -> float:
        # Below the lower bound of the constant, the position goes on as the logarithm of 1 / beta.
        return super()._lowest - math.log(self.largest_beta)

    def _set(self, value: float) -> None:
        if value != getattr(self.decoder, self._attribute):
            setattr(self.decoder, self._attribute, value)
        self.beta._set(min(math.exp(max(super()._lowest - self._position, 0.0)), self.largest_beta))
        super()._set(value)

    def _why(self) -> str:
        if self.largest_beta > 1 and self._value == self.bounds[0]:
            return ", at its largest beta" if self.beta._value >= 0.999 * self.largest_beta else ""
        return super()._why()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to a saved state, and set the value."""
        super().load_state_dict(state)
        self.beta.num_steps_taken = self.num_steps_taken
        self.beta.was_read = True


def _checked_decoder(decoder: Any, name: str) -> Any:
    if isinstance(decoder, type):
        raise TypeError(f"Expected decoder to be a decoder, got the class {decoder.__name__}: pass an object of it")
    if not hasattr(decoder, name):
        hint = ", whose decoder may have one" if hasattr(decoder, "decoder") else ""
        raise ValueError(f"Expected a decoder with an attribute {name} to set, got {type(decoder).__name__}{hint}")
    own = getattr(type(decoder), name, None)
    if isinstance(own, property) and own.fset is None:
        raise ValueError(
            f"Expected decoder whose {name} can be set, got a {type(decoder).__name__}, which only shows it"
        )
    if getattr(decoder, "minimum_inverse_lipschitz", None) is not None:
        raise ValueError(f"Expected decoder whose constant is not learned, got a {type(decoder).__name__} with one")
    return decoder


class InverseLipschitzController(_ConstantController):
    r"""Moves the inverse Lipschitz constant L of a decoder until a measure is on target, and freezes it.

    .. math:: u \leftarrow u + r\, c\big(e + H \dot e\big), \qquad e = \log \frac{\text{target}}{\bar m}, \qquad
        u = \log(1 + L / s),

    with :math:`\bar m` the running mean of the measure, :math:`\dot e` the trend of e, which is followed H moves ahead,
    c a clipping to [-1, 1], r a rate that falls whenever the error changes its sign, and s a thousandth of the largest
    L: proportional-integral control, by factors where L is large and by steps where it is small. At every step the
    guarantee holds with the constant of that step, and after the freeze with the final one.

    Args:
        decoder: a decoder or map whose ``inverse_lipschitz`` is a number that can be set.
        measure: what is to be on target, such as ``measures.smallest_kl(model, guide)``, or a function of the arguments
            of model and guide that returns a positive number.
        target: the target, positive, in the unit of the measure.
        num_steps: the number of steps after which L is frozen. The last tenth of training or more should come after it.
        every: the number of steps between two moves. Each takes about as long as one pass of guide and model. Some
            hundred moves before the freeze are enough.
        bounds: the smallest and the largest L, at most 1e18.
        tolerance: L rests where the estimate is so close to the target, relative to it, until it is twice as far off.
        window: the number of batches in the running mean.
        at_least: whether a measure above the target is as good. The controller aims at twice the tolerance above it. L
            still falls while it is above, down to its bound.
        largest_beta: a weight of the KL above 1 lowers information where the smallest L leaves too much of it. If this
            is above 1, pass ``controller.beta`` to :class:`~pyro_ilvae.AnnealedELBO`: it is 1 while L is above its
            smallest value, and rises up to this number otherwise.
        planned_steps: the number of steps of the training, if known: a warning tells if it is below ``num_steps``.

    Raises:
        ValueError: for a decoder whose constant is in nats or cannot be set, a target that is not positive, and bounds
            without the decoder's constant between them. :meth:`step` raises it for a measure that is not finite.
        TypeError: for a class in place of a decoder, and a measure that is none.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_ilvae import VAE, MLPEncoder, ProjectedDecoder, likelihoods, measures, mlp
        >>> decoder = ProjectedDecoder(mlp(2, (8,), 6), latent_dim=2, event_shape=6, inverse_lipschitz=0.0)
        >>> vae = VAE(decoder, MLPEncoder(event_shape=6, latent_dim=2, hidden_features=(8,)), likelihoods.Normal(0.5))
        >>> controller = InverseLipschitzController(
        ...     decoder, measures.smallest_kl(vae.model, vae.guide), target=0.02, num_steps=40, at_least=True
        ... )
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> x = torch.randn(20, 6)
        >>> for _ in range(30):
        ...     loss = svi.step(x)
        ...     controller.step(x)
        >>> controller.freeze() == decoder.inverse_lipschitz
        True
    """

    _attribute = "inverse_lipschitz"
    _largest = InverseLipschitzScheduler._largest
    _symbol = "L"
    _unit = 1e-3

    def __init__(
        self,
        decoder: Any,
        measure: Measure | Callable[..., Any],
        target: float,
        *,
        num_steps: int,
        every: int = 10,
        bounds: tuple[float, float] = (0.0, 100.0),
        tolerance: float = 0.02,
        window: int = 10,
        at_least: bool = False,
        largest_beta: float = 1.0,
        planned_steps: int | None = None,
    ) -> None:
        if getattr(_checked_decoder(decoder, self._attribute), "nats", None) is not None:
            raise ValueError("Expected decoder with a number as inverse_lipschitz, got nats: use a NatsController")
        super().__init__(
            decoder,
            measure,
            target,
            num_steps=num_steps,
            every=every,
            bounds=bounds,
            tolerance=tolerance,
            window=window,
            at_least=at_least,
            largest_beta=largest_beta,
            planned_steps=planned_steps,
        )


class NatsController(_ConstantController):
    r"""Moves the nats per dimension :math:`\kappa` of a decoder until a measure is on target, and freezes it.

    .. math:: L = \sigma \sqrt{e^{2 \kappa} - 1}.

    L follows the noise scale :math:`\sigma` during training and after the freeze, and so guarantees the final
    :math:`\kappa`; see :class:`~pyro_ilvae.Nats`. Otherwise as :class:`InverseLipschitzController`.

    Args:
        decoder: a decoder or map whose ``inverse_lipschitz`` was given as ``Nats``.
        measure: as for :class:`InverseLipschitzController`.
        target: as for :class:`InverseLipschitzController`.
        num_steps: as for :class:`InverseLipschitzController`.
        every: as for :class:`InverseLipschitzController`.
        bounds: the smallest and the largest :math:`\kappa`, at most 40.
        tolerance: as for :class:`InverseLipschitzController`.
        window: as for :class:`InverseLipschitzController`.
        at_least: as for :class:`InverseLipschitzController`.
        largest_beta: as for :class:`InverseLipschitzController`.
        planned_steps: as for :class:`InverseLipschitzController`.

    Raises:
        ValueError: for a decoder whose constant is a number, and as :class:`InverseLipschitzController`.
        TypeError: for a class in place of a decoder, and a measure that is none.

    Example:
        >>> from pyro_ilvae import BrenierMap, Nats, likelihoods
        >>> brenier = BrenierMap(2, inverse_lipschitz=Nats(0.5, likelihoods.Normal(0.1)))
        >>> controller = NatsController(brenier, lambda: brenier.nats + 0.2, target=1.0, num_steps=2000)
        >>> for _ in range(2000):
        ...     controller.step()
        >>> abs(brenier.nats - 0.8) < 0.05
        True
    """

    _attribute = "nats"
    _largest = NatsScheduler._largest
    _symbol = "kappa"
    _unit = 5e-3

    def __init__(
        self,
        decoder: Any,
        measure: Measure | Callable[..., Any],
        target: float,
        *,
        num_steps: int,
        every: int = 10,
        bounds: tuple[float, float] = (0.0, 10.0),
        tolerance: float = 0.02,
        window: int = 10,
        at_least: bool = False,
        largest_beta: float = 1.0,
        planned_steps: int | None = None,
    ) -> None:
        if getattr(_checked_decoder(decoder, self._attribute), "nats", None) is None:
            raise ValueError(
                f"Expected decoder whose inverse_lipschitz was given in nats, got a {type(decoder).__name__} with a "
                "number: use an InverseLipschitzController"
            )
        super().__init__(
            decoder,
            measure,
            target,
            num_steps=num_steps,
            every=every,
            bounds=bounds,
            tolerance=tolerance,
            window=window,
            at_least=at_least,
            largest_beta=largest_beta,
            planned_steps=planned_steps,
        )
