"""An encoder whose posterior means have a fixed spread over the batch."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.infer.remedies.minimum_kl import MinimumKLEncoder
from pyro_ilvae.infer.remedies.wrapped_encoder import WrappedEncoder

__all__ = ["BatchNormEncoder"]


class BatchNormEncoder(WrappedEncoder):
    r"""An encoder whose posterior means are normalized over the batch, with a fixed scale and a learned shift.

    .. math:: \mu_{nj}' = \gamma\,\frac{\mu_{nj} - m_j}{\sqrt{v_j + \epsilon}} + b_j,

    with mean :math:`m_j` and variance :math:`v_j` of the inner encoder's means over the batch. For the prior
    :math:`N(0, I)`, the mean divergence over the batch is then

    .. math:: \frac1N \sum_n \mathrm{KL}_{nj} \ge \frac1{2N} \sum_n \mu_{nj}'^2
        = \frac12 \left(\gamma^2 \frac{v_j}{v_j + \epsilon} + b_j^2\right).

    In training mode the statistics are the batch's, over all batch dimensions, and running averages follow them. In
    evaluation mode they are the running averages, and the bound is approximate. Each call in training mode counts as a
    batch, as of every batch normalization, also by ``svi.evaluate_loss`` and :class:`LatentReconstruction`. The
    diagnostics and the methods of the models run in evaluation mode and change no average. Neutral: ``gamma=None``
    returns what the inner encoder returns.

    Args:
        encoder: the inner encoder, from data to location and scale of shape (..., K), with an attribute ``latent_dim``.
        gamma: the scale :math:`\gamma > 0` of the means; None for no normalization.
        momentum: the weight of the newest batch in the running averages.
        epsilon: what is added to the variance, :math:`\epsilon > 0`.

    Raises:
        ValueError: for a gamma that is not positive, an encoder with ``num_components`` or without ``latent_dim``.
            ``forward`` raises it in training mode for a single datum, and for an encoder that returns something else
            than location and scale.
        TypeError: for an encoder that cannot be called.

    References:
        Zhu et al. 2020, A batch normalized inference network keeps the KL vanishing away,
        https://arxiv.org/abs/2004.12585

    Example:
        >>> from pyro_ilvae import MLPEncoder, remedies
        >>> inner = MLPEncoder(latent_dim=2, event_shape=6, hidden_features=(8,))
        >>> loc, scale = remedies.BatchNormEncoder(inner, gamma=0.5)(torch.randn(100, 6))
        >>> torch.allclose(loc.square().mean(0).sqrt(), torch.tensor(0.5), atol=0.01)
        True
    """

    def __init__(
        self, encoder: Callable[..., Any], gamma: float | None, *, momentum: float = 0.1, epsilon: float = 1e-5
    ) -> None:
        super().__init__(encoder)
        if isinstance(encoder, MinimumKLEncoder):
            raise ValueError(
                "Expected encoder without a bound on its divergence, which normalization would undo, got a "
                "MinimumKLEncoder: write MinimumKLEncoder(BatchNormEncoder(...), delta)"
            )
        self.gamma = None if gamma is None else _checks.positive("gamma", gamma)
        momentum, epsilon = _checks.fraction("momentum", momentum), _checks.positive("epsilon", epsilon)
        self.normalization: nn.Module | None = None
        if self.gamma is not None:
            if not hasattr(encoder, "latent_dim"):
                raise ValueError("Expected encoder with the attribute latent_dim, the dimension K, got one without")
            size = _checks.positive_int("latent_dim of encoder", encoder.latent_dim)  # type: ignore[attr-defined]
            options = {"eps": epsilon, "momentum": momentum, "affine": False}
            self.normalization = PyroModule[nn.BatchNorm1d](size, **options)  # type: ignore[arg-type,call-arg]
            self.shift = nn.Parameter(torch.zeros(size))
            like = next((p for p in encoder.parameters()), None) if isinstance(encoder, nn.Module) else None
            if like is not None:
                self.to(like)

    def extra_repr(self) -> str:
        """The scale, for ``print``."""
        return f"gamma={self.gamma}"

    def _changed(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if self.gamma is None:
            return loc, scale
        rows = loc.reshape(-1, loc.shape[-1])
        if self.training and len(rows) < 2:
            raise ValueError("Expected x with at least two data in training mode, got one, which has no spread")
        return self.gamma * self.normalization(rows).reshape(loc.shape) + self.shift, scale  # type: ignore[misc]
