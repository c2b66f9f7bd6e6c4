"""Checks of tensors that users pass in."""

from torch import Tensor


def check_finite(name: str, value: Tensor) -> None:
    """Raise unless all numbers are finite."""
    if not value.isfinite().all():
        raise ValueError(f"Expected {name} to be finite, got {int((~value.isfinite()).sum())} NaN or infinite values")


def check_divergences(kl: Tensor, *, dim: int, shape: str) -> None:
    """Raise unless there are divergences of at least one datum, none of them NaN."""
    if kl.dim() < dim or len(kl) == 0:
        raise ValueError(f"Expected kl of shape {shape} with N >= 1, got {tuple(kl.shape)}")
    if kl.isnan().any():
        raise ValueError(f"Expected kl without NaN, got {int(kl.isnan().sum())} of them")
