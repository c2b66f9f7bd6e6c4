"""Schedulers: the inverse Lipschitz constant of a decoder, or its nats per dimension, as a function of the step."""

from collections.abc import Mapping
from typing import Any

from pyro_ilvae.infer.moved_decoders import decoder_with, largest_of, set_first
from pyro_ilvae.infer.schedules import Schedule

__all__ = ["InverseLipschitzScheduler", "NatsScheduler"]


class _Scheduler:
    """Sets an attribute of a decoder to the value of a schedule."""

    _attribute: str

    def __init__(self, decoder: Any, schedule: Schedule) -> None:
        name = self._attribute
        if getattr(decoder_with(name, decoder), name) is None:
            raise ValueError(
                f"Expected decoder whose inverse_lipschitz was given in {name}, got a {type(decoder).__name__} with a "
                "number"
            )
        if not isinstance(schedule, Schedule):
            raise ValueError(
                f"Expected schedule to be a Schedule, got {schedule!r}; schedules.constant(value) makes one of a number"
            )
        largest = largest_of(decoder, name)
        for value in (schedule.value, *schedule._ends):
            if not 0 <= value <= largest:
                raise ValueError(
                    f"Expected schedule to give {name} from 0 to {largest:g}, got {value!r} from {schedule.name}"
                )
        self.decoder = decoder
        self.schedule = schedule
        set_first(decoder, name, schedule.value)
        self._num_calls = schedule._num_calls

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.decoder).__name__}, {self.schedule!r})"

    def step(self) -> None:
        """Move the schedule to its next step and set the value."""
        if self.schedule._num_calls != self._num_calls:
            raise ValueError(
                f"Expected only this scheduler to step {self.schedule.name}, got a step from elsewhere: a schedule "
                "that beta and a decoder share, or two decoders, would move twice as fast. Give each its own schedule"
            )
        self.schedule.step()
        self._set()

    def _set(self) -> None:
        setattr(self.decoder, self._attribute, self.schedule.value)
        self._num_calls = self.schedule._num_calls

    def state_dict(self) -> dict[str, int]:
        """The position of the schedule, for a checkpoint."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Return to a saved position, and set the value."""
        self.schedule.load_state_dict(state)
        self._set()


class InverseLipschitzScheduler(_Scheduler):
    r"""Sets the inverse Lipschitz constant L of a decoder to the value of a schedule, at once and at each step.

    A schedule that starts with a large L forces information into the latent variable first and gives flexibility back
    as L falls; a schedule that starts at L = 0 does the reverse. At every step, the guarantee holds with the constant
    of that step.

    :meth:`step` moves the schedule. A schedule that is beta's as well, or another decoder's, would move twice in each
    turn of the training loop: give each its own.

    Args:
        decoder: a decoder or map whose ``inverse_lipschitz`` can be set.
        schedule: the constant L as a function of the step, from 0 to 1e18, or to the decoder's ``lipschitz``.

    Raises:
        ValueError: for a decoder without an ``inverse_lipschitz``, for a ``schedule`` that is not a :class:`Schedule`
            or has an end outside of these limits, and by :meth:`step` if anything else has moved the schedule.
        TypeError: for a class in place of a decoder.

    Example:
        >>> from pyro_ilvae import BrenierMap, schedules
        >>> brenier = BrenierMap(2)
        >>> scheduler = InverseLipschitzScheduler(brenier, schedules.linear(4.0, 1.0, num_steps=3))
        >>> constants = [brenier.inverse_lipschitz]
        >>> for _ in range(3):
        ...     scheduler.step()
        ...     constants.append(brenier.inverse_lipschitz)
        >>> constants
        [4.0, 3.0, 2.0, 1.0]
        >>> scheduler
        InverseLipschitzScheduler(BrenierMap, linear(4.0, 1.0, num_steps=3) at step 3: 1)
    """

    _attribute = "inverse_lipschitz"


class NatsScheduler(_Scheduler):
    r"""Sets the nats per dimension :math:`\kappa` of a decoder to the value of a schedule, at once and at each step.

    .. math:: L = \sigma \sqrt{e^{2 \kappa} - 1}.

    Between two steps L follows the noise scale :math:`\sigma`; see :class:`~pyro_ilvae.Nats`. Otherwise as
    :class:`InverseLipschitzScheduler`.

    Args:
        decoder: a decoder or map whose ``inverse_lipschitz`` was given as ``Nats``.
        schedule: the nats :math:`\kappa` per dimension as a function of the step, from 0 to 40.

    Raises:
        ValueError: for a decoder whose constant is a number, for a ``schedule`` that is not a :class:`Schedule` or has
            an end outside of these limits, and by :meth:`step` if anything else has moved the schedule.
        TypeError: for a class in place of a decoder.

    Example:
        >>> from pyro_ilvae import BrenierMap, Nats, likelihoods, schedules
        >>> brenier = BrenierMap(2, inverse_lipschitz=Nats(1.0, likelihoods.Normal(0.1)))
        >>> scheduler = NatsScheduler(brenier, schedules.linear(1.0, 0.25, num_steps=3))
        >>> scheduler.step()
        >>> brenier.nats, round(brenier.inverse_lipschitz, 3)
        (0.75, 0.187)
    """

    _attribute = "nats"
