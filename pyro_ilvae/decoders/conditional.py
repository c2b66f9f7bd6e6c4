"""What decoders with an optional context share, and a decoder at one context as a function of z alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae.decoders.arguments import points
from pyro_ilvae.networks import Module

__all__ = ["ConditionalDecoder", "DecoderGiven"]

_NUM_DRAWS = 512


class ConditionalDecoder(Module):
    """The sizes of a decoder with an optional context, and the decoder at one context.

    Args:
        latent_dim: the dimension K of the latent variable.
        event_shape: the shape of the natural parameters of one datum.
        context_dim: the width C of the context; None for a function of z alone.
    """

    _kind = "decoder"

    def __init__(self, latent_dim: int, event_shape: int | Sequence[int], context_dim: int | None) -> None:
        super().__init__()
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        self.event_shape = _checks.event_shape(event_shape)
        self.context_dim = None if context_dim is None else _checks.positive_int("context_dim", context_dim)

    @property
    def conditional(self) -> bool:
        """Whether ``forward`` needs a context beside z."""
        return self.context_dim is not None

    @property
    def _dtype(self) -> torch.dtype | None:
        """The dtype of the parameters, if it is known."""
        raise NotImplementedError

    def _points(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What ``forward`` is given, as tensors of the right widths and of the decoder's dtype."""
        dtype = self._dtype
        z = points("z", z, self.latent_dim, dtype)
        if context is None or self.context_dim is None:
            _checks.context(context, self.context_dim)
            return z, None
        context = points("context", context, self.context_dim, dtype)
        try:
            torch.broadcast_shapes(z.shape[:-1], context.shape[:-1])
        except RuntimeError as error:
            raise ValueError(
                f"Expected z and context with batch dimensions that broadcast, got {tuple(z.shape)} and "
                f"{tuple(context.shape)}"
            ) from error
        return z, context

    def _mean_over_prior(self, context: Tensor | None = None) -> Tensor:
        """The mean of the decoder over z from N(0, I), of shape (D,), at a context: at 0 if there is none."""
        like = next(self.parameters())
        z = torch.randn(_NUM_DRAWS, self.latent_dim).to(like)
        z = torch.cat([z, -z])  # what is linear in z then has the mean 0
        if context is None and self.context_dim is not None:
            context = torch.zeros(self.context_dim).to(like)
        with evaluation_mode(self):
            value: Tensor = self(z) if context is None else self(z, context)
            return value.mean(0).flatten()

    def given(self, context: Tensor | None = None, *, offset: Tensor | float | None = None) -> "DecoderGiven":
        """The decoder at one context and one offset, a function of z alone, for the diagnostics of decoders.

        Args:
            context: the context, of shape (C,); None for a decoder without one.
            offset: what is added to the natural parameters, a number or of the shape of a datum's; nothing if None.

        Example:
            >>> from pyro_ilvae import MLPDecoder
            >>> decoder = MLPDecoder(latent_dim=2, event_shape=8, context_dim=3)
            >>> decoder.given(torch.zeros(3))(torch.zeros(5, 2)).shape
            torch.Size([5, 8])
        """
        return DecoderGiven(self, context, offset=offset)


class DecoderGiven(nn.Module):
    r"""A decoder at one context and one offset, from z of shape (..., K) to natural parameters (..., \*event_shape).

    .. math:: z \mapsto f(z; c) + o, \qquad \|f(z; c) - f(z'; c)\| \ge L \|z - z'\|.

    Args:
        decoder: a decoder.
        context: the context :math:`c`, of shape (C,); None for a decoder without one.
        offset: what is added, :math:`o`: a number, or of shape event_shape; nothing if None.

    Raises:
        ValueError: for a context or an offset of another shape, and for neither of them.
    """

    _kind = "decoder"

    conditional = False

    def __init__(
        self, decoder: nn.Module, context: Tensor | None = None, *, offset: Tensor | float | None = None
    ) -> None:
        super().__init__()
        size: int | None = getattr(decoder, "context_dim", None)
        if context is not None:
            context = _checks.tensor("context", context)
        if context is None and offset is None:
            raise ValueError("Expected a context or an offset at which a decoder is taken, got neither")
        _checks.context(context, size)
        if context is not None and context.dim() != 1:
            raise ValueError(f"Expected context of shape ({size},), got {tuple(context.shape)}")
        self.decoder = decoder
        self.latent_dim: int = decoder.latent_dim  # type: ignore[assignment]
        self.event_shape: torch.Size = decoder.event_shape  # type: ignore[assignment]
        self.register_buffer("context", context, persistent=False)
        if offset is not None:
            if isinstance(offset, float | int):
                offset = torch.tensor(_checks.finite("offset", offset))
            offset = _checks.real("offset", offset)
            if offset.shape not in (torch.Size(), self.event_shape) or not offset.isfinite().all():
                raise ValueError(
                    f"Expected offset to be a finite number, or finite numbers of shape {tuple(self.event_shape)}, got "
                    f"{offset if offset.dim() == 0 else tuple(offset.shape)}"
                )
        self.register_buffer("offset", offset, persistent=False)

    context: Tensor | None
    offset: Tensor | None

    @property
    def inverse_lipschitz(self) -> float | None:
        """The constant of the decoder; None without one."""
        constant: float | None = getattr(self.decoder, "inverse_lipschitz", None)
        return constant

    @property
    def lipschitz(self) -> float | None:
        """The Lipschitz constant of the decoder; None without one."""
        constant: float | None = getattr(self.decoder, "lipschitz", None)
        return constant

    @property
    def channel_constant(self) -> float | None:
        """The constant of the map from z to :meth:`coordinates` of the decoder's value; None without one."""
        return getattr(self.decoder, "channel_constant", self.inverse_lipschitz)

    @property
    def coordinate_constant(self) -> float:
        """The attribute of the decoder, if it has one."""
        constant: float = self.decoder.coordinate_constant  # type: ignore[assignment]
        return constant

    @property
    def coordinates(self) -> Callable[[Tensor], Tensor]:
        """The decoder's method ``coordinates``; no attribute without one."""
        method: Callable[[Tensor], Tensor] = self.decoder.coordinates  # type: ignore[assignment]
        return method

    @property
    def _channel(self) -> Callable[[Tensor], Tensor] | None:
        """The decoder's own, because a context only shifts it."""
        own: Callable[[Tensor], Tensor] | None = getattr(self.decoder, "_channel", None)
        return own

    def forward(self, z: Tensor) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape), for ``z`` of shape (..., K)."""
        eta: Tensor = self.decoder(z) if self.context is None else self.decoder(z, self.context)
        return eta if self.offset is None else eta + self.offset.to(eta)
