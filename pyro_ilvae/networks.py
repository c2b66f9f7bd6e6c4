"""The ordinary network that encoders, backbones and plain decoders are built from."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from pyro.nn import PyroModule
from torch import nn

__all__ = ["mlp"]

T = TypeVar("T")

# PyroModule[...] makes classes at run time, which type checkers cannot follow.
Linear: type[nn.Linear] = PyroModule[nn.Linear]  # type: ignore[assignment]
_Softplus: type[nn.Softplus] = PyroModule[nn.Softplus]  # type: ignore[assignment]
_Sequential: type[nn.Sequential] = PyroModule[nn.Sequential]  # type: ignore[assignment]


def unused(module: T) -> T:
    """The module itself, ready to become a part of another one although it may have been called by itself.

    Pyro asserts that a part was never called on its own, since its parameters would have two names in the global
    store. The earlier name is never read again once the part belongs to a whole.
    """
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(part, PyroModule) and not part._pyro_context.active:
            part._pyro_context.used = False
    return module


def mlp(in_features: int, hidden_features: Sequence[int], out_features: int) -> nn.Sequential:
    """A multilayer perceptron with softplus activations, of PyroModules so that a prior can be put on any weight.

    Args:
        in_features: the width of the input.
        hidden_features: the widths of the hidden layers; empty for an affine map.
        out_features: the width of the output.

    Returns:
        A ``PyroModule[nn.Sequential]`` from (..., in_features) to (..., out_features).

    Example:
        >>> import torch
        >>> mlp(2, (16,), 3)(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """
    sizes = [in_features, *hidden_features]
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [Linear(wide, narrow), _Softplus()]
    layers.append(Linear(sizes[-1], out_features))
    return _Sequential(*layers)
