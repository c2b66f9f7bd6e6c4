"""Decoders with an inverse Lipschitz constant: the composition of Brenier maps, and the guarantee for any network."""

import math
from collections.abc import Sequence

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.frames import make_frame
from pyro_ilvae.maps import BrenierMap
from pyro_ilvae.networks import unused

INITIAL_SCALE = 0.3  # of what the ICNNs add to a linear map at the start, where 1 is order one


class InverseLipschitzDecoder(PyroModule):
    r"""The inverse Lipschitz decoder of Kinoshita et al. 2023 [1], a composition of two Brenier maps and a frame.

    .. math:: f(z) = g_2(B\, g_1(z)), \qquad \|f(z) - f(z')\| \ge L_1 L_2 \|z - z'\|,

    with :math:`g_1` on :math:`\mathbb{R}^K`, :math:`g_2` on :math:`\mathbb{R}^D` and :math:`B` of shape (D, K) with
    orthonormal columns, which costs nothing in the constant. B is folded into the input weights of :math:`g_2`, so
    that :math:`B u` is never formed. With ``inverse_lipschitz=0`` this is the decoder of LIDVAE [2].

    Args:
        latent_dim: the dimension :math:`K` of the latent variable.
        event_shape: the shape of the natural parameters of one datum, with :math:`D \ge K` entries.
        inverse_lipschitz: the constant :math:`L = L_1 L_2 \ge 0` of the whole decoder, split evenly, or the pair
            :math:`(L_1, L_2)`. (The paper's experiments set :math:`L_1 = L_2`, and name that number.)
        hidden_features: the widths of the hidden layers of both maps.
        frame: "random" (orthonormal), "identity" (the paper's [I; 0]), "centred" (random, without the shift of all
            categories, for :class:`~pyro_ilvae.likelihoods.Categorical`: L then holds for the logits up to that shift)
            or a (D, K) tensor with orthonormal columns; :func:`~pyro_ilvae.principal_frame` computes a good one from
            data.
        inner_hidden_features: the widths of the hidden layers of :math:`g_1`, if they differ.
        activation: as for :class:`~pyro_ilvae.ICNN`.
        input_skips: as for :class:`~pyro_ilvae.ICNN`.

    Raises:
        ValueError: for K > D, a negative or non-finite constant, columns that are not orthonormal, widths below 1.

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
        latent_dim: int,
        event_shape: int | Sequence[int],
        inverse_lipschitz: float | tuple[float, float] = 1.0,
        hidden_features: Sequence[int] = (512, 512),
        frame: str | Tensor = "random",
        *,
        inner_hidden_features: Sequence[int] | None = None,
        activation: str | Sequence[str] = "softplus",
        input_skips: bool = True,
    ) -> None:
        super().__init__()
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        self.event_shape = _checks.event_shape(event_shape)
        features = self.event_shape.numel()
        self.frame = make_frame(frame, self.event_shape, self.latent_dim)
        first, second = _split(inverse_lipschitz, 1.0)
        self.inner = BrenierMap(
            self.latent_dim, first, inner_hidden_features or hidden_features, activation, input_skips
        )
        self.outer = BrenierMap(features, second, hidden_features, activation, input_skips)
        # Both maps start close to the linear ones L_1 z and L_2 B u, which are where training is best conditioned; and
        # only the frame's K directions are ever fed into the outer one.
        self.inner.icnn.reset_parameters(gradient_scale=INITIAL_SCALE)
        self.outer.icnn.reset_parameters(
            input_norm=math.sqrt(self.latent_dim * (INITIAL_SCALE**2 + first**2)), gradient_scale=INITIAL_SCALE
        )

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L of the whole decoder, the product of those of its two maps.

        A new number keeps the ratio of the two constants (or splits evenly where one of them is 0); a pair sets both.
        """
        return self.inner.inverse_lipschitz * self.outer.inverse_lipschitz

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float | tuple[float, float]) -> None:
        first, second = self.inner.inverse_lipschitz, self.outer.inverse_lipschitz
        ratio = math.sqrt(first / second) if first > 0 and second > 0 else 1.0
        self.inner.inverse_lipschitz, self.outer.inverse_lipschitz = _split(value, ratio)

    def forward(self, z: Tensor) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape), for ``z`` of shape (..., K)."""
        _checks.last_dim("z", z, self.latent_dim)
        eta: Tensor = self.outer(self.inner(z), frame=self.frame)
        return eta.reshape(eta.shape[:-1] + self.event_shape)


class ProjectedDecoder(PyroModule):
    r"""Any network as a decoder with an inverse Lipschitz constant, at the price of a K-dimensional map.

    .. math:: f(z) = Q g(z) + (I - Q Q^\top) h(z), \qquad
        \|f(z) - f(z')\|^2 \ge \|g(z) - g(z')\|^2 \ge L^2 \|z - z'\|^2,

    with :math:`h` an arbitrary backbone, :math:`Q` of shape (D, K) with orthonormal columns and :math:`g` a
    :class:`~pyro_ilvae.BrenierMap` on :math:`\mathbb{R}^K`: the two parts are orthogonal, so the backbone can only add
    to the distance. The backbone keeps its freedom in the other D - K directions.

    Args:
        backbone: a network from (N, K) to (N, \*event_shape) or (N, D). To put priors on its weights, build it of
            PyroModules (:func:`~pyro_ilvae.mlp` does).
        latent_dim: the dimension :math:`K` of the latent variable.
        event_shape: the shape of the natural parameters of one datum, with :math:`D \ge K` entries.
        inverse_lipschitz: the constant :math:`L \ge 0` of the whole decoder.
        frame: as for :class:`InverseLipschitzDecoder`.
        hidden_features: the widths of the hidden layers of :math:`g`.
        activation: as for :class:`~pyro_ilvae.ICNN`.
        input_skips: as for :class:`~pyro_ilvae.ICNN`.

    Raises:
        ValueError: for K > D, a negative or non-finite constant, columns that are not orthonormal, widths below 1, and
            from ``forward`` for a backbone that returns another shape.

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
        latent_dim: int,
        event_shape: int | Sequence[int],
        inverse_lipschitz: float = 1.0,
        frame: str | Tensor = "random",
        *,
        hidden_features: Sequence[int] = (64, 64),
        activation: str | Sequence[str] = "softplus",
        input_skips: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise ValueError(f"Expected backbone to be a torch.nn.Module, got {backbone!r}")
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        self.event_shape = _checks.event_shape(event_shape)
        self.frame = make_frame(frame, self.event_shape, self.latent_dim)
        self.map = BrenierMap(self.latent_dim, inverse_lipschitz, hidden_features, activation, input_skips)
        self.map.icnn.reset_parameters(gradient_scale=INITIAL_SCALE)
        self.backbone = unused(backbone)

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L of the whole decoder, which is that of its map g; it may be set at any time."""
        return self.map.inverse_lipschitz

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float) -> None:
        self.map.inverse_lipschitz = value

    def forward(self, z: Tensor) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape), for ``z`` of shape (..., K)."""
        _checks.last_dim("z", z, self.latent_dim)
        # Convolutions take one batch dimension, and particles or plates may stand to its left.
        flat = z.reshape(-1, self.latent_dim)
        h = self.backbone(flat)
        features = self.event_shape.numel()
        if h.shape not in ((len(flat), features), (len(flat), *self.event_shape)):
            raise ValueError(
                f"Expected backbone to return shape ({len(flat)}, {features}) or "
                f"{(len(flat), *self.event_shape)}, got {tuple(h.shape)}"
            )
        h = h.reshape((*z.shape[:-1], features))
        eta: Tensor = self.frame.replace(h, self.map(z))
        return eta.reshape(eta.shape[:-1] + self.event_shape)


def _split(value: float | tuple[float, float], ratio: float) -> tuple[float, float]:
    """The pair (L_1, L_2) for the constant of the whole, with L_1 / L_2 = ratio^2, or the pair that was given."""
    if isinstance(value, Sequence) or (isinstance(value, torch.Tensor) and value.dim() == 1):
        if isinstance(value, str) or len(value) != 2:
            raise ValueError(f"Expected inverse_lipschitz to be a number or a pair of numbers, got {value!r}")
        first, second = value
        return _checks.constant("inverse_lipschitz[0]", first), _checks.constant("inverse_lipschitz[1]", second)
    whole = _checks.constant("inverse_lipschitz", value)
    first = math.sqrt(whole) * ratio
    return first, whole / first if first > 0 else 0.0
