"""Checks of what a user passes in: each check raises where the value enters and names the argument."""

import math
from collections.abc import Sequence
from operator import index
from typing import SupportsFloat, SupportsIndex

import torch


def positive_int(name: str, value: int, *, at_least: int = 1) -> int:
    """Return ``value`` if it is an int of at least ``at_least``."""
    if not _is_int(value) or index(value) < at_least:
        raise ValueError(f"Expected {name} to be an int >= {at_least}, got {value!r}")
    return index(value)


def index_below(name: str, value: int, size: int) -> int:
    """Return ``value`` if it is an int from 0 to ``size`` - 1."""
    if not _is_int(value) or not 0 <= index(value) < size:
        raise ValueError(f"Expected {name} to be an int from 0 to {size - 1}, got {value!r}")
    return index(value)


def seed(value: int | None) -> int | None:
    """Return ``value`` if it is None or an int that a generator of PyTorch takes."""
    if value is not None and not (_is_int(value) and -(2**63) <= index(value) < 2**64):
        raise ValueError(f"Expected seed to be an int or None, got {value!r}")
    return value


def widths(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """Return ``value`` as a non-empty tuple of layer widths."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) == 0:
        raise ValueError(f"Expected {name} to be a non-empty sequence of ints, got {value!r}")
    return tuple(positive_int(f"each entry of {name}", width) for width in value)


def event_shape(value: int | Sequence[int]) -> torch.Size:
    """Return ``value`` as the shape of one datum."""
    sizes = (value,) if isinstance(value, SupportsIndex) else value
    return torch.Size(widths("event_shape", sizes))


def choice(name: str, value: str, options: Sequence[str]) -> str:
    """Return ``value`` if it is one of the options."""
    if value not in options:
        raise ValueError(f"Expected {name} to be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def non_negative(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as a finite float of at least 0."""
    number = _number(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"Expected {name} to be a finite number >= 0, got {value!r}")
    return number


def positive(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as a finite float above 0."""
    number = _number(value)
    if not 0 < number < math.inf:
        raise ValueError(f"Expected {name} to be a finite number > 0, got {value!r}")
    return number


def finite(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as a finite float."""
    number = _number(value)
    if not math.isfinite(number):
        raise ValueError(f"Expected {name} to be a finite number, got {value!r}")
    return number


def fraction(name: str, value: SupportsFloat, *, ends: bool = True) -> float:
    """Return ``value`` as a float in [0, 1], or in (0, 1) without the ends."""
    number = _number(value)
    if not 0 <= number <= 1 or (not ends and number in (0, 1)):
        raise ValueError(f"Expected {name} to be a number in {'[0, 1]' if ends else '(0, 1)'}, got {value!r}")
    return number


def last_dim(name: str, value: torch.Tensor, size: int) -> None:
    """Raise unless ``value`` has shape (..., size)."""
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(f"Expected {name} of shape (..., {size}), got {tuple(value.shape)}")


def context(value: torch.Tensor | None, size: int | None) -> None:
    """Raise unless ``value`` is a context of shape (..., size), or None if ``size`` is None."""
    if size is None:
        if value is not None:
            raise ValueError(
                f"Expected no context for a decoder without context_dim, got one of shape {tuple(value.shape)}"
            )
        return
    if value is None:
        raise ValueError(f"Expected context of shape (..., {size}), got None")
    last_dim("context", value, size)


def _is_int(value: object) -> bool:
    # NumPy's integers are SupportsIndex and not int. Arrays and tensors are SupportsIndex too: index() refuses them
    # unless they hold a single integer.
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    try:
        index(value)
    except TypeError:
        return False
    return True


def _number(value: object) -> float:
    """The value as a float, or NaN if ``value`` is not a single number."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat) or getattr(value, "ndim", 0) != 0:
        return math.nan
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):  # for example a complex tensor
        return math.nan
