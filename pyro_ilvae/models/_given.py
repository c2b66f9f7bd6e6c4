"""What model and guide are given: data, and beside them a context, known shifts, and which entries are missing."""

from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks

_PARAMETERS = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


class Given(NamedTuple):
    """The checked arguments of model and guide, each with the data in its first dimension."""

    num_data: int
    x: Tensor | None = None  #: the data, with another value in place of what is missing
    context: Tensor | None = None  #: of shape (N, C), or as the network of the contexts takes it
    offset: Tensor | None = None  #: what is added to natural parameters, broadcasting with their shape
    mask: Tensor | None = None  #: False where an entry of x is missing
    target_context: Tensor | None = None  #: the context to decode in, where it is another one

    def batches(self, batch_size: int | None) -> Iterator["Given"]:
        """The same for ``batch_size`` data at a time; all at once if None."""
        if batch_size is None:
            yield self
            return
        size = _checks.positive_int("batch_size", batch_size)
        for start in range(0, self.num_data, size):
            rows = [None if part is None else part[start : start + size] for part in self[1:]]
            yield Given(min(size, self.num_data - start), *rows)


def takes(part: Any, name: str, attribute: str) -> bool:
    """Whether a part of a model is called with an argument of that name: by its own attribute, or its signature."""
    own = getattr(part, attribute, part)
    if own is not part:
        return own is not None and own is not False
    try:
        found = signature(getattr(part, "forward", part)).parameters.get(name)
    except (TypeError, ValueError):  # no signature is known
        return False
    return found is not None and found.kind in _PARAMETERS


def are_labels(value: Any) -> bool:
    """Whether a context is given as ints, one for each datum or one for all."""
    if _checks.is_int(value):
        return True
    value = _checks.tensor("context", value)
    return not value.is_floating_point() and value.dtype != torch.bool and value.dim() <= 1


def checked_context(
    name: str, value: Any, num_data: int, like: Tensor, width: int | None, *, network: Any = None, repeat: bool = False
) -> Tensor:
    """A context of each datum, in the dtype and on the device of ``like``.

    Args:
        name: the name of the argument.
        value: the context of shape (N, C), or labels of shape (N,), which become indicators without a network.
        num_data: the number N of data.
        like: a tensor.
        width: the width C, if it is known.
        network: a network of the user's that takes the context, of any width and with labels as ints.
        repeat: whether one context may stand for all data: a label, or without a network numbers of shape (C,).
    """
    if repeat and not isinstance(value, Tensor) and _checks.is_int(value):
        value = torch.tensor(index(value))
    value = _checks.tensor(name, value)
    if value.is_complex():
        raise ValueError(f"Expected {name} to hold real numbers, got {value.dtype}")
    value = value.to(like.device)
    labels = are_labels(value)
    if repeat and (value.dim() == 0 if labels else value.dim() == 1 and network is None):
        value = value.expand(num_data, *value.shape)
    columns = "C" if width is None or network is not None else width
    expected = (
        f"({num_data}, {columns}), or ints of shape ({num_data},) as labels{', or one for all' if repeat else ''}"
    )
    if value.dim() == 0 or len(value) != num_data:
        raise ValueError(f"Expected {name} of shape {expected}, one for each datum, got {tuple(value.shape)}")
    largest = getattr(network, "num_embeddings", width if network is None else None)
    if labels:
        _check_labels(name, value, largest, expected)
        if network is not None:
            return value.long()
        if largest is None:
            raise ValueError(f"Expected {name} to hold numbers for a decoder of unknown context_dim, got labels")
        # PyTorch's one_hot reads values, which a recorded graph cannot.
        return (value.unsqueeze(-1) == torch.arange(largest, device=value.device)).to(like.dtype)
    if hasattr(network, "num_embeddings"):
        raise ValueError(f"Expected {name} to hold ints, the labels of a {type(network).__name__}, got {value.dtype}")
    if network is None and (value.dim() != 2 or width not in (None, value.shape[1])):
        raise ValueError(f"Expected {name} of shape {expected}, got {tuple(value.shape)}")
    value = value.to(like.dtype)
    if not value.isfinite().all():
        raise ValueError(f"Expected {name} to hold finite numbers, got NaN or infinity")
    return value


def _check_labels(name: str, labels: Tensor, number: int | None, expected: str) -> None:
    """Raise unless labels are below a number, if it is known."""
    if number is None:
        return
    if number == 1 or ((labels < 0) | (labels >= number)).any():
        raise ValueError(
            f"Expected {name} of shape {expected}, with labels from 0 to {number - 1}, got ints from "
            f"{int(labels.min())} to {int(labels.max())}"
        )


def checked_offset(value: Any, num_data: int, like: Tensor, event_shape: torch.Size) -> Tensor:
    """Shifts of natural parameters that broadcast with (N, \\*event_shape), in the dtype of ``like``."""
    offset = _checks.tensor("offset", value)
    if offset.is_complex():
        raise ValueError(f"Expected offset to hold real numbers, got {offset.dtype}")
    offset = offset.to(like.device, like.dtype)
    own, dims = offset.shape, len(event_shape)
    if offset.dim() == 1:
        offset = offset.reshape(-1, *(1,) * dims)
    fits = offset.dim() == dims + 1 and len(offset) == num_data
    if not fits or any(size not in (1, other) for size, other in zip(offset.shape[1:], event_shape, strict=True)):
        expected = ", ".join(map(str, (num_data, *event_shape)))
        raise ValueError(
            f"Expected offset of shape ({num_data},), one for each datum, or ({expected}), got {tuple(own)}"
        )
    if not offset.isfinite().all():
        raise ValueError(
            "Expected offset to hold finite numbers, such as the log of a size above 0, got NaN or infinity"
        )
    return offset


def without_missing(x: Tensor, mask: Any, likelihood: Callable[..., Any], ignore: bool) -> tuple[Tensor, Tensor | None]:
    """The data with another value where they are missing, and a mask that is False there; None where none can be.

    Args:
        x: the data.
        mask: booleans of the shape of the data, False for missing entries, or None.
        likelihood: the likelihood, in whose support the other values lie.
        ignore: whether NaN are missing entries.
    """
    found = None if mask is None else _checks.mask("mask", mask, x.shape).to(x.device)
    if ignore and x.is_floating_point():
        found = ~x.isnan() if found is None else found & ~x.isnan()
    if found is None:
        return x, None
    empty = ~found.reshape(len(found), -1).any(1)
    if empty.any():
        raise ValueError(
            "Expected at least one entry of each datum at site 'x' that is neither NaN nor False in mask, got "
            f"{int(empty.sum())} data without any, the first in row {int(empty.nonzero()[0])}: leave them out"
        )
    support = getattr(likelihood, "support", None)
    if support is not None and support.check(x.new_zeros(())).all():
        return torch.where(found, x, x.new_zeros(())), found
    # An entry of the same datum lies in the support, whatever that is. The shapes are the same for all masks.
    rows, there = x.reshape(len(x), -1), found.reshape(len(x), -1)
    other = rows.gather(1, there.int().argmax(1, keepdim=True))
    return torch.where(there, rows, other).reshape(x.shape), found
