"""The multilayer perceptron of encoders, backbones and plain decoders."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from pyro.nn import PyroModule
from torch import nn

__all__ = ["mlp"]

T = TypeVar("T")

# Type checkers cannot follow PyroModule[...], which makes classes at run time.
Linear: type[nn.Linear] = PyroModule[nn.Linear]  # type: ignore[assignment]
_Softplus: type[nn.Softplus] = PyroModule[nn.Softplus]  # type: ignore[assignment]
_Sequential: type[nn.Sequential] = PyroModule[nn.Sequential]  # type: ignore[assignment]


def unused(module: T) -> T:
    """Return the module, ready to become a part of another module even if it was called on its own before.

    Pyro refuses a part that was called on its own, because its parameters would have two names in the global param
    store. The first name does no harm: nothing reads it once the module is a part of another one.
    """
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(part, PyroModule) and not part._pyro_context.active:
            part._pyro_context.used = False
    return module


def mlp(in_features: int, hidden_features: Sequence[int], out_features: int) -> nn.Sequential:
    """A multilayer perceptron with softplus activations, made of PyroModules so that any weight can have a prior.

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
