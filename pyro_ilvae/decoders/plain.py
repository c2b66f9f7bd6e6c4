"""The plain decoder, which has no guarantee."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.decoders.arguments import dtype_of
from pyro_ilvae.decoders.conditional import ConditionalDecoder
from pyro_ilvae.decoders.start import Place, Start, check_weights, start_from_data, start_linear_path
from pyro_ilvae.networks import Linear, mlp

__all__ = ["MLPDecoder"]


class MLPDecoder(ConditionalDecoder):
    r"""The plain decoder of an ordinary VAE: a multilayer perceptron, with no guarantee on its latent variable.

    .. math:: f(z; c) = W z + A_n\,a(\cdots a(A_1 z + C c + b_1)\cdots) + b_n, \qquad a = \operatorname{softplus},

    with the context :math:`c` left out if there is none, and the linear path :math:`W z` unless it is asked for.
    :meth:`initialize` starts the decoder where the data are. A plain decoder with a linear path has the start of a
    :class:`~pyro_ilvae.ProjectedDecoder` and none of its guarantees: it is the baseline for what a guarantee costs.

    Args:
        latent_dim: the dimension :math:`K` of the latent variable.
        event_shape: the shape of the natural parameters of one datum.
        hidden_features: the widths of the hidden layers.
        context_dim: the width of the context :math:`c`; None for a function of z alone.
        linear_path: whether there is a linear path :math:`W`, which starts with random orthonormal columns.

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
        linear_path: bool = False,
    ) -> None:
        super().__init__(latent_dim, event_shape, context_dim)
        self.hidden_features = _checks.widths("hidden_features", hidden_features)
        self.network = mlp(self.latent_dim, self.hidden_features, self.event_shape.numel())
        if self.context_dim is not None:
            self.from_context = Linear(self.context_dim, self.hidden_features[0], bias=False)
            # The bias of the first layer starts as small as a layer over the context would have it.
            bound = 1 / math.sqrt(self.context_dim)
            nn.init.uniform_(self.network[0].bias, -bound, bound)  # type: ignore[arg-type]
        self.linear_path = None
        if _checks.boolean("linear_path", linear_path):
            self.linear_path = Linear(self.latent_dim, self.event_shape.numel(), bias=False)
            nn.init.orthogonal_(self.linear_path.weight)

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
        if self.linear_path is not None:
            eta = eta + self.linear_path(z)
        return eta.reshape(eta.shape[:-1] + self.event_shape)  # type: ignore[no-any-return]

    @torch.no_grad()
    def initialize(self, x: Any, likelihood: Any, *, seed: int | None = None) -> None:
        r"""Start where the data are: the last bias and the linear path, from a sample and its likelihood.

        .. math:: b_n = \eta(\bar x), \qquad W = u Q, \qquad A_n = 0,

        the natural parameters of the mean of the data, from which what the other weights add on average is taken off,
        and, with a linear path, the leading directions of the data times the noise unit (see
        :meth:`ProjectedDecoder.initialize`), 0 where there are none, and nothing beside them. The other weights keep
        their values. Call it before training.

        Args:
            x: a data sample, or an iterable of batches, as for :meth:`ProjectedDecoder.initialize`.
            likelihood: the likelihood of the data, with the methods ``natural_parameters`` and
                ``information_product``.
            seed: a seed for the draws of z over which b_n is centered; the global random state if None.

        Raises:
            ValueError: for data outside of the likelihood's support or of another shape, and weights with priors.
            TypeError: for a likelihood without these methods.

        Example:
            >>> from pyro_ilvae import likelihoods
            >>> x = torch.bernoulli(torch.rand(100, 8))
            >>> decoder = MLPDecoder(latent_dim=2, event_shape=8, linear_path=True)
            >>> decoder.initialize(x, likelihoods.Bernoulli())
        """
        with seeded(seed):
            self._apply_start(self._start_of(x, likelihood, seed))

    def _start_of(self, x: Any, likelihood: Any, seed: int | None) -> Start:
        return start_from_data(x, likelihood, self._place(), seed)

    def _place(self) -> Place:
        check_weights(self)
        bias: Tensor = self.network[-1].bias  # type: ignore[assignment]
        return Place(self.event_shape, min(self.latent_dim, self.event_shape.numel()), bias)

    @torch.no_grad()
    def _apply_start(self, start: Start) -> None:
        if self.linear_path is not None:
            # With a context, the network has to learn its part from the first step on.
            start_linear_path(self.linear_path.weight, start, None if self.conditional else self.network)
        if start.bias is None:
            return
        # What a network returns at its start is not centered.
        self.network[-1].bias += start.bias - self._mean_over_prior(start.context.mean if start.context else None)  # type: ignore[operator]
