"""One step of a hierarchy of latent variables: from a site to the site below it, and back."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.likelihoods import Normal
from pyro_ilvae.models._parts import agreed, check_nats, check_roles
from pyro_ilvae.networks import Module, unused

__all__ = ["Layer"]


class Layer(Module):
    r"""One step of a :class:`~pyro_ilvae.HierarchicalVAE`, between a latent site and the site below it.

    .. math:: z_t \mid z_{t+1} \sim N(f_t(z_{t+1}), \operatorname{diag} \sigma_t^2), \qquad
        e_t(z_t) = (m_{t+1}, s_{t+1}),

    with :math:`z_{t+1}` of :math:`K_{t+1}` numbers and :math:`z_t` of :math:`K_t`, where an inverse Lipschitz decoder
    needs :math:`K_{t+1} \le K_t`. The step is a channel with Normal noise, so that a decoder whose constant is
    :class:`~pyro_ilvae.Nats` ``(kappa, noise)`` guarantees :math:`\kappa` nats for each dimension of the top site, and
    less for a site below that spreads less than the prior N(0, I); see
    :func:`~pyro_ilvae.diagnostics.guaranteed_information`. A noise scale
    :math:`\sigma_t = e^{-\kappa}` at the start makes :math:`L^2 + \sigma_t^2 = 1`, so that :math:`z_t` starts near the
    unit scale that the decoder below expects.

    Args:
        decoder: the map :math:`f_t`, from (..., :math:`K_{t+1}`) to (..., :math:`K_t`).
        encoder: a module :math:`e_t` from (..., :math:`K_t`) to location and scale of the upper site, each
            (..., :math:`K_{t+1}`).
        noise: the :class:`~pyro_ilvae.likelihoods.Normal` noise of scale :math:`\sigma_t`, fixed or learned, one number
            or one for each of the :math:`K_t` coordinates.
        latent_dim: the dimension :math:`K_{t+1}`, if neither decoder nor encoder has this attribute.

    Raises:
        TypeError: for parts of another kind.
        ValueError: for noise with an optimal scale, for a constant in nats relative to other noise, and for parts that
            disagree on a dimension.

    Example:
        >>> from pyro_ilvae import MLPEncoder, Nats, ProjectedDecoder, likelihoods, mlp
        >>> noise = likelihoods.Normal(0.6, estimate="learned")
        >>> layer = Layer(
        ...     ProjectedDecoder(mlp(2, (16,), 4), latent_dim=2, event_shape=4, inverse_lipschitz=Nats(0.5, noise)),
        ...     MLPEncoder(event_shape=4, latent_dim=2, hidden_features=(16,)),
        ...     noise,
        ... )
        >>> layer(torch.zeros(10, 2)).sample().shape
        torch.Size([10, 4])
    """

    _features: int | None = None  # the dimension of the site below; a model sets it

    def __init__(self, decoder: nn.Module, encoder: nn.Module, noise: Normal, *, latent_dim: int | None = None) -> None:
        super().__init__()
        _checks.instance("noise", noise, Normal, "such as likelihoods.Normal(0.5)")
        check_roles(decoder, encoder, noise)
        if noise.depends_on_batch:
            raise ValueError(
                "Expected noise with a fixed or learned scale, got an optimal scale, which is a maximum over a batch "
                "of data and not over draws"
            )
        if getattr(decoder, "conditional", False):
            raise ValueError(
                f"Expected decoder to be a function of z alone, got a {type(decoder).__name__} that needs a context"
            )
        dims = {
            "the argument latent_dim": latent_dim,
            "decoder.latent_dim": getattr(decoder, "latent_dim", None),
            "encoder.latent_dim": getattr(encoder, "latent_dim", None),
        }
        self.latent_dim = _checks.positive_int("latent_dim", agreed("latent_dim", dims))
        check_nats(decoder, noise, "noise")
        self.decoder = unused(decoder)
        self.encoder = unused(encoder)
        self.noise = unused(noise)
        noise._event_dim = 1

    def extra_repr(self) -> str:
        """The dimension of the upper site, for ``print``."""
        return f"latent_dim={self.latent_dim}"

    def forward(self, z: Tensor) -> TorchDistribution:
        r"""The distribution of the site below, of event shape (:math:`K_t`,), for ``z`` of the upper site."""
        check_nats(self.decoder, self.noise, "noise")  # either may have been replaced
        loc = self.decoder(z)
        if not isinstance(loc, Tensor):
            raise TypeError(f"Expected decoder of a layer to return a tensor, got a {type(loc).__name__}")
        if loc.shape[-1:] != (self._features or loc.shape[-1],):
            raise ValueError(
                f"Expected decoder of a layer to return a tensor of shape (..., {self._features}), got "
                f"{tuple(loc.shape)}"
            )
        below: TorchDistribution = self.noise(loc).to_event(1)
        return below

    def factor(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale that a value of the site below says about the upper site, each (..., K)."""
        output = self.encoder(z)
        if not isinstance(output, tuple | list) or not all(isinstance(part, Tensor) for part in output):
            raise TypeError(f"Expected encoder of a layer to return a tuple of tensors, got a {type(output).__name__}")
        shapes = tuple(tuple(part.shape) for part in output)
        expected = (*z.shape[:-1], self.latent_dim)
        if shapes != (expected, expected):
            raise ValueError(
                f"Expected encoder of a layer to return location and scale of shape {expected}, got {shapes}"
            )
        loc, scale = output
        return loc, scale


def unit_sample(latent_dim: int, like: Tensor) -> Tensor:
    """Points of mean 0 and variance 1 whose leading principal directions are the first coordinates, of (2 K, K)."""
    # A little less variance along each next coordinate, so that the order is that of the coordinates.
    scales = torch.linspace(1.005, 0.995, latent_dim) if latent_dim > 1 else torch.ones(1)
    rows = latent_dim**0.5 * scales.diag()
    return torch.cat([rows, -rows]).to(like)
