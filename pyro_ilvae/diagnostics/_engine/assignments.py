"""What a mixture makes of its components: which are used, which coincide, and which are the same in another fit."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def _double(name: str, value: Tensor | npt.ArrayLike) -> Tensor:
    """The numbers in double precision, which differences of entropies need, and without their gradient."""
    if not isinstance(value, torch.Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"Expected {name} to be numbers, got {array.dtype}")
        # A contiguous copy, because PyTorch takes no negative strides and warns of arrays that are read-only.
        value = torch.from_numpy(array.astype(np.float64, order="C"))
    if value.is_complex():
        raise ValueError(f"Expected {name} to be real, got {value.dtype}")
    return value.detach().double()


def _dtype(value: Tensor | npt.ArrayLike) -> torch.dtype:
    return value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else torch.float64


def _probabilities(name: str, value: Tensor | npt.ArrayLike, shape: str, dim: int) -> Tensor:
    """Probabilities of so many dimensions that sum to 1 over the last in double precision."""
    probs = _double(name, value)
    if probs.dim() != dim or probs.numel() == 0:
        raise ValueError(f"Expected {name} of shape {shape}, got {tuple(probs.shape)}")
    negative = probs[~(probs >= 0)]
    if len(negative):
        raise ValueError(f"Expected {name} to be probabilities, got {negative[0].item()}")
    totals = probs.sum(-1, keepdim=True)
    # Room for the rounding of single precision, not for scores that were never normalized.
    others = totals[~((totals - 1).abs() <= 1e-3)]
    if len(others):
        raise ValueError(f"Expected {name} to sum to 1 over components, got a sum of {others[0].item()}")
    return probs / totals


def _assignments(name: str, value: Tensor | npt.ArrayLike) -> Tensor:
    """Probabilities of shape (N, C) in double precision, or labels of shape (N,) as integers."""
    numbers = _double(name, value)
    if numbers.dim() != 1 or len(numbers) == 0:
        return _probabilities(name, value, "(N,) or (N, C)", dim=2)
    others = numbers[~((numbers >= 0) & (numbers == numbers.floor()) & numbers.isfinite())]
    if len(others):
        raise ValueError(f"Expected {name} to be labels from 0 to C - 1, got {others[0].item()}")
    return numbers.long()
