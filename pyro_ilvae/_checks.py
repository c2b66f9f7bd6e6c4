"""Checks of what a user passes in: each check raises where the value enters and names the argument."""

import math
import os
from collections.abc import Sequence
from inspect import signature
from operator import index
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex, TypeVar

import numpy as np
import torch

_T = TypeVar("_T")


def tensor(name: str, value: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return ``value`` as a dense tensor, of ``dtype`` if that is given.

    Arrays, data frames and nested lists of numbers are converted; floats in lists take the default dtype, as
    ``torch.tensor`` does. A conversion to ``dtype`` that would change a value raises.
    """
    if not isinstance(value, torch.Tensor):
        value = _from_array(name, value)
    elif value.layout != torch.strided:
        layout = value.layout
        raise TypeError(
            f"Expected {name} to be a dense tensor, got one of layout {layout}; make it dense by .to_dense()"
        )
    if dtype is None or value.dtype == dtype:
        return value
    converted = value if value.is_complex() else value.to(dtype)
    # Two infinities are equal and two NaNs are not.
    if value.is_complex() or not ((converted.to(value.dtype) == value) | value.isnan()).all():
        raise ValueError(
            f"Expected {name} of dtype {dtype}, got {value.dtype} with values that {dtype} does not hold exactly; "
            f"convert with .to({dtype})"
        )
    return converted


def real(name: str, value: Any) -> torch.Tensor:
    """Return ``value`` as a floating-point tensor, of the default dtype if it holds integers."""
    found = tensor(name, value)
    if found.is_complex():
        raise ValueError(f"Expected {name} to be real, got {found.dtype}")
    return found if found.is_floating_point() else found.to(torch.get_default_dtype())


def instance(name: str, value: _T, types: type | tuple[type, ...], kind: str) -> _T:
    """Return ``value`` if it is an object of one of the types, which ``kind`` says in words."""
    if not isinstance(value, types):
        raise TypeError(f"Expected {name} to be {kind}, got {_got(value)}")
    return value


def function(name: str, value: _T, kind: str = "a function") -> _T:
    """Return ``value`` if it can be called and is not a class, whose call would make an object."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"Expected {name} to be {kind}, got {_got(value)}")
    return value


def takes(name: str, value: _T, *arguments: str) -> _T:
    """Return the function ``value`` if it can be called with that many arguments, as far as its signature is known."""
    try:
        signature(value).bind(*arguments)  # type: ignore[arg-type]
    except ValueError:  # no signature is known
        pass
    except TypeError as error:
        raise TypeError(f"Expected {name} to be a function of {', '.join(arguments)}, got one with {error}") from error
    return value


def path(name: str, value: str | os.PathLike[str]) -> Path:
    """Return ``value`` as a path if it names a file or a folder."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"Expected {name} to be a path, got {_got(value)}")
    return Path(value)


def boolean(name: str, value: bool) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"Expected {name} to be True or False, got {value!r}")
    return bool(value)


def positive_int(name: str, value: int, *, at_least: int = 1) -> int:
    """Return ``value`` if it is an int of at least ``at_least``."""
    if not is_int(value) or index(value) < at_least:
        raise ValueError(f"Expected {name} to be an int >= {at_least}, got {value!r}")
    return index(value)


def index_below(name: str, value: int, size: int) -> int:
    """Return ``value`` if it is an int from 0 to ``size`` - 1."""
    if not is_int(value) or not 0 <= index(value) < size:
        raise ValueError(f"Expected {name} to be an int from 0 to {size - 1}, got {value!r}")
    return index(value)


def seed(value: int | None) -> int | None:
    """Return ``value`` if it is None or an int that a generator of PyTorch takes."""
    if value is not None and not (is_int(value) and -(2**63) <= index(value) < 2**64):
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


def device(name: str, value: torch.device | str) -> torch.device:
    """Return ``value`` as a device."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"Expected {name} to be a device, such as 'cuda', got {value!r}") from error


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


def context(value: torch.Tensor | None, size: int | None, kind: str = "a decoder") -> None:
    """Raise unless ``value`` is a context of shape (..., size), or None if ``size`` is None."""
    if size is None:
        if value is not None:
            raise ValueError(
                f"Expected no context for {kind} without context_dim, got one of shape {tuple(value.shape)}"
            )
        return
    if value is None:
        raise ValueError(f"Expected context of shape (..., {size}), got None")
    last_dim("context", value, size)


def is_int(value: object) -> bool:
    """Whether ``value`` is a single integer of Python, NumPy or PyTorch, and no boolean."""
    # NumPy's integers are SupportsIndex and not int. Arrays and tensors are SupportsIndex too: index() refuses them
    # unless they hold a single integer.
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    try:
        index(value)
    except TypeError:
        return False
    return True


def mask(name: str, value: Any, shape: torch.Size) -> torch.Tensor:
    """Return ``value`` as booleans of this shape."""
    found = tensor(name, value)
    if found.dtype != torch.bool:
        raise ValueError(f"Expected {name} to hold booleans, True where an entry is there, got {found.dtype}")
    if found.shape != shape:
        raise ValueError(f"Expected {name} of shape {tuple(shape)}, as the data, got {tuple(found.shape)}")
    return found


def _from_array(name: str, value: Any) -> torch.Tensor:
    """A tensor from numbers in an array, a data frame or nested lists."""
    kind = "a tensor, an array or nested lists of numbers"
    is_array = hasattr(value, "__array__") or isinstance(value, Sequence)
    if isinstance(value, str | bytes) or not is_array:
        hint = "; make it dense with .toarray()" if hasattr(value, "toarray") else ""
        raise TypeError(f"Expected {name} to be {kind}, got {_got(value)}{hint}")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths, tensors that need gradients
        raise TypeError(f"Expected {name} to be {kind}, got a {type(value).__name__} that is none: {error}") from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"Expected {name} to be {kind}, got a {type(value).__name__} of dtype {array.dtype}")
    # A memoryview is a sequence too, but one with a dtype.
    if isinstance(value, Sequence) and not isinstance(value, memoryview) and array.dtype.kind == "f":
        return torch.tensor(array, dtype=torch.get_default_dtype())
    # A copy, because an array can be read-only, in another byte order, or run backwards.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C")).to(torch.empty(0).device)


def _got(value: object) -> str:
    """What was passed, in words, with what is probably meant."""
    if isinstance(value, type):
        return f"the class {value.__name__}: pass an object of it, such as {value.__name__}(...)"
    return "None" if value is None else f"a {type(value).__name__}"


def _number(value: object) -> float:
    """The value as a float, or NaN if ``value`` is not a single number."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat) or getattr(value, "ndim", 0) != 0:
        return math.nan
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):  # for example a complex tensor
        return math.nan
