"""A decoder at one context, as a function of z alone."""

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks

__all__ = ["DecoderGiven"]


class DecoderGiven(nn.Module):
    r"""A decoder at one context, from z of shape (..., K) to natural parameters of shape (..., \*event_shape).

    .. math:: z \mapsto f(z; c), \qquad \|f(z; c) - f(z'; c)\| \ge L \|z - z'\|.

    Args:
        decoder: a decoder with a context.
        context: the context :math:`c`, of shape (C,).

    Raises:
        ValueError: for a decoder without a context, and a context of another shape.
    """

    conditional = False

    def __init__(self, decoder: nn.Module, context: Tensor) -> None:
        super().__init__()
        size: int | None = getattr(decoder, "context_dim", None)
        _checks.context(context, size)
        if context.dim() != 1:
            raise ValueError(f"Expected context of shape ({size},), got {tuple(context.shape)}")
        self.decoder = decoder
        self.latent_dim: int = decoder.latent_dim  # type: ignore[assignment]
        self.event_shape: torch.Size = decoder.event_shape  # type: ignore[assignment]
        self.register_buffer("context", context, persistent=False)

    context: Tensor

    @property
    def inverse_lipschitz(self) -> float | None:
        """The constant of the decoder; None without one."""
        constant: float | None = getattr(self.decoder, "inverse_lipschitz", None)
        return constant

    def forward(self, z: Tensor) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape), for ``z`` of shape (..., K)."""
        return self.decoder(z, self.context)  # type: ignore[no-any-return]
