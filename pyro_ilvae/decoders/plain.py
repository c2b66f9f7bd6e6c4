"""The plain decoder, which has no guarantee."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.decoders.arguments import dtype_of
from pyro_ilvae.decoders.conditional import ConditionalDecoder
from pyro_ilvae.networks import Linear, mlp

__all__ = ["MLPDecoder"]


class MLPDecoder(ConditionalDecoder):
    r"""The plain decoder of an ordinary VAE: a multilayer perceptron, with no guarantee on its latent variable.

    .. math:: f(z; c) = A_n\,a(\cdots a(A_1 z + C c + b_1)\cdots) + b_n, \qquad a = \operatorname{softplus},

    with the context :math:`c` left out if there is none.

    Args:
        latent_dim: the dimension :math:`K` of the latent variable.
        event_shape: the shape of the natural parameters of one datum.
        hidden_features: the widths of the hidden layers.
        context_dim: the width of the context :math:`c`; None for a function of z alone.

    Raises:
        ValueError: for sizes below 1, and from ``forward`` for values of another width.

    Example:
        >>> import torch
        >>> MLPDecoder(latent_dim=2, event_shape=(8, 8))(torch.zeros(5, 2)).shape
        torch.Size([5, 8, 8])
    """

    def __init__(
        self,
        *,
        latent_dim: int,
        event_shape: int | Sequence[int],
        hidden_features: Sequence[int] = (512, 512),
        context_dim: int | None = None,
    ) -> None:
        super().__init__(latent_dim, event_shape, context_dim)
        self.hidden_features = _checks.widths("hidden_features", hidden_features)
        self.network = mlp(self.latent_dim, self.hidden_features, self.event_shape.numel())
        if self.context_dim is not None:
            self.from_context = Linear(self.context_dim, self.hidden_features[0], bias=False)
            # The bias of the first layer starts as small as a layer over the context would have it.
            bound = 1 / math.sqrt(self.context_dim)
            nn.init.uniform_(self.network[0].bias, -bound, bound)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return f"latent_dim={self.latent_dim}, event_shape={tuple(self.event_shape)}, context_dim={self.context_dim}"

    @property
    def _dtype(self) -> torch.dtype | None:
        return dtype_of(self, "network", "0")

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape).

        Args:
            z: of shape (..., K).
            context: of shape (..., C); batch dimensions of ``z`` and context broadcast. None without ``context_dim``.
        """
        z, context = self._points(z, context)
        if context is None:
            eta = self.network(z)
        else:
            # By parts and not of z and c side by side: one c may go with many z, or one z with many c.
            first, *others = self.network
            eta = first(z) + self.from_context(context)
            for layer in others:
                eta = layer(eta)
        return eta.reshape(eta.shape[:-1] + self.event_shape)  # type: ignore[no-any-return]
