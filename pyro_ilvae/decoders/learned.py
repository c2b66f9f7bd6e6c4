"""Inverse Lipschitz constants that are trained, above a floor."""

import math

from pyro_ilvae import _checks
from pyro_ilvae.decoders.nats import Nats

__all__ = ["LearnedConstant"]


class LearnedConstant:
    r"""An inverse Lipschitz constant that is a parameter of the decoder, above a floor that holds at every step.

    .. math:: L = L_{\min} + u \operatorname{softplus}(\theta) \ge L_{\min},

    with :math:`\theta` trained like the decoder's other parameters. Pass it as ``inverse_lipschitz`` to a decoder with
    a :class:`~pyro_ilvae.BrenierMap`. The unit u is 1 where :math:`L_{\min}` is a number, and the noise scale or noise
    unit of the likelihood where it is in :class:`~pyro_ilvae.Nats`. The decoder's ``inverse_lipschitz`` is the present
    L, its ``minimum_inverse_lipschitz`` the floor, and its ``nats`` are the nats of the floor. To fix the constant
    where it is, set ``inverse_lipschitz`` to its own value: an optimizer then moves it no longer. Where the floor is in
    nats, set it to ``Nats`` instead, as a number follows no noise scale. Under a prior on the parameter ``excess_raw``,
    ``inverse_lipschitz`` is the floor, which holds for every draw.

    Args:
        minimum: the floor :math:`L_{\min} \ge 0`, a number or :class:`~pyro_ilvae.Nats`.
        excess: what is above the floor at the start, :math:`\operatorname{softplus}(\theta)`.

    Raises:
        ValueError: for a negative floor and an excess that is not positive.

    Example:
        >>> from pyro_ilvae import BrenierMap
        >>> brenier = BrenierMap(2, LearnedConstant(0.5, excess=1.0))
        >>> round(brenier.inverse_lipschitz, 6), brenier.minimum_inverse_lipschitz
        (1.5, 0.5)
        >>> brenier.excess_raw.requires_grad
        True
    """

    def __init__(self, minimum: float | Nats = 0.0, *, excess: float = 0.1) -> None:
        self.minimum = minimum if isinstance(minimum, Nats) else _checks.non_negative("minimum", minimum)
        self.excess = _checks.positive("excess", excess)

    def __repr__(self) -> str:
        return f"LearnedConstant({self.minimum!r}, excess={self.excess:g})"

    def with_minimum(self, minimum: float | Nats) -> "LearnedConstant":
        """The same above another floor."""
        return LearnedConstant(minimum, excess=self.excess)

    @property
    def raw(self) -> float:
        r"""The parameter :math:`\theta` at the start."""
        return self.excess + math.log(-math.expm1(-self.excess))
