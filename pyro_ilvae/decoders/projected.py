"""The projected decoder: an inverse Lipschitz constant for any network."""

import math
from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.decoders.arguments import dtype_of, without_autocast
from pyro_ilvae.decoders.brenier import INITIAL_SCALE, BrenierMap, shown
from pyro_ilvae.decoders.frame_arguments import description
from pyro_ilvae.decoders.framed import FramedDecoder
from pyro_ilvae.decoders.frames import MatrixFrame
from pyro_ilvae.decoders.learned import LearnedConstant
from pyro_ilvae.decoders.nats import Nats
from pyro_ilvae.decoders.start import Start, zero_last_layer
from pyro_ilvae.networks import Linear, unused

__all__ = ["ProjectedDecoder"]


class ProjectedDecoder(FramedDecoder):
    r"""Any network as a decoder with an inverse Lipschitz constant, at the price of a K-dimensional map.

    .. math:: f(z; c) = b + Q\,(g(z) + A c) + (I - Q Q^\top)\, (W z + h(z, c)), \qquad
        \|f(z; c) - f(z'; c)\|^2 \ge \|g(z) - g(z')\|^2 \ge L^2 \|z - z'\|^2,

    with :math:`h` an arbitrary backbone, :math:`W` of shape (D, K) the linear path beside it, :math:`b` of D numbers,
    :math:`Q` of shape (D, K) with orthonormal columns and :math:`g` a :class:`~pyro_ilvae.BrenierMap` on
    :math:`\mathbb{R}^K` with gain :math:`\sqrt{D}`: only g reaches the K directions of the frame, and a step of an
    optimizer would otherwise move them less than the others. The two parts are orthogonal, so backbone and linear path
    can only add to the distance, and they are free in the other D - K directions. The bound holds for every context
    :math:`c`, because :math:`b + Q A c` is the same for all z; without a context :math:`A c` is left out.

    :meth:`initialize` starts the decoder where the data are.

    Args:
        backbone: a network from (N, K) to (N, \*event_shape) or (N, D); with a context, from (N, K) and (N, C). A
            backbone with the attribute ``context_dim``, such as :class:`~pyro_ilvae.MLPDecoder`, is called with z and
            context as they come, and has to broadcast their batch dimensions. To put priors on the backbone's weights,
            build it of PyroModules, as :func:`~pyro_ilvae.mlp` does.
        latent_dim: the dimension :math:`K` of the latent variable.
        event_shape: the shape of the natural parameters of one datum, with :math:`D \ge K` entries.
        inverse_lipschitz: the constant :math:`L \ge 0` of the whole decoder, a number, :class:`~pyro_ilvae.Nats` per
            dimension, or a :class:`~pyro_ilvae.LearnedConstant`.
        map_features: the widths of the hidden layers of :math:`g`. With many latent dimensions it pays to make them as
            wide as the backbone: the directions of the frame are where data vary most.
        frame: as for :class:`~pyro_ilvae.InverseLipschitzDecoder`.
        context_dim: the width C of the context; None for a function of z alone.
        activation: as for :class:`~pyro_ilvae.ICNN`.
        input_skips: as for :class:`~pyro_ilvae.ICNN`.
        linear_path: whether there is a linear path :math:`W` beside the backbone, which starts at 0. With K = D nothing
            lies outside of the frame, and there is neither.
        train_frame: whether Q is trained, as the orthonormal factor of a free matrix. Without Normal noise it may turn
            to directions about which the data say little, as to pixels that are always dark: the dimensions of z then
            collapse on the data although L holds.

    Raises:
        ValueError: for K > D, a negative or non-finite constant, columns that are not orthonormal, widths below 1, and
            from ``forward`` for a backbone that returns another shape, a missing context or one of another width.

    Example:
        >>> from pyro_ilvae import mlp
        >>> backbone = mlp(2, (128,), 64)
        >>> decoder = ProjectedDecoder(backbone, latent_dim=2, event_shape=(8, 8), inverse_lipschitz=0.5)
        >>> decoder(torch.randn(10, 2)).shape
        torch.Size([10, 8, 8])
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        latent_dim: int,
        event_shape: int | Sequence[int],
        inverse_lipschitz: float | Nats | LearnedConstant = 1.0,
        map_features: Sequence[int] = (64, 64),
        frame: str | Tensor = "random",
        context_dim: int | None = None,
        activation: str | Sequence[str] = "softplus",
        input_skips: bool = True,
        linear_path: bool = True,
        train_frame: bool = False,
    ) -> None:
        super().__init__(latent_dim, event_shape, context_dim)
        _check_backbone(backbone, self.latent_dim, self.context_dim)
        map_features = _checks.widths("map_features", map_features)
        features = self.event_shape.numel()
        self._make_frame(frame, self.latent_dim, train_frame)
        gain = math.sqrt(features)
        constant = self._with_unit(inverse_lipschitz)
        self.map = BrenierMap(self.latent_dim, constant, map_features, activation, input_skips, gain=gain)
        self.map.icnn.reset_parameters(gradient_scale=INITIAL_SCALE / gain)
        self.bias = nn.Parameter(torch.zeros(features))
        if self.context_dim is not None:
            self.from_context = Linear(self.context_dim, self.latent_dim, bias=False)
        self.linear_path = None
        if _checks.boolean("linear_path", linear_path) and self.latent_dim < features:
            self.linear_path = Linear(self.latent_dim, features, bias=False)
            nn.init.zeros_(self.linear_path.weight)
        self.backbone = unused(backbone)

    def extra_repr(self) -> str:
        """Sizes and constant, for ``print``."""
        return description(self, shown(self))

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L of the whole decoder; it may be set to a number or ``Nats`` at any time."""
        with self._one_draw():
            return self.map.inverse_lipschitz * self._smallest_weight

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float | Nats | LearnedConstant) -> None:
        self.map.inverse_lipschitz = self._with_unit(value)

    @property
    def nats(self) -> float | None:
        """The nats kappa per dimension by which L was given; it may be set to another number. None for a number L."""
        return self.map.nats

    @nats.setter
    def nats(self, value: float) -> None:
        self.map.nats = value

    @property
    def _constrained_map(self) -> BrenierMap:
        return self.map

    @property
    def _nats(self) -> Nats | None:
        return self.map._nats

    @property
    def coordinate_constant(self) -> float:
        """A lower bound on the slope of each of the :meth:`coordinates` along its own z_j: grad g is symmetric."""
        return self.map.inverse_lipschitz

    def _channel(self, z: Tensor) -> Tensor:
        """The :meth:`coordinates` of the decoder's value, up to a shift, without its D entries."""
        inside: Tensor = self.map(z)
        return inside

    def _start(self, start: Start) -> None:
        self.map.icnn.reset_parameters(gradient_scale=start.scale / self.map.gain)
        if start.context is not None:
            # Where it starts elsewhere, z learns the effects of the context first, because a step moves g by more.
            self.from_context.weight.copy_(self.coordinates(start.context.slopes.unflatten(-1, self.event_shape)).mT)
        if not self.conditional:  # with a context, the backbone has to learn its part from the first step on
            zero_last_layer(self.backbone)

    @property
    def _dtype(self) -> torch.dtype | None:
        return dtype_of(self, "map", "icnn")

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape).

        Args:
            z: of shape (..., K).
            context: of shape (..., C); batch dimensions of ``z`` and context broadcast. None without ``context_dim``.
        """
        z, context = self._points(z, context)
        frame = self.frame.fixed()
        # With K = D nothing lies outside of the frame, and rounding of the backbone would be all that is left of it.
        outside = self._outside(z, context) if self.latent_dim < frame.features else None
        inside = self.map(z)
        with without_autocast(z.device.type):
            if outside is not None and self.linear_path is not None:
                # One pass over the D-wide result instead of a product and a sum.
                outside = MatrixFrame(self.linear_path.weight).add(outside, z)
            if context is not None:
                inside = inside + self.from_context(context)
            eta: Tensor = frame.embed(inside) if outside is None else frame.replace(outside, inside)
            eta = self._in_units(eta) + self.bias
        return eta.reshape(eta.shape[:-1] + self.event_shape)

    def _outside(self, z: Tensor, context: Tensor | None) -> Tensor:
        """What the backbone returns, of shape (..., D)."""
        if context is None:
            batch_shape, arguments = z.shape[:-1], [z]
        else:
            batch_shape, arguments = torch.broadcast_shapes(z.shape[:-1], context.shape[:-1]), [z, context]
        lead = batch_shape
        if context is None or getattr(self.backbone, "context_dim", None) is None:
            # Convolutions take one batch dimension, and particles or plates may stand to its left.
            arguments = [part.expand(*batch_shape, -1).reshape(-1, part.shape[-1]) for part in arguments]
            lead = arguments[0].shape[:1]
        h: Tensor = self.backbone(*arguments)
        if not isinstance(h, Tensor) or h.layout != torch.strided:
            raise TypeError(f"Expected backbone to return a dense tensor, got a {type(h).__name__}")
        features = self.event_shape.numel()
        if h.shape not in ((*lead, features), (*lead, *self.event_shape)):
            raise ValueError(
                f"Expected backbone to return shape {(*lead, features)} or {(*lead, *self.event_shape)}, got "
                f"{tuple(h.shape)}"
            )
        if h.dtype != z.dtype:  # lower under autocast
            if torch.promote_types(h.dtype, z.dtype) != z.dtype:
                raise ValueError(f"Expected backbone to return dtype {z.dtype}, got {h.dtype}")
            h = h.to(z.dtype)
        return h.reshape(*batch_shape, features)


def _check_backbone(backbone: nn.Module, latent_dim: int, context_dim: int | None) -> None:
    """Raise where a backbone cannot take z of that width, and a context or none, as far as it says so itself."""
    if not isinstance(backbone, nn.Module):
        hint = ": pass an object of this class" if isinstance(backbone, type) else ""
        raise ValueError(f"Expected backbone to be a torch.nn.Module, got {backbone!r}{hint}")
    if getattr(backbone, "context_dim", context_dim) != context_dim:
        raise ValueError(f"Expected backbone with context_dim={context_dim}, got {backbone.context_dim}")
    first = backbone[0] if isinstance(backbone, nn.Sequential) and len(backbone) > 0 else None
    if isinstance(first, nn.Linear) and first.in_features != latent_dim:
        raise ValueError(
            f"Expected backbone to take z of shape (N, {latent_dim}), got one for (N, {first.in_features})"
        )
    arguments = ("z",) if context_dim is None else ("z", "context")
    try:
        signature(backbone.forward).bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"Expected backbone to take {' and '.join(arguments)}, got a forward method with {error}"
        ) from error
    except ValueError:  # no signature is known
        return
