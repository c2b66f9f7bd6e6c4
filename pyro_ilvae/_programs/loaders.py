"""What a model and its guide are called with, from an iterable of batches such as a ``DataLoader``."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from pyro_ilvae._programs.arguments import Arguments, is_array, keywords


class ArgumentsInBatches:
    """What a model and its guide are called with for each batch of an iterable, without holding several batches.

    A batch is a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Args:
        loader: the iterable, which is iterated again for each pass over the data.
        model_kwargs: keyword arguments that all batches share.
        resolve: a function that returns the arguments of a batch, and its number of data, from both kinds of arguments.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        model_kwargs: Mapping[str, Any] | None,
        resolve: Callable[[Any, Mapping[str, Any]], Arguments],
    ) -> None:
        self.args, self.kwargs, self._resolve = loader, keywords("model_kwargs", model_kwargs), resolve
        self._size: int | None = None
        self._digests: list[int] | None = None
        self._in_order = False
        self._selected: Tensor | None = None

    @property
    def num_data(self) -> int:
        """The number N of data, found by iterating."""
        if self._size is None:
            for _ in self._parts():
                pass
        assert self._size is not None
        return self._size

    def batches(self, batch_size: int | None) -> Iterator[Arguments]:
        """Yield the arguments for each batch, or for ``batch_size`` data of a batch at a time."""
        start = 0
        for part in self._parts():
            stop = start + part.num_data
            if self._selected is None:
                yield from part.batches(batch_size)
            else:
                inside = (self._selected >= start) & (self._selected < stop)
                if inside.any():
                    yield from part.select(self._selected[inside] - start).batches(batch_size)
            start = stop

    def in_order(self) -> Self:
        """Return the same batches, which raise if one iteration gives other data or another order than another."""
        self._in_order = True
        return self

    def select(self, index: Tensor) -> Self:
        """Return the arguments for some of the data, whose numbers are in ascending order."""
        other = type(self)(self.args, self.kwargs, self._resolve)
        other._size, other._digests, other._in_order, other._selected = self._size, self._digests, True, index
        return other

    def _parts(self) -> Iterator[Arguments]:
        size, digests = 0, []
        for batch in self.args:
            part = self._arguments(batch)
            size += part.num_data
            if self._in_order:
                digests.append(_digest(part))
                if self._digests is not None and digests != self._digests[: len(digests)]:
                    raise ValueError(
                        "Expected model_args to give the same batches in the same order in each iteration, got others "
                        "in a second one: use a loader without shuffling and without random changes of the data"
                    )
            yield part
        if size == 0:
            raise ValueError("Expected at least one batch in model_args, got none")
        if self._size not in (None, size):
            raise ValueError(
                f"Expected model_args to give the same data in each iteration, got {self._size} data and then {size}"
            )
        self._size = size
        if self._in_order:
            self._digests = digests

    def _arguments(self, batch: Any) -> Arguments:
        if isinstance(batch, Mapping):
            own = keywords("a batch of model_args", batch)
            if both := own.keys() & self.kwargs.keys():
                raise ValueError(f"Expected names in model_kwargs that no batch of model_args has, got {sorted(both)}")
            return self._resolve((), own | self.kwargs)
        if isinstance(batch, list) and any(map(is_array, batch)):  # as a DataLoader makes of a tuple
            batch = tuple(batch)
        return self._resolve(batch, self.kwargs)


def _digest(arguments: Arguments) -> int:
    """A number that two batches have in common if and, almost certainly, only if their tensors are the same."""
    values = (*arguments.args, *arguments.kwargs.values())
    return hash(tuple((value.shape, _bytes(value)) for value in values if isinstance(value, Tensor)))


def _bytes(value: Tensor) -> bytes:
    value = value.to_dense() if value.layout != torch.strided else value
    value = value.float() if value.dtype == torch.bfloat16 else value  # which NumPy does not know
    return value.numpy(force=True).tobytes()
