"""The one engine that runs a model or its guide: what they are called with, and runs of several draws at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_ilvae import _checks

Program: TypeAlias = Callable[..., Any]  # a model or a guide
ModelArgs: TypeAlias = Tensor | tuple[Any, ...]


class Arguments(NamedTuple):
    """What a model and its guide are called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model_args: ModelArgs, model_kwargs: Mapping[str, Any] | None) -> Self:
        """The arguments, checked; a single tensor is short for a tuple of it."""
        if isinstance(model_args, Tensor):
            model_args = (model_args,)
        if not isinstance(model_args, tuple) or isinstance(model_args, PackedSequence):
            raise TypeError(f"Expected model_args to be a tensor or a tuple, got {_kind(model_args)}")
        if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
            raise TypeError(f"Expected model_kwargs to be a mapping from names, got {_kind(model_kwargs)}")
        return cls(model_args, dict(model_kwargs or {}))

    @property
    def num_data(self) -> int:
        """The number N of data, which is the first dimension of the first tensor that has one."""
        first = next((value for _, value in self._named() if isinstance(value, Tensor) and value.dim() > 0), None)
        if first is None:
            got = ", ".join(f"{name} = {_kind(value)}" for name, value in self._named()) or "no arguments"
            raise TypeError(f"Expected a tensor with data along its first dimension in model_args, got {got}")
        if len(first) == 0:
            raise ValueError("Expected at least one datum in model_args, got none")
        return len(first)

    def batches(self, batch_size: int | None) -> Iterator[Self]:
        """The arguments for ``batch_size`` data at a time: tensors over the data in parts, all others as they are."""
        num_data = self.num_data
        self._check_others(num_data)
        size = num_data if batch_size is None else _checks.positive_int("batch_size", batch_size)
        for start in range(0, num_data, size):
            yield self.select(slice(start, start + size)) if size < num_data else self

    def select(self, index: slice | Tensor) -> Self:
        """The arguments for some of the data."""
        num_data = self.num_data

        def selected(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_data):
                return value
            return value[index.to(value.device) if isinstance(index, Tensor) else index]

        return type(self)(
            tuple(selected(value) for value in self.args),
            {name: selected(value) for name, value in self.kwargs.items()},
        )

    def _named(self) -> list[tuple[str, Any]]:
        positional = [(f"model_args[{i}]", value) for i, value in enumerate(self.args)]
        return positional + [(f"model_kwargs[{name!r}]", value) for name, value in self.kwargs.items()]

    def _check_others(self, num_data: int) -> None:
        """Raise for an argument that seems to hold a value for each datum but is no tensor of them."""
        for name, value in self._named():
            holds = isinstance(value, PackedSequence) or (
                isinstance(value, np.ndarray | Sequence)
                and not isinstance(value, str | bytes)
                and np.ndim(value) != 0  # type: ignore[arg-type]
                and len(value) == num_data > 1
            )
            if holds:
                raise TypeError(
                    f"Expected {name} to be a tensor over the {num_data} data or something that all data share, got "
                    f"{_kind(value)} with values for the data"
                )


def _kind(value: object) -> str:
    return type(value).__name__
