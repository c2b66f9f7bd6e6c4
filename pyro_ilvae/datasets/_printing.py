"""How named tuples of tensors print: their names and shapes, not their numbers."""

from typing import Any

from torch import Tensor


def names_and_shapes(data: Any) -> str:
    """The text of a named tuple in which dtype and shape stand for a tensor, without what is None."""
    fields = [f"{name}={_text(value)}" for name, value in zip(data._fields, data, strict=True) if value is not None]
    return f"{type(data).__name__}({', '.join(fields)})"


def _text(value: object) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    )
