"""What the models take as data: a tensor, what converts to one, or an iterable of batches."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.likelihoods import check_support

_DATA = "data at site 'x'"
_SMALL_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16)


def parts(x: Any, shapes: Collection[torch.Size], event_dim: int) -> Iterator[tuple[Any, bool]]:
    """The batches of an iterable, such as a DataLoader or a list of tensors; anything else is a single batch.

    Each comes with whether it is the batch of an iterable, which may hold more than data.

    Args:
        x: the data.
        shapes: the shapes that one datum is known to have, if any.
        event_dim: the number of dimensions that one datum has at most.
    """
    if not _is_iterable_of_batches(x, shapes, event_dim):
        yield x, False
        return
    found = False
    for batch in x:
        found = True
        yield batch, True
    if not found:
        raise ValueError(f"Expected {_DATA}, got an iterable without a batch")


def _is_iterable_of_batches(x: Any, shapes: Collection[torch.Size], event_dim: int) -> bool:
    if isinstance(x, Tensor | str | bytes | memoryview | Mapping | Set) or hasattr(x, "__array__"):
        return False
    if not isinstance(x, Sequence):
        return isinstance(x, Iterable) and not hasattr(x, "toarray")
    # A sequence can also hold the data one by one, as lists of numbers do.
    first: Any = x[0] if len(x) > 0 else None
    if isinstance(first, Mapping):
        return True
    with_labels = isinstance(first, tuple | list) and len(first) > 0
    shape = getattr(first[0] if with_labels else first, "shape", None)
    if not isinstance(shape, tuple):  # of a tensor, an array or a data frame
        return False
    if shape in shapes or shape[1:] in shapes:
        return shape not in shapes
    return len(shape) > (1 if isinstance(first, Tensor) else event_dim)


def refuse_single_datum(x: Tensor, shapes: Collection[torch.Size]) -> None:
    """Raise if ``x`` has the shape of one datum, whose first dimension would be taken for the data."""
    if x.shape in shapes:
        expected = ", ".join(["N", *map(str, x.shape)])
        raise ValueError(
            f"Expected {_DATA} of shape ({expected}), got {tuple(x.shape)}: give a single datum a batch dimension by "
            "x[None]"
        )


def as_tensor(x: Any) -> Tensor:
    """The data as a dense tensor with at least one datum."""
    x = _checks.tensor(_DATA, x)
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # for which PyTorch has few operations
        x = x.to(torch.int64)
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"Expected {_DATA} as a tensor of shape (N, ...) with N >= 1, got {tuple(x.shape)}")
    return x


def in_support(x: Tensor, likelihood: object, like: Tensor) -> Tensor:
    """The data, checked to be in the likelihood's support, in the dtype and on the device of ``like``.

    Data of a likelihood of integers become integers. No density of PyTorch takes booleans, and few take integers.
    """
    if x.is_complex():
        raise ValueError(f"Expected {_DATA} of dtype {like.dtype}, got {x.dtype}")
    check_support(likelihood, x, "x")
    x = x.to(like.device)
    if getattr(likelihood, "integer_data", False):
        return _checks.tensor(_DATA, x, dtype=torch.int64) if x.is_floating_point() else x
    # Floats hold small integers exactly, and looking at each of them again would cost every step of training.
    return x.to(like.dtype) if x.dtype in _SMALL_INTEGERS else _checks.tensor(_DATA, x, dtype=like.dtype)


def as_tokens(x: Any, device: torch.device) -> Tensor:
    """The data as int64 of shape (N, T)."""
    x = as_tensor(x)
    if x.dim() != 2:
        raise ValueError(f"Expected {_DATA} as a tensor of tokens of shape (N, T) with N >= 1, got {tuple(x.shape)}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"Expected {_DATA} of dtype torch.int64, got {x.dtype}")
    return x.to(device, torch.int64)
