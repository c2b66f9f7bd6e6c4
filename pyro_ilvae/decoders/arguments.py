"""Points that a user passes to a map or a decoder: dense, and of the dtype of its weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks

__all__ = ["dtype_of", "points", "points_of_shape", "without_autocast"]


def dtype_of(module: nn.Module, *path: str) -> torch.dtype | None:
    """The dtype of the parameters of a part; None if it has none of its own, as when all are drawn from priors."""
    # From the tables: to read an attribute of a PyroModule takes ten times as long, and may draw a parameter.
    for name in path:
        module = vars(module)["_modules"][name]
    for parameter in vars(module)["_parameters"].values():
        if parameter is not None:
            return parameter.dtype  # type: ignore[no-any-return]
    return None


def points(name: str, value: Any, size: int, dtype: torch.dtype | None) -> Tensor:
    """Return ``value`` as a tensor of shape (..., size) and of ``dtype``, or raise if that would change a value."""
    if not isinstance(value, Tensor) or value.dtype != dtype or value.layout != torch.strided:
        value = _converted(name, value, dtype)
    _checks.last_dim(name, value, size)
    return value


def points_of_shape(name: str, value: Any, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
    """Return ``value`` of shape (..., \\*shape) as a tensor of shape (..., D) and of ``dtype``, or raise."""
    value = _checks.tensor(name, value)
    split = value.dim() - len(shape)
    if split < 0 or value.shape[split:] != shape:
        expected = ", ".join(["...", *map(str, shape)])
        raise ValueError(f"Expected {name} of shape ({expected}), got {tuple(value.shape)}")
    return points(name, value.reshape(*value.shape[:split], shape.numel()), shape.numel(), dtype)


def _converted(name: str, value: Any, dtype: torch.dtype | None) -> Tensor:
    value = _checks.tensor(name, value)
    if dtype is None:
        return value
    if value.is_floating_point():
        if torch.promote_types(value.dtype, dtype) == dtype:
            return value.to(dtype)
        if _autocast_enabled(value.device.type) and value.dtype != torch.float64:
            return value.to(dtype)  # as autocast itself does with what a layer is given
    try:
        return _checks.tensor(name, value, dtype=dtype)
    except RuntimeError as error:  # vmap cannot look at values
        raise ValueError(f"Expected {name} of dtype {dtype}, got {value.dtype}; use .to({dtype})") from error


def _autocast_enabled(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # before PyTorch 2.4
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """For what the constant hangs on: a difference of points is lost where values are rounded to half precision."""
    return torch.autocast(device_type, enabled=False) if _autocast_enabled(device_type) else nullcontext()
