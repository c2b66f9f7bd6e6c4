"""The variational autoencoder with several layers of latent variables: a Pyro model and its guides."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModuleList, pyro_method
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.distributions import without_event
from pyro_ilvae.models._dense import DenseAutoencoder
from pyro_ilvae.models._given import Given
from pyro_ilvae.models._objective import refuse_closed_form
from pyro_ilvae.models._parts import check_bound
from pyro_ilvae.models.layer import Layer, unit_sample
from pyro_ilvae.networks import unused

__all__ = ["HierarchicalVAE"]


class HierarchicalVAE(DenseAutoencoder):
    r"""A variational autoencoder with T layers of latent variables, each a Normal channel to the next one.

    .. math:: z_T \sim N(0, I), \qquad z_t \mid z_{t+1} \sim N(f_t(z_{t+1}), \operatorname{diag} \sigma_t^2), \qquad
        x \mid z_1 \sim p(x \mid \eta = f(z_1)),

    for each datum in the plate ``data``; the sites are ``z1``, the lowest, to ``zT``, and ``x``. Upper layers collapse
    first: with plain decoders :math:`z_t` can do without :math:`z_{t+1}`. Inverse Lipschitz decoders of layers put a
    floor under the information between :math:`z_{t+1}` and :math:`z_t`, see
    :func:`~pyro_ilvae.diagnostics.guaranteed_information`. It is about neighbors, in the model: what :math:`z_2` says
    about x goes through :math:`z_1` and can be less.

    The same parts serve two guides:

    - ``inference="bottom_up"`` draws :math:`q(z_1 \mid x)\, q(z_2 \mid z_1) \cdots q(z_T \mid z_{T-1})`: each encoder
      reads the value that was drawn below it. It draws z1 before z2 and the model z2 before z1, so that the divergences
      of the sites have no closed form: use :class:`~pyro.infer.Trace_ELBO`.
      :class:`~pyro.infer.TraceMeanField_ELBO`, which would be wrong by the dependence of z1 and z2, is a ValueError.
    - ``inference="top_down"``, the ladder VAE [1], goes up without draws, :math:`(m_1, s_1) = e(x)` and
      :math:`(m_{t+1}, s_{t+1}) = e_t(m_t)`, and draws down from :math:`q(z_T \mid x) = N(m_T, \operatorname{diag}
      s_T^2)` by

      .. math:: q(z_t \mid z_{t+1}, x) \propto p(z_t \mid z_{t+1})\, N(z_t; m_t, \operatorname{diag} s_t^2).

      The encoders say what a datum adds to the prior. Model and guide draw in one order, and both objectives are right.

    :meth:`initialize` starts the decoder where the data are, and the decoders of layers, where they have such a method,
    as for a site below of mean 0 and scale 1, with the frame at its first coordinates: those in which the decoder below
    has the leading directions of the data.

    A weight with a prior is drawn from this prior by the top-down guide, which calls the decoders of the layers. Each
    site may have a weight of its own, as in ``AnnealedELBO(Trace_ELBO(), beta={"z1": 1.0, "z2": schedule})``. ``model``
    and ``guide`` return the value of ``x`` and of ``z1``.

    Args:
        decoder: the map :math:`f` from (..., :math:`K_1`) to natural parameters (..., \*event_shape).
        encoder: a module from data (..., \*data shape) to location and scale, each (..., :math:`K_1`).
        likelihood: a function from natural parameters to a distribution, see :mod:`pyro_ilvae.likelihoods`.
        layers: one :class:`~pyro_ilvae.Layer` for each site above ``z1``, from the bottom up: the first one is between
            ``z1`` and ``z2``.
        inference: the guide, "bottom_up" or "top_down".
        data_size: as for :class:`~pyro_ilvae.VAE`.
        context_network: as for :class:`~pyro_ilvae.VAE`. Contexts, offsets and masks concern the decoder, the encoder
            and the likelihood of x; the layers above have none.
        missing: as for :class:`~pyro_ilvae.VAE`.
        latent_dim: the dimension :math:`K_1`, if neither decoder nor encoder has this attribute.
        event_shape: as for :class:`~pyro_ilvae.VAE`.

    Raises:
        ValueError: for no layers, and for parts or layers that disagree on a dimension. ``model`` and ``guide`` raise
            it as for :class:`~pyro_ilvae.VAE`, and the bottom-up guide under an objective that is wrong for it.

    References:
        [1] Sonderby et al. 2016, Ladder variational autoencoders, https://arxiv.org/abs/1602.02282

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_ilvae import MLPDecoder, MLPEncoder, Nats, ProjectedDecoder, likelihoods, mlp
        >>> x = torch.rand(100, 8)
        >>> noise = likelihoods.Normal(0.6, estimate="learned")
        >>> upper = ProjectedDecoder(mlp(2, (16,), 4), latent_dim=2, event_shape=4, inverse_lipschitz=Nats(0.5, noise))
        >>> vae = HierarchicalVAE(
        ...     decoder=MLPDecoder(latent_dim=4, event_shape=8, hidden_features=(16,)),
        ...     encoder=MLPEncoder(event_shape=8, latent_dim=4, hidden_features=(16,)),
        ...     likelihood=likelihoods.Normal(0.1, estimate="learned"),
        ...     layers=[Layer(upper, MLPEncoder(event_shape=4, latent_dim=2, hidden_features=(16,)), noise)],
        ...     inference="top_down",
        ...     data_size=len(x),
        ... )
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        >>> losses = [svi.step(batch) for batch in x.split(20)]
        >>> vae.encode(x, site="z2")[0].shape, vae.reconstruct(x, site="z2").shape, vae.sample_prior(3).shape
        (torch.Size([100, 2]), torch.Size([100, 8]), torch.Size([3, 8]))
    """

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        likelihood: Callable[..., TorchDistribution],
        layers: Iterable[Layer],
        *,
        inference: Literal["bottom_up", "top_down"] = "bottom_up",
        data_size: int | None = None,
        context_network: nn.Module | None = None,
        missing: Literal["raise", "ignore"] = "raise",
        latent_dim: int | None = None,
        event_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            decoder,
            encoder,
            likelihood,
            data_size=data_size,
            context_network=context_network,
            missing=missing,
            latent_dim=latent_dim,
            event_shape=event_shape,
        )
        self.inference = _checks.choice("inference", inference, ("bottom_up", "top_down"))
        found = _checked_layers(layers, self.latent_dim)
        # The top site alone has a fixed prior.
        for name, part in (("encoder", self), *((f"layers[{i}].encoder", layer) for i, layer in enumerate(found[:-1]))):
            check_bound(part.encoder, "a site whose prior is given by the site above", name)
        self.layers = PyroModuleList([unused(layer) for layer in found])
        # The prior is that of the top site.
        self.register_buffer("_prior_loc", torch.zeros(found[-1].latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """The sizes and the guide, for ``print``."""
        return (
            f"latent_dims={self.latent_dims}, event_shape={tuple(self.event_shape)}, data_size={self.data_size}, "
            f"inference={self.inference!r}"
        )

    @property
    def latent_sites(self) -> tuple[str, ...]:
        """The names of the latent sites, from the bottom up: ``z1``, which the decoder takes, to ``zT``."""
        return tuple(f"z{t}" for t in range(1, len(self.layers) + 2))

    @property
    def latent_dims(self) -> tuple[int, ...]:
        """The dimensions of the latent sites, from the bottom up."""
        return (self.latent_dim, *(layer.latent_dim for layer in self._layers()))

    @pyro_method
    def model(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> Tensor:
        """The generative model, with arguments and value as for :meth:`~pyro_ilvae.VAE.model`."""
        given = self._given(x, context, mask=mask, offset=offset, num_data=num_data)
        plate = self._data_plate(given, index)
        return self._sample_x(self._sample_down(plate), given, plate)

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        site: str = "z1",
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Location and scale of a site in the guide, each of shape (N, K), for ``x`` of shape (N, \*data shape).

        They are given x, and given the means of the sites that the guide draws before this one: those below it for the
        bottom-up guide, those above it for the top-down guide.

        Args:
            x: the data, or an iterable of batches, as for :meth:`~pyro_ilvae.VAE.encode`.
            context: as for the model.
            mask: as for the model.
            site: the name of the latent site.
            batch_size: the number of data encoded at a time; all, or all of a batch, at once if None.
        """
        number = self._number(site)
        batches = self._batches(x, context, mask=mask, batch_size=batch_size)
        codes = [self._codes(batch)[number] for batch in batches]
        return torch.cat([loc for loc, _ in codes]), torch.cat([scale for _, scale in codes])

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        context: Tensor | None = None,
        target_context: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        site: str = "z1",
        batch_size: int | None = None,
    ) -> Tensor:
        r"""The mean :math:`E[x \mid z_1]` at the mean of a site, for ``x`` of shape (N, \*data shape).

        From a site above z1 it goes down by the means of the sites below, which shows what this site knows by itself.
        The other arguments and the value are as for :meth:`~pyro_ilvae.VAE.reconstruct`.

        Args:
            x: the data, or an iterable of batches, as for :meth:`~pyro_ilvae.VAE.encode`.
            context: as for the model.
            target_context: as for :meth:`~pyro_ilvae.VAE.reconstruct`.
            offset: as for :meth:`~pyro_ilvae.VAE.reconstruct`.
            mask: as for the model.
            site: the name of the latent site at whose mean, from :meth:`encode`, the reconstruction starts.
            batch_size: the number of data treated at a time; all, or all of a batch, at once if None.
        """
        number, means = self._number(site), []
        for batch in self._batches(
            x, context, mask=mask, offset=offset, target_context=target_context, batch_size=batch_size
        ):
            with evaluation_mode(self), self._pyro_context:
                z = self._codes(batch)[number][0]
                for layer in reversed(self._layers()[:number]):
                    z = layer(z).mean
                means.append(self._decoded(z, batch, mean=True))
        return torch.cat(means)

    def _initialize(self, data: Any, seed: int | None) -> None:
        """Start the decoder from data, and those of the layers where they give a site below of scale 1."""
        super()._initialize(data, seed)
        with seeded(seed):  # once, so that layers of one size start with different weights
            for layer, below in zip(self._layers(), self.latent_dims, strict=False):
                start: Any = getattr(layer.decoder, "initialize", None)
                if callable(start):
                    start(unit_sample(below, self._prior_loc), layer.noise, seed=None)

    def _sample_z(self, given: Given, plate: pyro.plate) -> Tensor:
        """The value of site ``z1`` in the guide; without data, the guide is the prior."""
        if given.x is None:
            return self._sample_down(plate)
        code = self._location_and_scale(self._encoder_output(given))
        if self.inference == "top_down":
            return self._sample_down(plate, self._upward(code))
        refuse_closed_form("a bottom-up guide, which draws z1 before z2", "inference='top_down'")
        values: list[Any] = []
        for t, site in enumerate(self.latent_sites):
            loc, scale = code if t == 0 else self._layers()[t - 1].factor(values[-1])
            with plate:
                values.append(pyro.sample(site, dist.Normal(loc, scale).to_event(1)))
        return values[0]  # type: ignore[no-any-return]

    def _sample_down(self, plate: pyro.plate, factors: Sequence[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """The value of site ``z1``, drawn from the top down, from the prior or, with factors, from the posterior."""
        z: Any = None
        for t in reversed(range(len(self.latent_sites))):
            # The decoders run outside the plate, so that a weight with a prior is drawn once and not for each datum.
            fn = self._site_given(t, z, factors)
            with plate:
                z = pyro.sample(f"z{t + 1}", fn)
        return z  # type: ignore[no-any-return]

    def _site_given(self, t: int, above: Any, factors: Sequence[tuple[Tensor, Tensor]] | None) -> TorchDistribution:
        """The distribution of the site number ``t``, from 0, given the one above; times its factor, if there is one."""
        top = t == len(self.layers)
        prior = self._prior() if top else self._layers()[t](above)
        if factors is None:
            return prior
        loc, scale = factors[t]
        return dist.Normal(*((loc, scale) if top else _product(prior, loc, scale))).to_event(1)

    def _upward(self, code: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Location and scale of all sites, each from the location of the site below."""
        codes = [code]
        for layer in self._layers():
            codes.append(layer.factor(codes[-1][0]))
        return codes

    def _codes(self, given: Given) -> list[tuple[Tensor, Tensor]]:
        """Location and scale of all sites for a batch, at the means of those that the guide draws before them."""
        code = self._code(given)
        with evaluation_mode(self), self._pyro_context:
            codes = self._upward(code)
            if self.inference == "top_down":
                for t in reversed(range(len(self.layers))):
                    codes[t] = _product(self._layers()[t](codes[t + 1][0]), *codes[t])
        return codes

    def _prior_draws(self, shape: torch.Size) -> Tensor:
        """Draws of z1 from the prior."""
        z = self._prior().sample(shape)
        with evaluation_mode(self), self._pyro_context:
            for layer in reversed(self._layers()):
                z = layer(z).sample()
        return z

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _number(self, site: str) -> int:
        return self.latent_sites.index(_checks.choice("site", site, self.latent_sites))


def _product(prior: Any, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of a Normal density, up to a constant, that is the product of two."""
    normal = without_event(prior)
    total = (normal.scale.square() + scale.square()).sqrt()
    share = (normal.scale / total).square()
    return normal.loc + share * (loc - normal.loc), normal.scale / total * scale


def _checked_layers(layers: Any, latent_dim: int) -> list[Layer]:
    """The layers, which have to fit on each other."""
    if isinstance(layers, Layer) or not isinstance(layers, Iterable):
        raise TypeError(f"Expected layers to be a list of Layer(...), got {layers!r}")
    found = list(layers)
    if not found:
        raise ValueError(
            "Expected layers to hold at least one Layer, got none: a VAE is the model with one latent site"
        )
    below = latent_dim
    for i, layer in enumerate(found):
        if not isinstance(layer, Layer):
            raise TypeError(f"Expected layers to be a list of Layer(...), got {layer!r} as layers[{i}]")
        for name in ("decoder", "encoder"):
            own = getattr(getattr(layer, name), "event_shape", None)
            if own is not None and tuple(own) != (below,):
                raise ValueError(
                    f"Expected layers[{i}] with {name}.event_shape ({below},), the shape of site 'z{i + 1}', got "
                    f"{tuple(own)}"
                )
        # A scale with a prior is drawn at each reading.
        scale = () if layer.noise._pyro_samples else layer.noise.noise_scale.shape
        if scale not in ((), (1,), (below,)):
            raise ValueError(
                f"Expected layers[{i}] with a noise scale of one number or of shape ({below},), the shape of site "
                f"'z{i + 1}', got {tuple(scale)}"
            )
        layer._features = below
        below = layer.latent_dim
    return found
