"""What decoders with a frame share: the frame, noise units, and the start from data."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.decoders.conditional import ConditionalDecoder
from pyro_ilvae.decoders.frame_arguments import frame_argument, make_frame
from pyro_ilvae.decoders.frames import Frame, IdentityFrame
from pyro_ilvae.decoders.nats import Nats
from pyro_ilvae.decoders.start import Start, completed, start_from_data
from pyro_ilvae.networks import public_method


class FramedDecoder(ConditionalDecoder):
    """A decoder whose K-dimensional part lies in the directions of a frame."""

    frame: Frame
    inverse_lipschitz: Any
    _nats: Nats | None
    offset: Tensor
    _start: Callable[[Start], None]

    def _make_frame(self, frame: str | Tensor, num_directions: int, trained: bool) -> None:
        frame = frame_argument(frame)
        trained = _checks.boolean("train_frame", trained)
        self.frame = make_frame(frame, self.event_shape, num_directions, trained=trained)
        # A frame that the user chose stays; random directions give way to those of the data.
        self._own_frame = isinstance(frame, Tensor) or frame == "identity"

    def _with_unit(self, value: Any) -> Any:
        """A constant as it was given; nats with the noise unit that they need."""
        return value.with_unit(self.event_shape) if isinstance(value, Nats) else value

    @property
    def _smallest_weight(self) -> float:
        return 1.0 if self._nats is None else self._nats.smallest_weight()

    @property
    def channel_constant(self) -> float:
        """The constant of the map from z to :meth:`coordinates` of the decoder's value, at least the decoder's own."""
        constant: float = self.inverse_lipschitz
        return constant / self._smallest_weight

    def _in_units(self, eta: Tensor) -> Tensor:
        """The values of shape (..., D) in units of the scales, if there is one for each entry and L is in nats."""
        weights = None if self._nats is None else self._nats.weights()
        return eta if weights is None else eta * weights.to(eta.dtype)

    @public_method
    def coordinates(self, y: Tensor) -> Tensor:
        r"""The K numbers of a value of the decoder in which z can be told apart.

        .. math:: P y = Q^\top y, \qquad \|P f(z) - P f(z')\| \ge L \|z - z'\|,

        or :math:`P = \bar\sigma\, Q^\top S^{-1}` where L is in nats and the likelihood has a scale :math:`\sigma_d` for
        each entry, with :math:`S = \operatorname{diag}(\sigma_d)` and :math:`\bar\sigma` their geometric mean.

        Args:
            y: values of the decoder, or data of the same shape, of shape (..., \*event_shape).

        Returns:
            A tensor of shape (..., K).
        """
        y = y.reshape(*y.shape[: y.dim() - len(self.event_shape)], -1)
        weights = None if self._nats is None else self._nats.weights()
        coordinates = self.frame.coordinates(y if weights is None else y / weights.to(y.dtype))
        return coordinates[..., coordinates.shape[-1] - self.latent_dim :]

    @torch.no_grad()
    def initialize(self, x: Any, likelihood: Any, *, seed: int | None = None) -> None:
        r"""Start where the data are: the offset, the frame and the scale of the map, from a sample and its likelihood.

        .. math:: b = \eta(\bar x), \qquad
            u = \big( \operatorname{tr} I(b) / \operatorname{tr} I(b)^2 \big)^{1/2},

        with :math:`\eta(\bar x)` the natural parameters of the mean of the data, :math:`I` the Fisher information and
        :math:`u` the noise unit, for Normal noise its scale. The columns of :math:`Q` are the leading principal
        directions of the data in units of their noise, taken to the space of natural parameters: for Normal noise the
        principal directions of the data. A frame that was given as a matrix or as "identity" stays. The map g starts
        at half a noise unit beside L z, and a backbone that is an :class:`~pyro_ilvae.MLPDecoder` or ends with a linear
        layer at 0. The constant does not change, but for nats relative to a likelihood without Normal noise, whose
        noise unit becomes the one of the data. Call it before training.

        Args:
            x: a data sample of shape (N, \*data shape), or an iterable of batches, as for
                :func:`~pyro_ilvae.principal_frame`. It is read once.
            likelihood: the likelihood of the data, with the methods ``natural_parameters`` and
                ``information_product``.
            seed: a seed for the weights that are drawn anew; the global random state if None.

        Raises:
            ValueError: for data outside of the likelihood's support or of another shape.
            TypeError: for a likelihood without these methods.

        Example:
            >>> from pyro_ilvae import ProjectedDecoder, likelihoods, mlp
            >>> x = torch.bernoulli(torch.rand(100, 8))
            >>> decoder = ProjectedDecoder(mlp(2, (16,), 8), latent_dim=2, event_shape=8)
            >>> decoder.initialize(x, likelihoods.Bernoulli(), seed=0)
            >>> start = decoder(torch.randn(10_000, 2)).mean(0)
            >>> bool((start - x.mean(0).logit()).abs().max() < 0.5)
            True
        """
        with seeded(seed):
            frame = self.frame if self._own_frame else None
            units = None if self._nats is None else self._nats.weights()
            start = start_from_data(x, likelihood, self.event_shape, self.frame.latent_dim, frame, units)
            self._apply_start(start)

    @torch.no_grad()
    def _apply_start(self, start: Start) -> None:
        if start.directions is not None and not isinstance(self.frame, IdentityFrame):
            self.frame.turn(completed(start.directions, self.frame.latent_dim, self.frame.num_categories))
        if self._nats is not None and self._nats.is_reference:
            self.inverse_lipschitz = Nats(self._nats.kappa, self._nats.likelihood, unit=start.unit)
        self._start(start)
        # What a network returns at its start is not centered.
        self.offset += start.offset - self._mean_over_prior()
