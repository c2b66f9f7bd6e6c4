"""Checks of arrays that say which cluster or component each datum is in."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MOST_LABELS = 10_000  # a table of two sets of labels then takes a gigabyte


def numbers(name: str, value: Tensor | npt.ArrayLike) -> Tensor:
    """The numbers in double precision, which differences of entropies need, and without their gradient."""
    return _tensor(name, value, "numbers").double()


def float_dtype(value: Tensor | npt.ArrayLike) -> torch.dtype:
    """The precision in which to return a result: the precision of a tensor, otherwise double."""
    return value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else torch.float64


def probabilities(name: str, value: Tensor | npt.ArrayLike, shape: str, dim: int) -> Tensor:
    """Probabilities with ``dim`` dimensions that sum to 1 over the last dimension, in double precision."""
    probs = numbers(name, value)
    if probs.dim() != dim or probs.numel() == 0:
        raise ValueError(f"Expected {name} of shape {shape}, got {tuple(probs.shape)}")
    negative = probs[~(probs >= 0)]
    if len(negative):
        raise ValueError(f"Expected {name} to be probabilities, got {negative[0].item()}")
    totals = probs.sum(-1, keepdim=True)
    # The tolerance has room for the rounding of single precision, and none for scores that were never normalized.
    others = totals[~((totals - 1).abs() <= 1e-3)]
    if len(others):
        raise ValueError(f"Expected {name} to sum to 1 over components, got a sum of {others[0].item()}")
    return probs / totals


def integers(
    name: str,
    value: Tensor | npt.ArrayLike,
    *,
    shape: str = "(N,)",
    kind: str = "integers",
    smallest: float = -math.inf,
) -> Tensor:
    """The integers of shape (N,), N >= 1, from any dtype that holds whole numbers."""
    found = _tensor(name, value, kind)
    if found.dim() != 1 or len(found) == 0:
        raise ValueError(f"Expected {name} of shape {shape} with N >= 1, got {tuple(found.shape)}")
    double = found.double()
    others = double[~((double.abs() < 2.0**63) & (double == double.floor()) & (double >= smallest))]
    if len(others):
        raise ValueError(f"Expected {name} to be {kind}, got {others[0].item()}")
    whole = found.long()
    if len(whole) > _MOST_LABELS and (distinct := len(whole.unique())) > _MOST_LABELS:
        raise ValueError(f"Expected {name} to be {kind} with at most {_MOST_LABELS} different values, got {distinct}")
    return whole


def assignments(name: str, value: Tensor | npt.ArrayLike) -> Tensor:
    """Probabilities of shape (N, C) in double precision, or labels of shape (N,)."""
    found = _tensor(name, value, "numbers")
    if found.dim() != 1 or len(found) == 0:
        return probabilities(name, found, "(N,) or (N, C)", dim=2)
    return integers(name, found, kind="labels from 0 to C - 1", smallest=0)


def _tensor(name: str, value: Tensor | npt.ArrayLike, kind: str) -> Tensor:
    """The real numbers as a tensor without gradient."""
    if not isinstance(value, torch.Tensor):
        array = _array(name, value, kind)
        # A contiguous copy in a dtype of PyTorch, which takes no negative strides and warns of read-only arrays.
        numbers = torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64, order="C"))
        value = numbers.to(torch.empty(0).device)
    if value.is_complex():
        raise ValueError(f"Expected {name} to be real, got {value.dtype}")
    return value.detach()


def _array(name: str, value: npt.ArrayLike, kind: str) -> npt.NDArray[Any]:
    """The real numbers as an array of NumPy's own numbers."""
    if isinstance(value, list | tuple):
        value = [entry.numpy(force=True) if isinstance(entry, torch.Tensor) else entry for entry in value]
    try:
        array = np.asarray(value)
        # Columns of pandas can hold numbers as objects.
        array = np.array(array.tolist()) if array.dtype == object and array.ndim else array
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths
        raise ValueError(f"Expected {name} to be {kind}, got a {type(value).__name__} that is none: {error}") from error
    if array.dtype.kind not in "biuf":
        got = str(array.dtype) if array.dtype != object else f"a {type(value).__name__} of other objects"
        got = f"the class {value.__name__}" if isinstance(value, type) else "None" if value is None else got
        raise ValueError(f"Expected {name} to be {kind}, got {got}")
    if array.dtype.kind == "u" and array.size and array.max() >= 2**63:
        raise ValueError(f"Expected {name} to be {kind} below 2**63, got {array.max()}")
    return array
