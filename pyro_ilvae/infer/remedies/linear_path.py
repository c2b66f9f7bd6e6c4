"""A linear path beside a decoder."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.decoders.arguments import dtype_of
from pyro_ilvae.decoders.conditional import ConditionalDecoder
from pyro_ilvae.decoders.start import Place, Start, check_weights, last_layer, start_from_data, start_linear_path
from pyro_ilvae.networks import Linear, unused

__all__ = ["LinearPath"]


class LinearPath(ConditionalDecoder):
    r"""A decoder with a linear path beside it, on which z reaches the data from the first step on.

    .. math:: f(z; c) = W z + h(z; c),

    for any decoder h. It carries no guarantee: the sum of an inverse Lipschitz decoder and a linear path need not be
    inverse Lipschitz, so that a decoder with such a constant is refused. For an :class:`~pyro_ilvae.MLPDecoder` this is
    the same function as ``MLPDecoder(linear_path=True)``. Neutral: W = 0, as with ``start="zeros"``.

    Args:
        decoder: the decoder h, a module from z of shape (..., K), and a context (..., C) if it has ``context_dim``, to
            natural parameters of shape (..., \*event_shape), with attributes ``latent_dim`` and ``event_shape``.
        start: "orthonormal" for random orthonormal columns of W, "zeros" for W = 0.

    Raises:
        ValueError: for another start, a decoder without ``latent_dim`` or ``event_shape``, and a decoder with an
            inverse Lipschitz constant.
        TypeError: for a decoder that is no module.

    References:
        Dieng et al. 2019, Avoiding latent variable collapse with generative skip models,
        https://arxiv.org/abs/1807.04863

    Example:
        >>> from pyro_ilvae import remedies
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 6))
        >>> network.latent_dim, network.event_shape = 2, (6,)
        >>> remedies.LinearPath(network)(torch.zeros(5, 2)).shape
        torch.Size([5, 6])
    """

    def __init__(self, decoder: nn.Module, *, start: Literal["orthonormal", "zeros"] = "orthonormal") -> None:
        _checks.instance("decoder", decoder, nn.Module, "a module, such as MLPDecoder(...)")
        if getattr(decoder, "_kind", "decoder") != "decoder":
            raise TypeError(f"Expected decoder to be a decoder, got a {type(decoder).__name__}")
        for name in ("latent_dim", "event_shape"):
            if not hasattr(decoder, name):
                raise ValueError(f"Expected decoder with the attribute {name}, got a {type(decoder).__name__} without")
        if getattr(decoder, "inverse_lipschitz", None) is not None:
            raise ValueError(
                f"Expected decoder without an inverse Lipschitz constant, got a {type(decoder).__name__}, whose "
                "guarantee a linear path would undo"
            )
        super().__init__(decoder.latent_dim, decoder.event_shape, getattr(decoder, "context_dim", None))  # type: ignore[arg-type]
        self.decoder = unused(decoder)
        self.linear_path = Linear(self.latent_dim, self.event_shape.numel(), bias=False)
        if _checks.choice("start", start, ("orthonormal", "zeros")) == "zeros":
            nn.init.zeros_(self.linear_path.weight)
        else:
            nn.init.orthogonal_(self.linear_path.weight)
        like = next((value for value in decoder.parameters() if value.is_floating_point()), None)
        if like is not None:
            self.linear_path.to(like)

    @property
    def _dtype(self) -> torch.dtype | None:
        return dtype_of(self, "linear_path")

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape).

        Args:
            z: of shape (..., K).
            context: of shape (..., C); batch dimensions of ``z`` and context broadcast. None without ``context_dim``.
        """
        z, context = self._points(z, context)
        eta: Tensor = self.decoder(z) if context is None else self.decoder(z, context)
        straight = self.linear_path(z)
        return eta + straight.reshape(straight.shape[:-1] + self.event_shape)

    @torch.no_grad()
    def initialize(self, x: Any, likelihood: Any, *, seed: int | None = None) -> None:
        r"""Start where the data are: the linear path at the leading directions of the data, W = u Q.

        An MLPDecoder beside it, or a sequence of layers that ends with a linear one, starts as in
        :meth:`MLPDecoder.initialize <pyro_ilvae.MLPDecoder.initialize>`; other decoders keep their weights. Call it
        before training.

        Args:
            x: a data sample, or an iterable of batches, which is read once, as for ``MLPDecoder.initialize``.
            likelihood: the likelihood of the data, with the methods ``natural_parameters`` and
                ``information_product``.
            seed: a seed for what is drawn; the global random state if None.

        Raises:
            ValueError: for data outside of the likelihood's support or of another shape, and weights with priors.
            TypeError: for a likelihood without these methods.
        """
        with seeded(seed):
            self._apply_start(self._start_of(x, likelihood, seed))

    def _start_of(self, x: Any, likelihood: Any, seed: int | None) -> Start:
        return start_from_data(x, likelihood, self._place(), seed)

    def _place(self) -> Place:
        check_weights(self)
        return Place(self.event_shape, min(self.latent_dim, self.event_shape.numel()), self.linear_path.weight)

    def _apply_start(self, start: Start) -> None:
        # As in MLPDecoder: with a context, the network has to learn its part from the first step on.
        start_linear_path(self.linear_path.weight, start, None if self.conditional else self.decoder)
        own = getattr(self.decoder, "_apply_start", None)
        bias = getattr(last_layer(self.decoder), "bias", None)
        if own is not None:
            own(start)
        elif start.bias is not None and bias is not None and bias.shape == start.bias.shape:
            bias += start.bias - self._mean_over_prior(start.context.mean if start.context else None)
