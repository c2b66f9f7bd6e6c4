"""The composed decoder of the paper: two Brenier maps and a frame."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.decoders.arguments import dtype_of
from pyro_ilvae.decoders.brenier import INITIAL_SCALE, BrenierMap, constant, following, shown
from pyro_ilvae.decoders.frame_arguments import description, frame_argument, num_directions
from pyro_ilvae.decoders.framed import FramedDecoder
from pyro_ilvae.decoders.learned import LearnedConstant
from pyro_ilvae.decoders.nats import Nats
from pyro_ilvae.decoders.start import Start
from pyro_ilvae.networks import Linear

__all__ = ["InverseLipschitzDecoder"]

_SMALLEST_INNER = 1e-6  # the constant of an inner map beside a learned one


class InverseLipschitzDecoder(FramedDecoder):
    r"""The inverse Lipschitz decoder of Kinoshita et al. 2023 [1], a composition of two Brenier maps and a frame.

    .. math:: f(z) = b + g_2(B\, g_1(z)), \qquad \|f(z) - f(z')\| \ge L_1 L_2 \|z - z'\|,

    with :math:`g_1` on :math:`\mathbb{R}^K`, :math:`g_2` on :math:`\mathbb{R}^D` and :math:`B` of shape (D, K) with
    orthonormal columns, so B does not change the constant. B is folded into the input weights of :math:`g_2`, and
    :math:`B u` is never formed. With ``inverse_lipschitz=0`` this is the decoder of LIDVAE [2].

    With a context :math:`c` it is the composition on :math:`A c + a` and z side by side,

    .. math:: f(z; c) = b + g_2(B\, g_1(A c + a, z)), \qquad \|f(z; c) - f(z'; c)\| \ge L_1 L_2 \|z - z'\|,

    with A of shape (F, C) and B of shape (D, F + K). The composition can only widen, so F + K <= D: the decoder sees
    the context through F numbers.

    Args:
        latent_dim: the dimension :math:`K` of the latent variable.
        event_shape: the shape of the natural parameters of one datum, with :math:`D \ge K` entries.
        inverse_lipschitz: the constant :math:`L = L_1 L_2 \ge 0` of the whole decoder, split evenly, the pair
            :math:`(L_1, L_2)`, or :class:`~pyro_ilvae.Nats` per dimension, which :math:`L_2` follows. (The paper's
            experiments set :math:`L_1 = L_2` and report :math:`L_1`.)
        map_features: the widths of the hidden layers of both maps.
        inner_map_features: the widths of the hidden layers of :math:`g_1`; ``map_features`` if None.
        frame: the matrix B: "random" (orthonormal columns), "identity" (the paper's [I; 0]), "centered" (random columns
            orthogonal to a shift of all categories, for :class:`~pyro_ilvae.likelihoods.Categorical`: L then also holds
            for what the softmax sees of the logits), or a tensor with orthonormal columns, of shape (D, K), or
            (D, F + K) with a context. :func:`~pyro_ilvae.principal_frame` computes a good one from data.
        context_dim: the width C of the context; None for a function of z alone.
        context_features: the number :math:`F` of coordinates to which the context is reduced; if None, the largest that
            is allowed, up to C.
        activation: as for :class:`~pyro_ilvae.ICNN`.
        input_skips: as for :class:`~pyro_ilvae.ICNN`.
        train_frame: whether B is trained, as for :class:`~pyro_ilvae.ProjectedDecoder`.

    Raises:
        ValueError: for K > D or F + K > D, a negative or non-finite constant, columns that are not orthonormal, widths
            below 1, and from ``forward`` for a missing context or one of another width.

    References:
        | [1] Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder
          network, https://arxiv.org/abs/2304.12770
        | [2] Wang, Blei & Cunningham 2021, Posterior collapse and latent variable non-identifiability,
          https://arxiv.org/abs/2301.00537

    Example:
        >>> decoder = InverseLipschitzDecoder(latent_dim=2, event_shape=(8, 8), inverse_lipschitz=0.5)
        >>> decoder(torch.randn(10, 2)).shape, round(decoder.inverse_lipschitz, 9)
        (torch.Size([10, 8, 8]), 0.5)
    """

    def __init__(
        self,
        *,
        latent_dim: int,
        event_shape: int | Sequence[int],
        inverse_lipschitz: float | tuple[float, float] | Nats | LearnedConstant = 1.0,
        map_features: Sequence[int] = (512, 512),
        inner_map_features: Sequence[int] | None = None,
        frame: str | Tensor = "random",
        context_dim: int | None = None,
        context_features: int | None = None,
        activation: str | Sequence[str] = "softplus",
        input_skips: bool = True,
        train_frame: bool = False,
    ) -> None:
        super().__init__(latent_dim, event_shape, context_dim)
        features = self.event_shape.numel()
        map_features = _checks.widths("map_features", map_features)
        if inner_map_features is not None:
            inner_map_features = _checks.widths("inner_map_features", inner_map_features)
        frame = frame_argument(frame)
        self.context_features = self._context_features(frame, context_features)
        joint = self.context_features + self.latent_dim
        if self.context_dim is not None:
            self.from_context = Linear(self.context_dim, self.context_features)
        self._make_frame(frame, joint, train_frame)
        self.inner = BrenierMap(joint, 1.0, inner_map_features or map_features, activation, input_skips)
        self.outer = BrenierMap(features, 1.0, map_features, activation, input_skips)
        self.inverse_lipschitz = inverse_lipschitz  # type: ignore[assignment]
        self.bias = nn.Parameter(torch.zeros(features))
        # The inner map starts close to the linear map L_1 z, where training is best conditioned.
        self.inner.icnn.reset_parameters(gradient_scale=INITIAL_SCALE)
        self._reset_outer(INITIAL_SCALE)

    def _reset_outer(self, gradient_scale: float) -> None:
        # Only the directions of the frame are ever fed into the outer map.
        norm = math.sqrt(self.frame.latent_dim * (INITIAL_SCALE**2 + self.inner.inverse_lipschitz**2))
        self.outer.icnn.reset_parameters(input_norm=norm, gradient_scale=gradient_scale)

    def _start(self, start: Start) -> None:
        self.inner.icnn.reset_parameters(gradient_scale=INITIAL_SCALE)
        self._reset_outer(start.scale)

    def _context_features(self, frame: str | Tensor, context_features: int | None) -> int:
        """The number F of numbers the context is reduced to, 0 without a context."""
        if self.context_dim is None:
            if context_features is not None:
                raise ValueError(f"Expected context_features=None without context_dim, got {context_features}")
            return 0
        largest = num_directions(frame, self.event_shape) - self.latent_dim
        if largest < 1:
            raise ValueError(
                f"Expected latent_dim < {largest + self.latent_dim}, so that frame has directions for z and context "
                f"among {self.event_shape.numel()} natural parameters, got {self.latent_dim}"
            )
        if context_features is None:
            # A matrix says by its width how many directions it has for the context.
            context_features = largest if isinstance(frame, Tensor) else min(self.context_dim, largest)
        if _checks.positive_int("context_features", context_features) > largest:
            raise ValueError(
                f"Expected context_features <= {largest}, got {context_features}: the composition can only widen"
            )
        return context_features

    def extra_repr(self) -> str:
        """Sizes and constant, for ``print``."""
        return description(self, shown(self))

    @property
    def bounded_part(self) -> tuple[nn.Module, float] | None:
        """The map g_1 and its constant, which bound the Fisher divergence of each datum; None with a context.

        See :class:`~pyro_ilvae.protocols.Decoder`.
        """
        return None if self.conditional else (self.inner, self.inner.inverse_lipschitz)

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L of the whole decoder, the product of the constants of its two maps.

        A new number keeps the ratio of the two constants, or splits evenly where one of them is 0; a pair sets both.
        With ``Nats``, the constant of the outer map follows, and the constant of the inner map stays.
        """
        with self._one_draw():
            return self.inner.inverse_lipschitz * self.outer.inverse_lipschitz * self._smallest_weight

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float | tuple[float, float] | Nats | LearnedConstant) -> None:
        first, second = self.inner.inverse_lipschitz, self.outer.inverse_lipschitz
        ratio = math.sqrt(first / second) if first > 0 and second > 0 else 1.0
        given = value.minimum if isinstance(value, LearnedConstant) else value
        if isinstance(given, Nats):
            given = nats = self._with_unit(given)
            # A scale that is drawn has no value now.
            now = nats.ratio if nats.is_drawn else float(torch.as_tensor(nats.constant()).detach())
            first, _ = _split(now, ratio)
            second = 0.0
        else:
            first, second = _split(given, ratio)
        if isinstance(value, LearnedConstant) and first < _SMALLEST_INNER:
            # With an inner constant of 0 nothing above a floor of 0 could be learned.
            first, second = 1.0, first * second
        other = first or 1.0
        self.inner.inverse_lipschitz = first
        if isinstance(given, Nats):
            self.outer._set_constant(value.with_minimum(given) if isinstance(value, LearnedConstant) else given, other)
        elif isinstance(value, LearnedConstant):
            self.outer._set_constant(LearnedConstant(second, excess=value.excess / first))
        else:
            self.outer.inverse_lipschitz = second

    @property
    def nats(self) -> float | None:
        """The nats kappa per dimension by which L was given; it may be set to another number. None for a number L.

        If the constant of the inner map was set by itself afterwards, the nats of the product.
        """
        nats, share = self._nats, self.inner.inverse_lipschitz / self.outer._other
        if nats is None or share == 1:
            return self.outer.nats
        return 0.5 * math.log1p((share * nats.ratio) ** 2)

    @nats.setter
    def nats(self, value: float) -> None:
        self.inverse_lipschitz = self.outer._as_learned(following(self._nats).with_kappa(value))  # type: ignore[assignment]

    @property
    def _constrained_map(self) -> BrenierMap:
        return self.outer

    @property
    def _nats(self) -> Nats | None:
        return self.outer._nats

    @property
    def _dtype(self) -> torch.dtype | None:
        return dtype_of(self, "inner", "icnn")

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape).

        Args:
            z: of shape (..., K).
            context: of shape (..., C); batch dimensions of ``z`` and context broadcast. None without ``context_dim``.
        """
        z, context = self._points(z, context)
        if context is not None:
            reduced = self.from_context(context).to(z.dtype)
            batch_shape = torch.broadcast_shapes(reduced.shape[:-1], z.shape[:-1])
            z = torch.cat([reduced.expand(*batch_shape, -1), z.expand(*batch_shape, -1)], dim=-1)
        eta = self._in_units(self.outer(self.inner(z), frame=self.frame.fixed())) + self.bias
        return eta.reshape(eta.shape[:-1] + self.event_shape)


def _split(value: float | tuple[float, float], ratio: float) -> tuple[float, float]:
    """The pair (L_1, L_2): the pair that is given, or the one with L_1 L_2 = value and L_1 / L_2 = ratio^2."""
    if isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1:
        if isinstance(value, str) or len(value) != 2:  # type: ignore[arg-type]
            raise ValueError(f"Expected inverse_lipschitz to be a number or a pair of numbers, got {value!r}")
        first, second = value  # type: ignore[misc]
        pair = constant("inverse_lipschitz[0]", first), constant("inverse_lipschitz[1]", second)
        constant("the product of inverse_lipschitz", pair[0] * pair[1])
        return pair
    whole = constant("inverse_lipschitz", value)  # type: ignore[arg-type]
    first = math.sqrt(whole) * ratio
    return first, whole / first if first > 0 else 0.0
