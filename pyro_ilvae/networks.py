"""The multilayer perceptron of encoders, backbones and plain decoders."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["mlp"]

T = TypeVar("T")

# Type checkers cannot follow PyroModule[...], which makes classes at run time.
_PyroLinear: type[nn.Linear] = PyroModule[nn.Linear]  # type: ignore[assignment]
_Softplus: type[nn.Softplus] = PyroModule[nn.Softplus]  # type: ignore[assignment]
_Sequential: type[nn.Sequential] = PyroModule[nn.Sequential]  # type: ignore[assignment]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; the batch dimensions of a weight drawn from a prior broadcast with the batch dimensions of x."""
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return F.linear(x, weight, bias)
    product = (x.unsqueeze(-2) @ weight.mT).squeeze(-2)
    return product if bias is None else product + bias


class Linear(_PyroLinear):  # type: ignore[valid-type, misc]
    """PyTorch's layer, which also takes draws of a weight or bias from a prior, with batch dimensions on the left."""

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, for ``x`` of shape (..., in_features)."""
        return linear(x, self.weight, self.bias)


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
