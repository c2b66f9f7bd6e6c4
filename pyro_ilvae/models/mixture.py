"""The variational autoencoder whose prior is a mixture of Gaussians: a Pyro model and its guide in one PyroModule."""

from collections.abc import Callable, Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.models._components import of_component
from pyro_ilvae.models._labels import LabelledCategorical, checked_labels, known
from pyro_ilvae.models._mixture_posterior import MixturePosterior
from pyro_ilvae.models._objective import refuse_without_enumeration
from pyro_ilvae.models._parts import check_bound

__all__ = ["MixtureVAE"]


class MixtureVAE(MixturePosterior):
    r"""A variational autoencoder whose prior is a mixture of Gaussians: a GMVAE, LIDMVAE or IL-LIDMVAE.

    .. math:: y_n \sim \operatorname{Categorical}(\pi), \qquad
        z_n \mid y_n \sim N(m_{y_n}, \operatorname{diag} s_{y_n}^2), \qquad x_n \mid z_n \sim p(x \mid \eta = f(z_n)),

    for data :math:`n = 1, \dots, N` in the plate ``data``; the sites are ``y``, ``z`` and ``x``. With a plain decoder
    this is a GMVAE, with an inverse Lipschitz decoder a LIDMVAE (L = 0) or an IL-LIDMVAE (L > 0).

    The guide is :math:`q(y \mid x)\, q(z \mid x, y)`, with y enumerated in parallel: use
    :class:`~pyro.infer.TraceEnum_ELBO`, by itself or in an :class:`~pyro_ilvae.AnnealedELBO` with a weight for each of
    ``y`` and ``z``. All components pass through the decoder in one call. The output of the encoder decides the form of
    the guide:

    - Location a and scale b, each (..., K), are a Normal factor that says what the datum tells about z. The guide
      multiplies the prior of each component by this factor, which is exact for a likelihood that is Gaussian in z:

      .. math:: q(z \mid x, y) \propto N(z; m_y, s_y^2)\, N(z; a, b^2), \qquad
          q(y \mid x) \propto \pi_y\, N(a; m_y, s_y^2 + b^2).

    - Logits (..., C), locations and scales (..., C, K), as from an encoder with ``num_components``, are the parameters
      of :math:`q(y \mid x)` and :math:`q(z \mid x, y)`.

    With ``enumerate_in="model"``, the guide is :math:`q(z \mid x) = N(a, \operatorname{diag} b^2)`, and y is summed out
    of the model exactly: each datum passes through the decoder once, for any number of components. This form needs
    :class:`~pyro.infer.TraceEnum_ELBO` too. The sites ``y`` and ``z`` then need the same weight, and ``Predictive``
    draws y from its prior: use :meth:`predict_component` or :func:`~pyro_ilvae.from_pyro_svi` instead.

    Where the component of some data is known, ``model`` and ``guide`` take it as ``y``, with -1 for all other data.
    These data have the bound

    .. math:: \operatorname{E}_{q(z \mid x, y)} \log p(x \mid z) - \operatorname{KL}(q(z \mid x, y) \,\|\,
        p(z \mid y)) + \log \pi_y,

    with :math:`q(z \mid x)` in place of :math:`q(z \mid x, y)` where y is summed out of the model. It trains
    :math:`q(y \mid x)` of the factor form too, since that follows from the components. An encoder with
    ``num_components`` has logits that only data without a label train.

    Components can have a prior (for example a ``PyroSample`` as ``component_loc``) in model and guide, except for a
    guide with the factor form, which reads the components. The other methods need components without a prior.

    Components start in the units of z that L implies, with locations from :math:`N(0, r^2 I)` and scales r for
    :math:`r = 1 / \max(1, L)`, or for the r that data give to :meth:`initialize`. They start at random places, and data
    tend to gather in the few components that are useful first: :meth:`initialize_components` places them at clusters of
    a trained encoder's codes instead.
    :func:`~pyro_ilvae.diagnostics.component_usage` finds empty components, and
    :func:`~pyro_ilvae.diagnostics.coinciding_components` finds components that lie on top of each other. The order of
    the components has no meaning and differs from seed to seed:
    :func:`~pyro_ilvae.diagnostics.match_components` aligns the components of two fits.

    Args:
        decoder: the map :math:`f`, from (..., K) to natural parameters (..., \*event_shape).
        encoder: a module from data (..., \*data shape) to one of the forms above.
        likelihood: a function from natural parameters to a distribution, see :mod:`pyro_ilvae.likelihoods`.
        num_components: the number :math:`C` of components.
        data_size: the number N of data in the data set, as for :class:`~pyro_ilvae.VAE`.
        context_network: as for :class:`~pyro_ilvae.VAE`. Components are the same in all contexts.
        missing: as for :class:`~pyro_ilvae.VAE`.
        weights: "fixed" keeps :math:`\pi` uniform, which keeps components in use; "learned" trains it.
        scales: "learned" trains s; "fixed" keeps s at 1, and locations start from N(0, I). L is in units of z, so small
            scales weaken what L asks for.
        enumerate_in: "guide" or "model".
        latent_dim: as for :class:`~pyro_ilvae.VAE`.
        event_shape: as for :class:`~pyro_ilvae.VAE`.

    Raises:
        ValueError: if the parts disagree on a dimension or on the number of components, and for a likelihood with an
            optimal scale where y is enumerated in the guide. ``model`` and ``guide`` raise it as for
            :class:`~pyro_ilvae.VAE`, and ``model`` under an ELBO that does not enumerate y.

    References:
        | Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder
          network, https://arxiv.org/abs/2304.12770
        | Wang, Blei & Cunningham 2021, Posterior collapse and latent variable non-identifiability,
          https://arxiv.org/abs/2301.00537
        | Johnson et al. 2016, Composing graphical models with neural networks, https://arxiv.org/abs/1603.06277 (an
          encoder that returns a factor for a conjugate prior)

    Example:
        >>> import torch
        >>> from pyro.infer import SVI, TraceEnum_ELBO
        >>> from pyro_ilvae import AnnealedELBO, InverseLipschitzDecoder, MLPEncoder, likelihoods
        >>> x = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 10])
        >>> mixture = MixtureVAE(
        ...     decoder=InverseLipschitzDecoder(latent_dim=2, event_shape=2, inverse_lipschitz=(1.0, 1.0)),
        ...     encoder=MLPEncoder(event_shape=2, latent_dim=2, hidden_features=(32,)),
        ...     num_components=2,
        ...     likelihood=likelihoods.Normal(1.0, estimate="learned"),
        ...     data_size=len(x),
        ... )
        >>> elbo = AnnealedELBO(TraceEnum_ELBO(), beta={"y": 2.0, "z": 1.0})
        >>> svi = SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> losses = [svi.step(batch) for batch in x.split(20)]
        >>> mixture.predict_component(x).shape, mixture.sample_component(1, num_samples=3).shape
        (torch.Size([100, 2]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        likelihood: Callable[..., TorchDistribution],
        num_components: int,
        *,
        data_size: int | None = None,
        context_network: nn.Module | None = None,
        missing: Literal["raise", "ignore"] = "raise",
        weights: Literal["fixed", "learned"] = "fixed",
        scales: Literal["learned", "fixed"] = "learned",
        enumerate_in: Literal["guide", "model"] = "guide",
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
        self.num_components = _checks.positive_int("num_components", num_components)
        self.weights = _checks.choice("weights", weights, ("fixed", "learned"))
        self.scales = _checks.choice("scales", scales, ("learned", "fixed"))
        self.enumerate_in = _checks.choice("enumerate_in", enumerate_in, ("guide", "model"))
        own = getattr(encoder, "num_components", None)
        if own is not None and (enumerate_in == "model" or own != self.num_components):
            expected = self.num_components if enumerate_in == "guide" else None
            raise ValueError(f"Expected an encoder with num_components = {expected}, got {own}")
        check_bound(encoder, "a prior that is a mixture")
        if enumerate_in == "guide" and getattr(likelihood, "depends_on_batch", False):
            raise ValueError(
                "Expected a likelihood with a fixed or learned scale for enumerate_in='guide', got an optimal scale, "
                "which would count improbable components as much as probable ones"
            )
        self._create_components()

    def extra_repr(self) -> str:
        """The sizes and choices, for ``print``."""
        return (
            f"{super().extra_repr()}, num_components={self.num_components}, weights={self.weights!r}, "
            f"scales={self.scales!r}, enumerate_in={self.enumerate_in!r}"
        )

    @pyro_method
    def model(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        y: Tensor | None = None,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> Tensor:
        """The generative model, with value as for :meth:`~pyro_ilvae.VAE.model`.

        Args:
            x: the data, as for :meth:`~pyro_ilvae.VAE.model`.
            context: as for :meth:`~pyro_ilvae.VAE.model`.
            y: the known component of each datum, ints of shape (N,) from 0 to C - 1, or -1 where it is unknown.
            offset: as for :meth:`~pyro_ilvae.VAE.model`.
            mask: as for :meth:`~pyro_ilvae.VAE.model`.
            index: as for :meth:`~pyro_ilvae.VAE.model`.
            num_data: as for :meth:`~pyro_ilvae.VAE.model`.

        Raises:
            ValueError: for labels of another shape, kind or range, and as for :meth:`~pyro_ilvae.VAE.model`.
            TypeError: for labels that are no tensor, and cannot be made one.
        """
        refuse_without_enumeration("y", self.enumerate_in)
        given = self._given(x, context, mask=mask, offset=offset, num_data=num_data)
        plate = self._data_plate(given, index)
        labels = self._labels(y, given.num_data)
        # The components are read outside the plate, so that a prior on them is global and not one for each datum.
        logits, loc, scale = self._components()
        prior = dist.Categorical(logits=logits) if labels is None else LabelledCategorical(logits, labels)
        with plate:
            component = pyro.sample("y", prior, infer={"enumerate": "parallel"} if self.enumerate_in == "model" else {})
            z = pyro.sample("z", dist.Normal(of_component(loc, component), of_component(scale, component)).to_event(1))
        return self._sample_x(z, given, plate)

    @pyro_method
    def guide(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        y: Tensor | None = None,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> Tensor:
        """The amortized posterior, with arguments as for the model and value as for :meth:`~pyro_ilvae.VAE.guide`."""
        given = self._given(x, context, mask=mask, offset=offset, num_data=num_data)
        self._warn_of_another_model()
        plate = self._data_plate(given, index)
        labels = self._labels(y, given.num_data)
        if self.enumerate_in == "model":
            return self._sample_z(given, plate)
        logits, loc, scale = self._components() if given.x is None else self._posterior(given)
        with plate:
            component = pyro.sample(
                "y", dist.Categorical(logits=known(logits, labels)), infer={"enumerate": "parallel"}
            )
            q = dist.Normal(of_component(loc, component), of_component(scale, component)).to_event(1)
            z: Tensor = pyro.sample("z", q)
        return z

    def create_plates(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        y: Tensor | None = None,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> pyro.plate:
        """The plate over the data, as :meth:`~pyro_ilvae.VAE.create_plates`, which needs no labels."""
        return super().create_plates(x, context, offset=offset, mask=mask, index=index, num_data=num_data)

    def _labels(self, y: Tensor | None, num_data: int) -> Tensor | None:
        """The known components, checked, if there are any."""
        return checked_labels(y, num_data, self.num_components, self._prior_loc)
