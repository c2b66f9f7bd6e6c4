"""An encoder whose posterior is at least so many nats away from the prior, for every datum."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.distributions import without_event
from pyro_ilvae.infer.remedies.wrapped_encoder import WrappedEncoder

__all__ = ["MinimumKLEncoder"]


class MinimumKLEncoder(WrappedEncoder):
    r"""An encoder whose posterior has a KL divergence of at least :math:`\delta` nats to the prior, for every datum.

    With the inner encoder's :math:`\mu_j, \sigma_j` and the prior :math:`N(0, I_K)`, the scales stay, and the means
    move away from 0:

    .. math:: \mu_j' = \pm \sqrt{\mu_j^2 + m(g_j)}, \qquad g_j = 2 \delta / K - (\sigma_j^2 - 1 - \ln \sigma_j^2),
        \qquad m(g) = \tfrac12 \left(g + \sqrt{g^2 + (\delta / K)^2}\right) \ge \max(0, g),

    with the sign of :math:`\mu_j`. By construction, for all weights of the inner encoder,

    .. math:: \mathrm{KL}_j = \tfrac12 (\sigma_j^2 - 1 - \ln \sigma_j^2 + \mu_j'^2) \ge \delta / K, \qquad
        \mathrm{KL}(q(z \mid x) \| p(z)) \ge \delta.

    The smooth maximum m has finite gradients, also where :math:`\mu_j = 0` and no nats are lacking, and exceeds the
    maximum by at most :math:`\delta / (2K)`. A mean that changes its sign jumps over the interval that the bound leaves
    out. Neutral: :math:`\delta = 0` returns what the inner encoder returns.

    The bound alone is not information: the same posterior for all data fulfills it too. It is a bound to the prior
    named here. Models whose prior is known to be another one refuse the encoder.

    Args:
        encoder: the inner encoder, from data to location and scale of shape (..., K).
        delta: the least divergence :math:`\delta \ge 0` of all dimensions together, in nats.
        prior: the prior, a Normal for each dimension of z, if it is not :math:`N(0, I)`. With location a and scale b,
            the equations hold for :math:`(\mu - a) / b` and :math:`\sigma / b`.

    Raises:
        ValueError: for a negative delta, an encoder with ``num_components``, and a prior that is no Normal or has
            another number of dimensions. ``forward`` raises it for an encoder that returns something else than location
            and scale.
        TypeError: for an encoder that cannot be called.

    References:
        Razavi et al. 2019, Preventing posterior collapse with delta-VAEs, https://arxiv.org/abs/1901.03416 (the
        committed rate; this parametrization for independent Normals is ours)

    Example:
        >>> from pyro_ilvae import MLPEncoder, remedies
        >>> inner = MLPEncoder(latent_dim=2, event_shape=6, hidden_features=(8,))
        >>> encoder = remedies.MinimumKLEncoder(inner, delta=1.0)
        >>> posterior = torch.distributions.Normal(*encoder(torch.randn(5, 6)))
        >>> kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
        >>> bool((kl >= 0.5).all())
        True
    """

    def __init__(
        self, encoder: Callable[..., Any], delta: float, *, prior: torch.distributions.Distribution | None = None
    ) -> None:
        super().__init__(encoder)
        self.delta = _checks.non_negative("delta", delta)
        normal = None if prior is None else without_event(prior)
        if normal is not None and not isinstance(normal, torch.distributions.Normal):
            raise ValueError(f"Expected prior to be a Normal for each dimension, got {type(normal).__name__}")
        for name in ("loc", "scale"):
            value = None if normal is None else getattr(normal, name).detach().clone()
            self.register_buffer(f"_prior_{name}", value, persistent=False)
        self._check_width(getattr(encoder, "latent_dim", None))

    _prior_loc: Tensor | None
    _prior_scale: Tensor | None

    def extra_repr(self) -> str:
        """The bound, for ``print``."""
        return f"delta={self.delta}"

    def _changed(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if self.delta == 0:
            return loc, scale
        if self._prior_loc is None or self._prior_scale is None:
            return self._away_from_zero(loc, scale), scale
        self._check_width(loc.shape[-1])
        own_loc, own_scale = self._prior_loc.to(loc), self._prior_scale.to(loc)
        return own_loc + own_scale * self._away_from_zero((loc - own_loc) / own_scale, scale / own_scale), scale

    def _check_width(self, size: int | None) -> None:
        """Raise for a prior of another number of dimensions than the encoder's."""
        width = 1 if self._prior_loc is None or self._prior_loc.dim() == 0 else self._prior_loc.shape[-1]
        if size is not None and width not in (1, size):
            raise ValueError(f"Expected prior of {size} dimensions, as encoder has them, got one of {width}")

    def _away_from_zero(self, loc: Tensor, scale: Tensor) -> Tensor:
        """The locations, in units of the prior, far enough from 0."""
        # In double precision: near a scale of 1 all digits of a shorter one cancel out.
        dtype, loc, scale = loc.dtype, loc.double(), scale.double()
        each = self.delta / loc.shape[-1]
        lacking = 2 * each - (scale.square() - 1 - 2 * scale.log())
        root = (lacking.square() + each**2).sqrt()
        # Where nothing is lacking, the sum of both would cancel out.
        negative = lacking < 0
        added = torch.where(negative, each**2 / (root + lacking.abs()), root + lacking.clamp(min=0)) / 2
        size = (loc.square() + added).sqrt()
        return torch.where(loc < 0, -size, size).to(dtype)

    def _check_prior(self, prior: Any) -> None:
        """Raise unless the bound is to this prior, of event shape (K,)."""
        normal = without_event(prior)
        same = isinstance(normal, torch.distributions.Normal)
        if same:
            own_loc = 0.0 if self._prior_loc is None else self._prior_loc
            own_scale = 1.0 if self._prior_scale is None else self._prior_scale
            same = bool(((normal.loc == own_loc) & (normal.scale == own_scale)).all())
        if not same:
            own = "N(0, I)" if self._prior_loc is None else "the prior that it was given"
            raise ValueError(
                f"Expected encoder with a bound to the prior of site 'z', got a {type(self).__name__} with one to "
                f"{own}: pass prior=..."
            )
