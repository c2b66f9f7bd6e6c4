"""The ordinary network that encoders, backbones and plain decoders are built from."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ilvae import _checks

T = TypeVar("T")

# PyroModule[...] makes classes at run time, which type checkers cannot follow.
_Linear: type[nn.Linear] = PyroModule[nn.Linear]  # type: ignore[assignment]
_Softplus: type[nn.Softplus] = PyroModule[nn.Softplus]  # type: ignore[assignment]
_Sequential: type[nn.Sequential] = PyroModule[nn.Sequential]  # type: ignore[assignment]


def unused(module: T) -> T:
    """The module itself, ready to become a part of another one although it may have been called by itself.

    Pyro asserts that a part was never called on its own, since its parameters would have two names in the global
    store. The first of them is never read again once the part belongs to a whole.
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
        layers += [_Linear(wide, narrow), _Softplus()]
    layers.append(_Linear(sizes[-1], out_features))
    return _Sequential(*layers)


class MLPDecoder(PyroModule):
    r"""The plain decoder of an ordinary VAE: a multilayer perceptron, with no guarantee on its latent variable.

    .. math:: \eta = A_n\,a(\cdots a(A_1 z + b_1)\cdots) + b_n, \qquad a = \operatorname{softplus}.

    Args:
        latent_dim: the dimension :math:`K` of the latent variable.
        event_shape: the shape of the natural parameters of one datum.
        hidden_features: the widths of the hidden layers.

    Example:
        >>> import torch
        >>> MLPDecoder(latent_dim=2, event_shape=(8, 8))(torch.zeros(5, 2)).shape
        torch.Size([5, 8, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        event_shape: int | Sequence[int],
        hidden_features: Sequence[int] = (512, 512),
    ) -> None:
        super().__init__()
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        self.event_shape = _checks.event_shape(event_shape)
        self.network = mlp(
            self.latent_dim, _checks.widths("hidden_features", hidden_features), self.event_shape.numel()
        )

    def forward(self, z: Tensor) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape), for ``z`` of shape (..., K)."""
        _checks.last_dim("z", z, self.latent_dim)
        return self.network(z).reshape(z.shape[:-1] + self.event_shape)  # type: ignore[no-any-return]
