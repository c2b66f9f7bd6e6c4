"""Checks of what a user passes in: each raises where the value enters and names the argument."""

import math
from collections.abc import Sequence
from operator import index
from typing import SupportsFloat, SupportsIndex

import torch


def positive_int(name: str, value: int) -> int:
    """Return ``value`` if it is an int of at least 1."""
    # SupportsIndex rather than int, for the integers of NumPy.
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or index(value) < 1:
        raise ValueError(f"Expected {name} to be an int >= 1, got {value!r}")
    return index(value)


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


def constant(name: str, value: float) -> float:
    """Return ``value`` as a finite, non-negative float."""
    number = float(value) if isinstance(value, SupportsFloat) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"Expected {name} to be a finite number >= 0, got {value!r}")
    return number


def last_dim(name: str, value: torch.Tensor, size: int) -> None:
    """Raise unless ``value`` has shape (..., size)."""
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(f"Expected {name} of shape (..., {size}), got {tuple(value.shape)}")
