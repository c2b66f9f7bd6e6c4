"""How much memory a computation takes, so that passes can be as large as memory allows and no larger."""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ilvae._contexts import seeded

MOST_BYTES = 2**28  # that the tensors of one pass may take, unless a caller says otherwise


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in its context.

    They include the activations of all layers, which a graph of gradients keeps, and are more than what is in memory at
    a time without gradients.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _makes_tensors(func):
            if isinstance(result, Tensor):
                self.bytes += result.nbytes
            elif isinstance(result, tuple | list):
                self.bytes += sum(value.nbytes for value in result if isinstance(value, Tensor))
        return result


@cache
def _makes_tensors(func: Any) -> bool:
    """Whether the results of an operation are new, rather than views or what it changed in place."""
    schema = getattr(func, "_schema", None)
    return schema is None or all(value.alias_info is None for value in schema.returns)


def fitting_rows(compute: Callable[[Tensor], Any], rows: Tensor) -> int:
    """The number of rows that ``compute`` can be called with at a time in bounded memory, at least 1."""
    taken = []
    with seeded(0):  # so that no draw of the caller's is used up
        for count in (1, 2):
            with Allocations() as allocations:
                compute(rows[:count])
            taken.append(allocations.bytes)
    return max(1, MOST_BYTES // max(1, taken[1] - taken[0]))
