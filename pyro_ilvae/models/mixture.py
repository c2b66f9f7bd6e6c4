"""The variational autoencoder whose prior is a mixture of Gaussians: a Pyro model and its guide in one PyroModule."""

from collections.abc import Callable, Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.models._components import checked, mean_and_scale, of_component, responsibilities, times_factor
from pyro_ilvae.models._labels import LabelledCategorical, checked_labels, known
from pyro_ilvae.models._mixture_prior import MixturePrior
from pyro_ilvae.models._objective import refuse_without_enumeration

__all__ = ["MixtureVAE"]


class MixtureVAE(MixturePrior):
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
        >>> import pyro
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
        weights: Literal["fixed", "learned"] = "fixed",
        scales: Literal["learned", "fixed"] = "learned",
        enumerate_in: Literal["guide", "model"] = "guide",
        latent_dim: int | None = None,
        event_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            decoder, encoder, likelihood, data_size=data_size, latent_dim=latent_dim, event_shape=event_shape
        )
        self.num_components = _checks.positive_int("num_components", num_components)
        self.weights = _checks.choice("weights", weights, ("fixed", "learned"))
        self.scales = _checks.choice("scales", scales, ("learned", "fixed"))
        self.enumerate_in = _checks.choice("enumerate_in", enumerate_in, ("guide", "model"))
        own = getattr(encoder, "num_components", None)
        if own is not None and (enumerate_in == "model" or own != self.num_components):
            expected = self.num_components if enumerate_in == "guide" else None
            raise ValueError(f"Expected an encoder with num_components = {expected}, got {own}")
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
        *,
        y: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> Tensor:
        """The generative model, with value as for :meth:`~pyro_ilvae.VAE.model`.

        Args:
            x: the data, as for :meth:`~pyro_ilvae.VAE.model`.
            y: the known component of each datum, ints of shape (N,) from 0 to C - 1, or -1 where it is unknown.
            index: as for :meth:`~pyro_ilvae.VAE.model`.
            num_data: the number of data to draw without ``x``.

        Raises:
            ValueError: for labels of another shape, kind or range, and as for :meth:`~pyro_ilvae.VAE.model`.
            TypeError: for labels that are no tensor, and cannot be made one.
        """
        refuse_without_enumeration("y", self.enumerate_in)
        x = self._checked(x)
        plate = self._data_plate(x, index, num_data)
        labels = self._labels(y, num_data if x is None else len(x))
        # The components are read outside the plate, so that a prior on them is global and not one for each datum.
        logits, loc, scale = self._components()
        prior = dist.Categorical(logits=logits) if labels is None else LabelledCategorical(logits, labels)
        with plate:
            component = pyro.sample("y", prior, infer={"enumerate": "parallel"} if self.enumerate_in == "model" else {})
            z = pyro.sample("z", dist.Normal(of_component(loc, component), of_component(scale, component)).to_event(1))
        return self._sample_x(z, x, plate)

    @pyro_method
    def guide(
        self,
        x: Tensor | None = None,
        *,
        y: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> Tensor:
        """The amortized posterior, with arguments as for the model and value as for :meth:`~pyro_ilvae.VAE.guide`."""
        x = self._checked(x)
        self._warn_of_another_model()
        plate = self._data_plate(x, index, num_data)
        labels = self._labels(y, num_data if x is None else len(x))
        if self.enumerate_in == "model":
            return self._sample_z(x, plate)
        logits, loc, scale = self._components() if x is None else self._posterior(x)
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
        *,
        y: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> pyro.plate:
        """The plate over the data, as :meth:`~pyro_ilvae.VAE.create_plates`, which needs no labels."""
        return super().create_plates(x, index=index, num_data=num_data)

    @torch.no_grad()
    def encode(self, x: Tensor, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        r"""Mean and standard deviation of :math:`q(z \mid x)`, over all components, each of shape (N, K).

        Args:
            x: the data, of shape (N, \*data shape), or an iterable of batches, as for :meth:`~pyro_ilvae.VAE.encode`.
            batch_size: the number of data encoded at a time; all at once if None.
        """
        moments = [mean_and_scale(*self._posterior_of(batch)) for batch in self._batches(x, batch_size)]
        return torch.cat([mean for mean, _ in moments]), torch.cat([scale for _, scale in moments])

    @torch.no_grad()
    def predict_component(
        self, x: Tensor, batch_size: int | None = None, *, num_samples: int = 100, seed: int | None = None
    ) -> Tensor:
        r"""The probability of each component, :math:`q(y \mid x)`, of shape (N, C).

        If y is enumerated in the model, the probability is :math:`E_{q(z \mid x)}\, p(y \mid z)`, an average over
        draws of z. Otherwise it needs no draws.

        Args:
            x: the data, of shape (N, \*data shape), or an iterable of batches, as for :meth:`~pyro_ilvae.VAE.encode`.
            batch_size: the number of data treated at a time; all at once if None.
            num_samples: the number of draws of z for each datum.
            seed: a seed for the draws; the global random state if None.
        """
        _checks.positive_int("num_samples", num_samples)
        probs = []
        with evaluation_mode(self), seeded(seed):
            for batch in self._batches(x, batch_size):
                if self.enumerate_in == "guide":
                    probs.append(self._posterior_of(batch)[0])
                else:
                    q = dist.Normal(*self._code(batch))
                    # One draw at a time, because each becomes C times as many numbers.
                    draws = (responsibilities(q(), *self._components()) for _ in range(num_samples))
                    probs.append(sum(draws, start=q.loc.new_zeros(())) / num_samples)
        return torch.cat(probs)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        r"""The mean :math:`E[x \mid z]` at the posterior mean of z under each datum's most probable component.

        If y is enumerated in the model, z is its posterior mean over all components instead. For a categorical
        likelihood, the result holds probabilities, and has the categories as its last dimension.

        Args:
            x: the data, of shape (N, \*data shape), or an iterable of batches, as for :meth:`~pyro_ilvae.VAE.encode`.
            batch_size: the number of data treated at a time; all at once if None.
        """
        posteriors = map(self._posterior_of, self._batches(x, batch_size))
        best = (of_component(loc, probs.argmax(-1)) for probs, loc, _ in posteriors)
        return torch.cat([self._decoded(z, None, mean=True) for z in best])

    @torch.no_grad()
    def sample_component(
        self,
        component: int,
        num_samples: int = 1,
        batch_size: int | None = None,
        *,
        mean: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        r"""Draws from one component of the prior predictive, :math:`p(x \mid y)`, of shape (num_samples, \*data shape).

        Args:
            component: the number y of the component, from 0 to C - 1.
            num_samples: the number of data to draw.
            batch_size: the number of data drawn at a time; all at once if None.
            mean: whether to return :math:`E[x \mid z]` for each drawn z instead of a draw of x.
            seed: a seed for the draws; the global random state if None.
        """
        component = _checks.index_below("component", component, self.num_components)
        _checks.positive_int("num_samples", num_samples)
        _checks.boolean("mean", mean)
        _, loc, scale = self._components()
        with seeded(seed):
            z = dist.Normal(loc[component], scale[component]).sample((num_samples,))
            return self._decoded(z, batch_size, mean=mean)

    def _labels(self, y: Tensor | None, num_data: int) -> Tensor | None:
        """The known components, checked, if there are any."""
        return checked_labels(y, num_data, self.num_components, self._prior_loc)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of q(y | x), of shape (..., C); locations and scales of q(z | x, y), each of shape (..., C, K)."""
        output = self._encoder_output(x)
        if isinstance(output, tuple | list) and len(output) == 3:
            return checked(tuple(output), self.num_components, self.latent_dim)
        self._check_no_prior("a guide whose encoder gives a factor")
        return times_factor(*self._components(), *self._location_and_scale(output))

    def _posterior_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A batch's q(y | x), of shape (N, C), and location and scale of q(z | x, y), each of shape (N, C, K).

        If y is enumerated in the model, C is 1, and the only component is q(z | x).
        """
        if self.enumerate_in == "model":
            loc, scale = (part.unsqueeze(-2) for part in self._code(x))
            return torch.ones_like(loc[..., 0]), loc, scale
        with evaluation_mode(self):
            logits, loc, scale = self._posterior(x)
        if loc.shape[:-2] != (len(x),):
            raise ValueError(
                f"Expected encoder to return one posterior for each of {len(x)} data, got {loc.shape[:-2]}"
            )
        return logits.softmax(-1), loc, scale
