"""What a CUDA graph does, on a CPU: the operations of a function run again, in the memory where they ran first."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = _as_now((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, *given, _as_now(result)))
        return result


def _as_now(values):
    """Lists and tensors, in the same memory, whose length and shape no later operation changes."""
    return pytree.tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, values)


def replayed(function, device):
    """What runs the operations of a function again, without its Python code."""
    function()  # as a trial before a capture does
    with _Operations() as operations:
        function()

    @torch.no_grad()
    def replay():
        for func, args, kwargs, result in operations.calls:
            again = func(*args, **kwargs)
            for new, old in zip(pytree.tree_leaves(again), pytree.tree_leaves(result), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)

    return replay
