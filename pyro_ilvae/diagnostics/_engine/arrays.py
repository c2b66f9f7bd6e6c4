"""Checks of tensors that users pass in."""

from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks


def check_finite(name: str, value: Tensor) -> None:
    """Raise unless all numbers are finite."""
    if not value.isfinite().all():
        raise ValueError(f"Expected {name} to be finite, got {int((~value.isfinite()).sum())} NaN or infinite values")


def check_divergences(kl: Any, *, dim: int, shape: str) -> Tensor:
    """Return divergences of at least one datum, none of them NaN, as a tensor of floating point."""
    if hasattr(kl, "standard_errors"):
        raise TypeError(f"Expected kl to be a tensor, got a {type(kl).__name__}: pass its .values")
    kl = _checks.tensor("kl", kl)
    if kl.dtype == torch.bool or kl.is_complex():
        raise ValueError(f"Expected kl of real numbers, got {kl.dtype}")
    kl = kl.to(torch.promote_types(kl.dtype, torch.get_default_dtype())) if not kl.is_floating_point() else kl
    if kl.dim() < dim or len(kl) == 0:
        raise ValueError(f"Expected kl of shape {shape} with N >= 1, got {tuple(kl.shape)}")
    if kl.isnan().any():
        raise ValueError(f"Expected kl without NaN, got {int(kl.isnan().sum())} of them")
    return kl
