"""Controllers of a decoder's inverse Lipschitz constant, as a number or in nats per dimension."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pyro_ilvae import _checks
from pyro_ilvae.control._multiplicative import MultiplicativeController
from pyro_ilvae.control.measures import Measure
from pyro_ilvae.infer.moved_decoders import decoder_with, largest_of, set_first
from pyro_ilvae.infer.moving import MovingValue

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
    _more_information = True
    _unit: float  # relative to the upper bound: above it the number moves by factors, below it by steps

    _bounds: tuple[float, float]

    def __init__(
        self,
        decoder: Any,
        measure: Measure | Callable[..., Any],
        target: float,
        *,
        num_steps: int,
        every: int = 10,
        bounds: tuple[float, float] | None = None,
        tolerance: float = 0.02,
        window: int = 10,
        at_least: bool = False,
        largest_beta: float = 1.0,
        planned_steps: int | None = None,
    ) -> None:
        self._check(getattr(decoder_with(self._attribute, decoder), "nats", None), decoder)
        self.decoder = decoder
        self.largest_beta = _checks.positive("largest_beta", largest_beta)
        if self.largest_beta < 1:
            raise ValueError(f"Expected largest_beta >= 1, got {largest_beta}")
        #: the weight of the KL, for AnnealedELBO
        self.beta = _ControlledBeta(type(self).__name__, self.largest_beta)
        super().__init__(
            measure,
            target,
            start=float(getattr(decoder, self._attribute)),
            num_steps=num_steps,
            every=every,
            bounds=self._bounds if bounds is None else bounds,
            tolerance=tolerance,
            window=window,
            at_least=at_least,
            planned_steps=planned_steps,
        )
        largest = largest_of(decoder, self._attribute)
        if self.bounds[1] > largest:
            raise ValueError(f"Expected bounds up to {largest:g}, the largest {self._attribute}, got {self.bounds}")
        set_first(decoder, self._attribute, self._value)
        self._seen = getattr(decoder, self._attribute)

    def _check(self, nats: float | None, decoder: Any) -> None:
        """Raise for a decoder whose constant is given in another way."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return super().__repr__() + (f", beta = {self.beta._value:.4g}" if self.largest_beta > 1 else "")

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Take note of a step of training, and measure and move if it is time to.

        Args:
            *args: the arguments of the step of SVI before, which the measure takes.
            **kwargs: their named arguments.

        Raises:
            ValueError: for a measure that is not finite, if beta has moved and no objective read it, and if something
                else has set the number of the decoder before it froze.
        """
        if not self.frozen and getattr(self.decoder, self._attribute) != self._seen:
            raise ValueError(
                f"Expected only this {self.name} to set {self._attribute} of the decoder before it freezes, got "
                f"{getattr(self.decoder, self._attribute):g} in place of {self._seen:g}: a second controller or a "
                "scheduler would undo its moves, and with a state of the model belongs the state of its controller"
            )
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
        self._seen = getattr(self.decoder, self._attribute)
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


class InverseLipschitzController(_ConstantController):
    r"""Moves the inverse Lipschitz constant L of a decoder until a measure is on target, and freezes it.

    .. math:: u \leftarrow u + r\, c\big(e + H \dot e\big), \qquad e = \log \frac{\text{target}}{\bar m}, \qquad
        u = \log(1 + L / s),

    with :math:`\bar m` the running mean of the measure, :math:`\dot e` the trend of e, which is followed H moves ahead,
    c a clipping to [-1, 1], and s a thousandth of the largest L: L moves by factors where it is large and by steps
    where it is small. The rate r falls when :math:`e + H \dot e` changes its sign and otherwise grows up to its limit;
    where the sign stays the same for long, moves grow up to threefold. At every step the guarantee holds with the
    constant of that step, and after the freeze with the final one.

    Args:
        decoder: a decoder or map whose ``inverse_lipschitz`` is a number that can be set.
        measure: what is to be on target, such as ``measures.smallest_kl(model, guide)``, or a function of the arguments
            of model and guide that returns a positive number.
        target: the target, positive, in the unit of the measure.
        num_steps: the number of steps after which L is frozen. What the measure does afterwards is not corrected, so
            freeze when the loss has nearly stopped falling.
        every: the number of steps between two moves. Each takes about as long as one pass of guide and model. Some
            hundred moves before the freeze are enough.
        bounds: the smallest and the largest L, at most 1e18; 0 and 100 if None.
        tolerance: L rests while :math:`|e + H \dot e|` is below this, until it is above twice this. A freeze warns if
            the estimate is more than a tenth off.
        window: the number of batches in the running mean.
        at_least: whether more information than the target asks for is as good: a larger measure, or a smaller one if it
            falls with information. The controller aims at twice the tolerance beyond the target. L still falls while
            the measure is further beyond, down to its bound.
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
    _symbol = "L"
    _unit = 1e-3
    _bounds = (0.0, 100.0)

    def _check(self, nats: float | None, decoder: Any) -> None:
        if nats is not None:
            raise ValueError("Expected decoder with a number as inverse_lipschitz, got nats: use a NatsController")


class NatsController(_ConstantController):
    r"""Moves the nats per dimension :math:`\kappa` of a decoder until a measure is on target, and freezes it.

    .. math:: L = \sigma \sqrt{e^{2 \kappa} - 1}.

    L follows the noise scale :math:`\sigma` during training and after the freeze. Under Normal noise this guarantees
    the final :math:`\kappa` nats per dimension; under other likelihoods :math:`\kappa` is a reference, see
    :class:`~pyro_ilvae.Nats`. Otherwise as :class:`InverseLipschitzController`, with :math:`u = \log(1 + \kappa / s)`
    and s five thousandths of the largest :math:`\kappa`.

    Args:
        decoder: a decoder or map whose ``inverse_lipschitz`` was given as ``Nats``.
        measure: as for :class:`InverseLipschitzController`.
        target: as for :class:`InverseLipschitzController`.
        num_steps: as for :class:`InverseLipschitzController`.
        every: as for :class:`InverseLipschitzController`.
        bounds: the smallest and the largest :math:`\kappa`, at most 40; 0 and 10 if None.
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
    _symbol = "nats"
    _unit = 5e-3
    _bounds = (0.0, 10.0)

    def _check(self, nats: float | None, decoder: Any) -> None:
        if nats is None:
            raise ValueError(
                f"Expected decoder whose inverse_lipschitz was given in nats, got a {type(decoder).__name__} with a "
                "number: use an InverseLipschitzController"
            )
