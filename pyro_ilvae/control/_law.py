"""The law by which a controller moves a number: proportional-integral control with a rate that adapts."""

import math
from collections.abc import Mapping
from typing import Any

from pyro_ilvae import _checks

__all__ = ["LogLaw"]

# Tuned on simulated plants, whose response to the number has a lag of 1 to 60 moves and an elasticity of 0.3 to 2.
_SPAN = 20.0  # the largest rate moves the position so far in all moves together, at an error of 1
_LARGEST_RATE = 0.1  # where there are few moves
_SLOWEST = 1 / 32  # the smallest rate, relative to the largest
_SLOWER, _FASTER = 0.7, 1.03  # the rate's factor where the error changes its sign, and where it does not
_PATIENCE, _LARGEST_BOOST = 0.08, 3.0  # after so many moves of one sign, relative to all, moves grow up to so far
_LEAD = 0.1  # how far ahead the trend of the error is followed, relative to all moves
_TREND = 0.15  # the weight of the last change of the error in its trend
_FROZEN_MEAN = 0.125  # the value at the end is the mean over these moves, relative to all


class LogLaw:
    r"""The next position u of a number from the logarithm of target over estimate.

    .. math:: u \leftarrow u + r\, c\big(e + H \dot e\big), \qquad e = \log \frac{\text{target}}{\text{estimate}},

    with c a clipping to [-1, 1], :math:`\dot e` the running mean of the changes of e, H a number of moves and r a
    rate that falls where the error changes its sign, and grows where it keeps it for long. No move is made while the
    error is within the tolerance, and afterwards until it is beyond twice the tolerance.
    """

    def __init__(self, num_moves: int, tolerance: float) -> None:
        self.num_moves = num_moves
        self.tolerance = tolerance
        self.largest_rate = min(_SPAN / num_moves, _LARGEST_RATE)
        self.rate = self.largest_rate / 2
        self.sign = 0
        self.num_same = 0
        self.inside = False
        self.error: float | None = None
        self.trend = 0.0
        self.recent: list[float] = []

    def change(self, error: float) -> float:
        """How far the position moves at an error."""
        if self.error is not None:
            self.trend += _TREND * (error - self.error - self.trend)
        self.error = error
        ahead = min(max(error + _LEAD * self.num_moves * self.trend, -1.0), 1.0)
        self.inside = abs(ahead) < (2 * self.tolerance if self.inside else self.tolerance)
        if self.inside:
            self.num_same = 0
            return 0.0
        sign = 1 if ahead > 0 else -1
        self.num_same = self.num_same + 1 if sign == self.sign else 0
        if self.sign and sign != self.sign:
            self.rate = max(self.rate * _SLOWER, self.largest_rate * _SLOWEST)
        else:
            self.rate = min(self.rate * _FASTER, self.largest_rate)
        self.sign = sign
        boost = 1.0 + max(self.num_same / (_PATIENCE * self.num_moves) - 1.0, 0.0)
        return self.rate * ahead * min(boost, _LARGEST_BOOST)

    def remember(self, position: float) -> None:
        """Keep a position for the mean at the end; far from the target nothing is kept."""
        if self.error is None or abs(self.error) > math.log(1.2):
            self.recent.clear()
        else:
            self.recent = [*self.recent, position][-max(1, round(_FROZEN_MEAN * self.num_moves)) :]

    def state(self) -> dict[str, Any]:
        """What is remembered, as numbers and lists."""
        names = ("rate", "sign", "num_same", "inside", "error", "trend")
        return {**{name: getattr(self, name) for name in names}, "recent": list(self.recent)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Return to what was remembered."""
        missing = sorted(set(self.state()) - set(state))
        if missing:
            raise ValueError(f"Expected state['law'] with {missing}")
        error, recent = state["error"], state["recent"]
        if not isinstance(recent, list | tuple):
            raise ValueError(f"Expected state['law']['recent'] to be a list of numbers, got {recent!r}")
        if not _checks.is_int(state["sign"]) or state["sign"] not in (-1, 0, 1):
            raise ValueError(f"Expected state['law']['sign'] to be -1, 0 or 1, got {state['sign']!r}")
        found = {
            "rate": _checks.finite("state['law']['rate']", state["rate"]),
            "trend": _checks.finite("state['law']['trend']", state["trend"]),
            "sign": int(state["sign"]),
            "num_same": _checks.positive_int("state['law']['num_same']", state["num_same"], at_least=0),
            "inside": _checks.boolean("state['law']['inside']", state["inside"]),
            "error": None if error is None else _checks.finite("state['law']['error']", error),
            "recent": [_checks.finite("state['law']['recent']", position) for position in recent],
        }
        vars(self).update(found)
