"""What a model and its guide are called with, and parts of it for some of the data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple, Self, TypeAlias

import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from pyro_ilvae import _checks

#: a tuple, a single tensor or array, or an iterable of batches
ModelArgs: TypeAlias = Tensor | tuple[Any, ...] | npt.ArrayLike | Iterable[Any]


class Arguments(NamedTuple):
    """What a model and its guide are called with.

    The number N of data is ``size``, or else the first dimension of the first tensor that has one. Batches hold parts
    of the tensors whose first dimension is N, and everything else as it is.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int | None = None  #: the number N of data where it is known otherwise

    @classmethod
    def of(cls, model_args: ModelArgs, model_kwargs: Mapping[str, Any] | None) -> Self:
        """Return the arguments, checked; a single tensor or array is short for a tuple of that tensor."""
        return cls(_positional(model_args), keywords("model_kwargs", model_kwargs))

    @property
    def num_data(self) -> int:
        """The number N of data."""
        size = self.size if self.size is not None else next(iter([*self.sizes, *self._lengths]), None)
        if size is None:
            self.check_others(None)
            got = ", ".join(f"{name} = {_kind(value)}" for name, value in self._named()) or "no arguments"
            raise TypeError(f"Expected a tensor with data along its first dimension in model_args, got {got}")
        if size == 0:
            raise ValueError("Expected at least one datum in model_args, got none")
        return size

    @property
    def sizes(self) -> list[int]:
        """The first dimensions of the tensors, each once."""
        return list(dict.fromkeys(len(value) for _, value in self._named() if _has_rows(value)))

    @property
    def _lengths(self) -> list[int]:
        """The lengths of the lists of tensors, which hold one for each datum if no tensor holds the data."""
        return [len(value) for _, value in self._named() if _is_list_of_tensors(value)]

    @property
    def described(self) -> str:
        """The arguments in words, tensors by their shapes."""
        named = [(str(i), value) for i, value in enumerate(self.args)] + list(self.kwargs.items())
        shapes = [f"{n}: {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for n, v in named]
        return f"({', '.join(shapes)})"

    def in_order(self) -> Self:
        """Return the same arguments, whose data have an order."""
        return self

    def batches(self, batch_size: int | None) -> Iterator[Self]:
        """Yield the arguments for ``batch_size`` data at a time, or for all data if that is None."""
        num_data = self.num_data
        size = num_data if batch_size is None else _checks.positive_int("batch_size", batch_size)
        if size >= num_data:
            self.check_others(num_data, split=False)
            yield self
            return
        for start in range(0, num_data, size):
            yield self.select(slice(start, start + size))

    def select(self, index: slice | Tensor) -> Self:
        """Return the arguments for some of the data."""
        num_data = self.num_data
        known = self.size is not None or bool(self.sizes)
        self.check_others(num_data if known else None, lists=True)
        if num_data not in self.sizes:
            raise ValueError(
                f"Expected the {num_data} data in model_args where a part of them is asked for, as by batch_size, got "
                f"tensors with first dimensions {self.sizes}"
            )

        def over_data(value: Any) -> bool:
            return _has_rows(value) and len(value) == num_data

        def selected(value: Any) -> Any:
            if not over_data(value):
                return value
            return value[index.to(value.device) if isinstance(index, Tensor) else index]

        size = None
        if self.size is not None:
            size = len(selected(next(value for _, value in self._named() if over_data(value))))
        return type(self)(
            tuple(selected(value) for value in self.args),
            {name: selected(value) for name, value in self.kwargs.items()},
            size,
        )

    def _named(self) -> list[tuple[str, Any]]:
        positional = [(f"model_args[{i}]", value) for i, value in enumerate(self.args)]
        return positional + [(f"model_kwargs[{name!r}]", value) for name, value in self.kwargs.items()]

    def check_others(self, num_data: int | None, *, split: bool = True, lists: bool = False) -> None:
        """Raise for an argument that is no tensor but seems to hold a value for each datum; None: for any number.

        If the data are not ``split``, only a packed sequence is refused, whose data are in an order of their own. For
        any number, lists of tensors are refused only where ``lists`` is True.
        """
        for name, value in self._named():
            size = _num_values(value)
            of_any = size > 0 and (lists or not _is_list_of_tensors(value))
            holds = of_any if num_data is None else size == num_data > 1
            if isinstance(value, PackedSequence) or (split and holds):
                over = "the data" if num_data is None else f"the {num_data} data"
                hint = "" if isinstance(value, PackedSequence) else "; convert it with torch.as_tensor(...)"
                raise TypeError(
                    f"Expected {name} to be a tensor over {over} or something that all data share, got {_kind(value)} "
                    f"of {size} values{hint}"
                )


def keywords(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return keyword arguments as a dictionary."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"Expected {name} to be a mapping from names, got {_kind(value)}")
    for key in value or ():
        if not isinstance(key, str):
            raise TypeError(f"Expected {name} to be a mapping from names, got the key {key!r}")
    return dict(value or {})


def are_batches(model_args: ModelArgs) -> bool:
    """Whether ``model_args`` is an iterable of batches that can be iterated again."""
    if isinstance(model_args, Tensor | tuple | str | bytes | Mapping | Set | nn.Module | Dataset | Iterator):
        return False
    if isinstance(model_args, Sequence):
        # A list of tensors may be meant as one call or as several.
        return not isinstance(model_args, memoryview) and len(model_args) > 0 and all(map(_is_call, model_args))
    is_numbers = hasattr(model_args, "__array__") or hasattr(model_args, "toarray")
    return isinstance(model_args, Iterable) and not (is_numbers or isinstance(model_args, type))


def _is_call(value: object) -> bool:
    """Whether a tuple, a list or a mapping holds arguments, rather than numbers."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, tuple | list) and any(map(is_array, value))


def is_array(value: object) -> bool:
    """Whether the value is a tensor, an array, or what becomes one, as columns of pandas do, with a dimension."""
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def _positional(model_args: Any) -> tuple[Any, ...]:
    """The positional arguments that a tuple, a tensor or numbers stand for."""
    if isinstance(model_args, tuple) and not isinstance(model_args, PackedSequence):
        return model_args
    if isinstance(model_args, Tensor):
        return (model_args,)
    hint = ""
    if isinstance(model_args, list) and any(map(is_array, model_args)):
        hint = " of tensors: pass a tuple for one call with all of them, or a list of tuples for a call with each"
    elif isinstance(model_args, Mapping):
        hint = ": pass keyword arguments as model_kwargs"
    elif isinstance(model_args, Dataset):
        hint = ": pass a DataLoader of it, or its tensors"
    elif isinstance(model_args, Iterator):
        hint = ", whose batches can be read only once: pass a DataLoader or a list of tuples"
    elif are_batches(model_args):
        hint = ": all data are needed in one call here, as tensors"
    elif isinstance(model_args, PackedSequence):
        pass  # Its data are in an order of their own.
    elif isinstance(model_args, Sequence) or hasattr(model_args, "__array__") or hasattr(model_args, "toarray"):
        return (_checks.tensor("model_args", model_args),)
    raise TypeError(f"Expected model_args to be a tensor or a tuple, got {_kind(model_args)}{hint}")


def _has_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _num_values(value: Any) -> int:
    """The number of values in a sequence or an array; 0 for anything else, tensors included."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, Tensor | str | bytes) or not (is_array(value) or isinstance(value, Sequence)):
        return 0
    return len(value)


def _is_list_of_tensors(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and not isinstance(value, PackedSequence)
    return is_list and len(value) > 0 and all(isinstance(part, Tensor) for part in value)


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
