"""What the models take as data: a tensor, what converts to one, or an iterable of batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.likelihoods import check_support

_DATA = "data at site 'x'"
_SMALL_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16)


def parts(x: Any) -> Iterator[Any]:
    """The batches of an iterable, such as a DataLoader or a list of tensors; anything else is a single batch."""
    if not _is_iterable_of_batches(x):
        yield x
        return
    found = False
    for batch in x:
        found = True
        # Data sets with labels give tuples, of which the data come first.
        yield batch[0] if isinstance(batch, tuple | list) and batch and hasattr(batch[0], "__array__") else batch
    if not found:
        raise ValueError(f"Expected {_DATA}, got an iterable without a batch")


def _is_iterable_of_batches(x: Any) -> bool:
    if isinstance(x, Tensor | str | bytes | Mapping | Set) or hasattr(x, "__array__") or hasattr(x, "toarray"):
        return False
    if isinstance(x, Sequence):
        return len(x) > 0 and isinstance(x[0], Tensor) and x[0].dim() > 1
    return isinstance(x, Iterable)


def as_tensor(x: Any) -> Tensor:
    """The data as a dense tensor with at least one datum."""
    x = _checks.tensor(_DATA, x)
    if x.layout != torch.strided:
        raise TypeError(f"Expected {_DATA} as a dense tensor, got {x.layout}; make it dense with .to_dense()")
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
