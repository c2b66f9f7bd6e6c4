"""What a mixture model has for its components: the prior of z that they are, and where they start."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.decoders.start import LinearContext
from pyro_ilvae.models._clusters import find_clusters
from pyro_ilvae.models._dense import DenseAutoencoder
from pyro_ilvae.models._labels import checked_labels

_NUM_DRAWS = 1000


class MixturePrior(DenseAutoencoder):
    """A dense autoencoder whose prior of z is a mixture of C Gaussians."""

    num_components: int
    weights: str
    scales: str
    enumerate_in: str
    component_loc: Tensor
    component_logits: Tensor
    component_log_scale: Tensor

    def _create_components(self) -> None:
        """Parameters and buffers of the components at their start without data."""
        shape = (self.num_components, self.latent_dim)
        start = self._start_of_components(torch.randn(shape), self._reach_of_constant())
        self.component_loc = nn.Parameter(start["component_loc"])
        for name, value, estimate in (
            ("component_logits", torch.zeros(self.num_components), self.weights),
            ("component_log_scale", start.get("component_log_scale", torch.zeros(shape)), self.scales),
        ):
            if estimate == "learned":
                setattr(self, name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def _start_of_components(self, loc: Tensor, reach: float) -> dict[str, Tensor]:
        """Locations and scales times ``reach``; scales that are fixed at 1 need locations that do not draw near."""
        if self.scales == "fixed":
            return {"component_loc": loc}
        return {"component_loc": reach * loc, "component_log_scale": torch.full_like(loc, reach).log()}

    @torch.no_grad()
    def initialize(
        self,
        x: Any,
        context: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        r"""Start where the data are: first the decoder, then components that are spread as the data are.

        .. math:: m_c = r\, \frac{e_c - \bar e}{\operatorname{rms}(e - \bar e)}, \qquad s_c = r, \qquad
            r = \min(1, t / d),

        with e of shape (C, K) from N(0, I), centered so that few components do not lie together by chance, t the root
        mean square of the data's coordinates in the frame, in units of natural parameters, and d the slope of the
        decoder at its start,

        .. math:: d^2 = \tfrac1K \operatorname{E} \|P f(z) - \operatorname{E} P f(z)\|^2, \qquad z \sim N(0, I),

        with P as in :meth:`~pyro_ilvae.ProjectedDecoder.coordinates`, or without P for a decoder that has no such
        method. Components are then no wider than the data once they are decoded, however large L is. Around scales that
        are fixed at 1, locations have r = 1. Weights stay, and so do components with a prior. A decoder of another
        class starts by its own method ``initialize``, and the components as those of a new model. Call it before
        training; :meth:`initialize_components` places components at clusters once the encoder is trained.

        Args:
            x: a sample of the data of shape (N, \*data shape), or an iterable of batches, which is read once.
            context: as for :meth:`~pyro_ilvae.VAE.initialize`.
            offset: as for :meth:`~pyro_ilvae.VAE.initialize`.
            mask: as for :meth:`~pyro_ilvae.VAE.initialize`.
            seed: a seed for the weights that are drawn anew; the global random state if None.

        Raises:
            TypeError: for a decoder without a method ``initialize``.
            ValueError: as for the model.
        """
        super().initialize(x, context, offset=offset, mask=mask, seed=seed)

    def _initialize(self, data: Any, seed: int | None) -> None:
        decoder: Any = self.decoder
        start_of = getattr(decoder, "_start_of", None)
        if start_of is None:
            super()._initialize(data, seed)
        with seeded(seed):
            loc = torch.randn(self.num_components, self.latent_dim)
            if start_of is None:
                reach = self._reach_of_constant()
            else:
                start = start_of(data, self.likelihood, seed)
                decoder._apply_start(start)
                reach = start.extent / max(start.extent, self._slope(start.context))
                if self.num_components > 1:
                    # The bias of the decoder is the center of the data.
                    loc -= loc.mean(0)
                    loc /= loc.square().mean().sqrt()
            for name, value in self._start_of_components(loc, reach).items():
                if name not in self._pyro_samples:
                    self._set(name, value)

    def _reach_of_constant(self) -> float:
        """How far z goes for one unit of what the decoder returns, at most 1, as far as its constant tells."""
        constant: float | None = getattr(self.decoder, "inverse_lipschitz", None)
        return 1 / max(1.0, constant or 0.0)

    def _slope(self, at: LinearContext | None) -> float:
        """The root mean square by which a unit of z moves what the decoder returns, over draws from N(0, I)."""
        z = torch.randn(_NUM_DRAWS, self.latent_dim).to(self._prior_loc)
        context = () if at is None else (at.mean.to(z),)
        with evaluation_mode(self):
            y = self.decoder(z, *context)
        coordinates = getattr(self.decoder, "coordinates", None)
        y = y.flatten(1) if coordinates is None else coordinates(y)
        return float(((y - y.mean(0)).double().square().sum(-1).mean() / self.latent_dim).sqrt())

    @torch.no_grad()
    def initialize_components(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        y: Tensor | None = None,
        mask: Tensor | None = None,
        restarts: int = 10,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        r"""Place the components at clusters of encoded data, found by k-means; the encoder must be trained.

        .. math:: m_c = \operatorname{mean}_{n \in c} a_n, \qquad
            s_c^2 = \operatorname{mean}_{n \in c} \big((a_n - m_c)^2 \pm b_n^2\big), \qquad \pi_c = N_c / N,

        with :math:`a_n, b_n` the encoder's location and scale for datum n. If y is enumerated in the model, the sign is
        +, because they describe the posterior, for example as learned by a :class:`~pyro_ilvae.VAE` with the same
        decoder and encoder. If y is enumerated in the guide, the sign is -, because they describe a factor with
        :math:`a_n \sim N(m_c, s_c^2 + b_n^2)`; :math:`s_c^2` is then at least a tenth of the variance of the locations.
        Fixed weights and scales keep their values. Where the component of some data is known, the clusters are numbered
        so that as many of these data as possible are in the cluster of their label: training with labels does not
        exchange components that lie at other clusters.

        Args:
            x: the data, of shape (N, \*data shape), or an iterable of batches, as for :meth:`~pyro_ilvae.VAE.encode`.
            context: as for the model.
            y: the known component of each datum, as for the model; one tensor for all data, also with batches.
            mask: as for the model.
            restarts: the number of runs of k-means; the run with the closest clusters counts.
            batch_size: the number of data encoded at a time; all at once if None.
            seed: a seed for k-means; the global random state if None.

        Returns:
            The cluster of each datum, of shape (N,).

        Raises:
            ValueError: for fewer different data than components, for components with a prior, and for an encoder with
                ``num_components``, which encodes data for each component only.
            ImportError: if scikit-learn is not installed.

        References:
            Jiang et al. 2017, Variational deep embedding, https://arxiv.org/abs/1611.05148
        """
        _checks.positive_int("restarts", restarts)
        self._check_no_prior("initialize_components")
        loc, scale = self._encoded(self._batches(x, context, mask=mask, batch_size=batch_size))
        sign = 1.0 if self.enumerate_in == "model" else -1.0
        labels = checked_labels(y, len(loc), self.num_components, self._prior_loc)
        clusters = find_clusters(loc, sign * scale.square(), self.num_components, restarts, seed)
        if labels is not None:
            clusters = clusters.numbered_as(labels)
        self._set("component_loc", clusters.loc)
        if self.scales == "learned":
            self._set("component_log_scale", clusters.scale.log())
        if self.weights == "learned":
            self._set("component_logits", clusters.share.log())
        return clusters.members

    def _set(self, name: str, value: Tensor) -> None:
        """Give a parameter of the components a value, also where it is constrained."""
        if name not in self._pyro_params:
            getattr(self, name).copy_(value)
            return
        constraint, _ = self._pyro_params[name]
        if not constraint.check(value).all():
            raise ValueError(f"Expected {name} with a constraint that holds at its start {value}, got {constraint}")
        setattr(self, name, value.to(self._prior_loc))

    def _components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the weights, locations and scales of the components."""
        return self.component_logits, self.component_loc, self.component_log_scale.exp()

    def _prior(self) -> TorchDistribution:
        logits, loc, scale = self._components()
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))

    def _check_no_prior(self, where: str) -> None:
        priors = [name for name in self._pyro_samples if name.startswith("component_")]
        if priors:
            raise ValueError(
                f"Expected components without a prior in {where}, got a PyroSample for {priors}: use an encoder with "
                "num_components or enumerate_in='model'"
            )
