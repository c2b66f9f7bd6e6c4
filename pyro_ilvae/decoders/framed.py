"""What decoders with a frame share: the frame, noise units, and the start from data."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.decoders.arguments import points_of_shape, without_autocast
from pyro_ilvae.decoders.brenier import BrenierMap
from pyro_ilvae.decoders.conditional import ConditionalDecoder
from pyro_ilvae.decoders.frame_arguments import frame_argument, make_frame
from pyro_ilvae.decoders.frames import Frame, IdentityFrame
from pyro_ilvae.decoders.learned import LearnedConstant
from pyro_ilvae.decoders.nats import Nats
from pyro_ilvae.decoders.start import Place, Start, check_weights, start_from_data
from pyro_ilvae.networks import public_method

__all__ = ["FramedDecoder"]


class FramedDecoder(ConditionalDecoder):
    """A decoder whose K-dimensional part lies in the directions of a frame."""

    frame: Frame
    inverse_lipschitz: Any
    bias: Tensor
    _start: Callable[[Start], None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The value of ``forward``."""
        with self._one_draw():
            return super().__call__(*args, **kwargs)

    @property
    def _nats(self) -> Nats | None:
        """The nats by which the constant was given, if it was."""
        raise NotImplementedError

    def _one_draw(self) -> AbstractContextManager[Any]:
        """A context in which L and the scales of the entries belong to one draw of a scale with a prior."""
        nats = self._nats
        return nullcontext() if nats is None else nats.one_draw()

    def _make_frame(self, frame: str | Tensor, num_directions: int, trained: bool) -> None:
        frame = frame_argument(frame)
        trained = _checks.boolean("train_frame", trained)
        self.frame = make_frame(frame, self.event_shape, num_directions, trained=trained)
        # A frame that the user chose stays; random directions give way to the directions of the data.
        self._own_frame = isinstance(frame, Tensor) or frame == "identity"

    def _with_unit(self, value: Any) -> Any:
        """A constant as it was given; nats with the noise unit that they need, at the bias if there is one."""
        if isinstance(value, LearnedConstant):
            return value.with_minimum(self._with_unit(value.minimum))
        if not isinstance(value, Nats):
            return value
        weights = None if value.is_drawn else value.weights()
        if weights is not None and weights.shape[-1] != self.event_shape.numel():
            raise ValueError(
                f"Expected inverse_lipschitz with a likelihood whose noise_scale has the shape "
                f"{tuple(self.event_shape)} of a datum, or one number, got {tuple(value.likelihood.noise_scale.shape)}"
            )
        own = self._parameters.get("bias")
        bias = torch.zeros(self.event_shape) if own is None else own.detach().reshape(self.event_shape)
        return value.at(bias)

    @property
    def _constrained_map(self) -> BrenierMap:
        """The map whose constant follows nats, or is learned."""
        raise NotImplementedError

    @property
    def minimum_inverse_lipschitz(self) -> float | None:
        """The floor of a learned constant, which holds at every step; None for a constant that is not learned."""
        with self._one_draw():
            floor = self._constrained_map.minimum_inverse_lipschitz
            if floor is None:
                return None
            present = self._constrained_map.inverse_lipschitz
            return floor * (self.inverse_lipschitz / present) if present else 0.0

    @property
    def _smallest_weight(self) -> float:
        return 1.0 if self._nats is None else self._nats.smallest_weight()

    @property
    def channel_constant(self) -> float:
        """The constant of the map from z to :meth:`coordinates` of the decoder's value, at least the decoder's own."""
        with self._one_draw():
            constant: float = self.inverse_lipschitz
            return constant / self._smallest_weight

    def _in_units(self, eta: Tensor) -> Tensor:
        """The values of shape (..., D) in units of the scales, if there is one for each entry and L is in nats."""
        weights = None if self._nats is None else self._nats.weights()
        return eta if weights is None else eta * weights.to(eta.dtype)

    @public_method
    def coordinates(self, y: Tensor) -> Tensor:
        r"""The K numbers of a value of the decoder by which z can be told apart.

        .. math:: P y = Q^\top y, \qquad \|P f(z) - P f(z')\| \ge L \|z - z'\|,

        or :math:`P = \bar\sigma\, Q^\top S^{-1}` where L is in nats and the likelihood has a scale :math:`\sigma_d` for
        each entry, with :math:`S = \operatorname{diag}(\sigma_d)` and :math:`\bar\sigma` their geometric mean.

        Args:
            y: values of the decoder, or data of the same shape, of shape (..., \*event_shape).

        Returns:
            A tensor of shape (..., K); of a composition with a context, (..., F + K), because no K of them would do.

        Raises:
            ValueError: for values of another shape.
        """
        y = points_of_shape("y", y, self.event_shape, self._dtype)
        weights = None if self._nats is None else self._nats.weights()
        with without_autocast(y.device.type):
            return self.frame.coordinates(y if weights is None else y / weights.to(y.dtype))

    @torch.no_grad()
    def initialize(self, x: Any, likelihood: Any, *, seed: int | None = None) -> None:
        r"""Start where the data are: the bias, the frame and the scale of the map, from a sample and its likelihood.

        .. math:: b = \eta(\bar x), \qquad
            u = \big( \operatorname{tr} I(b) / \operatorname{tr} I(b)^2 \big)^{1/2},

        with :math:`\eta(\bar x)` the natural parameters of the mean of the data, :math:`I` the Fisher information and
        :math:`u` the noise unit, for Normal noise its scale. The columns of :math:`Q` are the leading principal
        directions of the data, for counts of the data in units of their noise, taken to log rates. Where data
        vary in fewer than K directions, the others are drawn at random. A frame that was given as a matrix or as
        "identity" stays.

        The map starts with half a noise unit beside L z. Without a context, a backbone that is an
        :class:`~pyro_ilvae.MLPDecoder` or ends with a linear layer starts with 0. The constant does not change, unless
        it is in nats relative to a likelihood without Normal noise: its noise unit becomes u. Call it before training.

        Args:
            x: a data sample of shape (N, \*data shape), or an iterable of batches, as for
                :func:`~pyro_ilvae.principal_frame`. It is read once.
            likelihood: the likelihood of the data, with the methods ``natural_parameters`` and
                ``information_product``.
            seed: a seed for the weights that are drawn anew; the global random state if None.

        Raises:
            ValueError: for data outside of the likelihood's support or of another shape, for a likelihood of another
                class than the one in ``Nats``, and for weights with priors: set priors after the start.
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
            self._apply_start(self._start_of(x, likelihood, seed))

    def _start_of(self, x: Any, likelihood: Any, seed: int | None) -> Start:
        nats = self._nats
        if nats is not None and not isinstance(likelihood, type(nats.likelihood)):
            kind = type(nats.likelihood).__name__
            raise ValueError(f"Expected likelihood to be a {kind}, as in inverse_lipschitz, got {likelihood!r}")
        return start_from_data(x, likelihood, self._place(), seed)

    def _place(self) -> Place:
        check_weights(self)
        nats = self._nats
        return Place(
            self.event_shape,
            self.frame.latent_dim,
            self.bias,
            self.frame if self._own_frame else None,
            getattr(self.frame, "num_categories", 0),
            # Of a scale that is drawn each draw has other weights.
            None if nats is None or nats.is_drawn else nats.weights(),
        )

    @torch.no_grad()
    def _apply_start(self, start: Start) -> None:
        if not self._own_frame and not isinstance(self.frame, IdentityFrame):
            # The last columns are for z, the columns before them for a context.
            self.frame.turn(start.directions.roll(self.frame.latent_dim - self.latent_dim, dims=1))
        if self._nats is not None and self._nats.is_reference:
            self.inverse_lipschitz = self._constrained_map._as_learned(self._nats.with_unit(start.unit))
        self._start(start)
        if start.bias is None:
            return
        # What a network returns at its start is not centered.
        self.bias.add_(start.bias - self._mean_over_prior(start.context.mean if start.context else None))
