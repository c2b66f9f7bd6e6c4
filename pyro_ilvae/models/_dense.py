"""Models of data of a fixed shape, for which the decoder returns all natural parameters at once."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.decoders.start import WorkingData
from pyro_ilvae.likelihoods import mean_of_data
from pyro_ilvae.models._autoencoder import Autoencoder
from pyro_ilvae.models._given import Given, takes
from pyro_ilvae.models._parts import check_nats
from pyro_ilvae.models._start import working_data


class DenseAutoencoder(Autoencoder):
    """A model of data of a fixed shape; see :class:`~pyro_ilvae.VAE` for the arguments."""

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        likelihood: Callable[..., TorchDistribution],
        *,
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
            latent_dim=latent_dim,
            event_shape=event_shape,
        )
        self.missing = _checks.choice("missing", missing, ("raise", "ignore"))
        if self.missing == "ignore":
            self._check_takes_mask()

    @pyro_method
    def guide(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> Tensor:
        """The amortized posterior, or the prior without data; the arguments are as for the model.

        Returns:
            The value of the latent site that the decoder takes.
        """
        given = self._given(x, context, mask=mask, offset=offset, num_data=num_data)
        self._warn_of_another_model()
        return self._sample_z(given, self._data_plate(given, index))

    def create_plates(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> pyro.plate:
        """The plate over the data, for the argument ``create_plates`` of Pyro's AutoGuides.

        An AutoGuide holds values for each datum and draws batches of its own. With this plate it takes the batch that
        it is called with. The arguments are as for the model.

        Raises:
            ValueError: as for the model, for a batch of less than ``data_size`` data without ``index``, and for an
                ``index`` of all data that is not in order.

        Example:
            >>> from pyro.infer.autoguide import AutoNormal
            >>> from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, likelihoods
            >>> decoder = MLPDecoder(latent_dim=2, event_shape=8, hidden_features=(16,))
            >>> encoder = MLPEncoder(latent_dim=2, event_shape=8, hidden_features=(16,))
            >>> vae = VAE(decoder, encoder, likelihoods.Normal(), data_size=60)
            >>> guide = AutoNormal(vae.model, create_plates=vae.create_plates)
            >>> guide(torch.randn(10, 8), index=torch.randperm(60)[:10])["z"].shape
            torch.Size([10, 2])
        """
        return self._plate_of_guide(self._given(x, context, mask=mask, offset=offset, num_data=num_data), index)

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Location and scale of q(z | x), each of shape (N, K), for ``x`` of shape (N, \*data shape).

        Args:
            x: the data, or an iterable of batches, such as a DataLoader or a list, which are encoded one after the
                other. Each batch is a tensor or an array of data, a tuple or list with it in its first place, and with
                the context in its second place if the model has one, or a mapping with the arguments of the model by
                name. A single datum needs a batch dimension too.
            context: as for the model.
            mask: as for the model.
            batch_size: the number of data encoded at a time; all, or all of a batch, at once if None.
        """
        return self._encoded(self._batches(x, context, mask=mask, batch_size=batch_size))

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
        r"""Start where the data are: the decoder's start from data, with the likelihood of this model.

        Call it before training; see :meth:`~pyro_ilvae.ProjectedDecoder.initialize` for what is set. The directions are
        sought in what a context leaves of the data: what is linear in the context is taken off. A of a projected
        decoder starts at these effects of the context, so that z need not learn them. With an ``offset`` directions
        are sought in data moved to the mean :math:`\bar o` of the offsets, and the bias b of the decoder gives the data
        their mean,

        .. math:: \tilde x_n = \mu(b + \bar o) + \mu'(b + \bar o) \, \frac{x_n - \mu(b + o_n)}{\mu'(b + o_n)}, \qquad
            \sum_n (x_n - \mu(b + o_n)) = 0,

        with the mean :math:`\mu(\eta)` of the likelihood and its derivative: for counts, these are counts over sizes.
        Missing entries take the mean of their feature.

        Args:
            x: a sample of the data of shape (N, \*data shape), or an iterable of batches, which is read once.
            context: as for the model.
            offset: as for the model.
            mask: as for the model.
            seed: a seed for the weights that are drawn anew; the global random state if None.

        Raises:
            TypeError: for a decoder without a method ``initialize``.
            ValueError: as for the model.
        """
        self._check_initializes()
        check_nats(self.decoder, self.likelihood)
        batches = self._batches(x, context, mask=mask, offset=offset)
        # A context that the encoder alone reads explains nothing of the data.
        explains = self._decoder_takes_context(self.decoder)
        with evaluation_mode(self):
            given = (batch._replace(context=self._context_of(batch.context) if explains else None) for batch in batches)
            data = working_data(given, self.likelihood, self.event_shape)
        self._initialize(data, seed)

    def _initialize(self, data: Any, seed: int | None) -> None:
        if isinstance(data, WorkingData) and not hasattr(self.decoder, "_start_of"):
            data = data.values  # for a decoder of a user's, as data
        self.decoder.initialize(data, self.likelihood, seed=seed)  # type: ignore[operator]

    @property
    def _ignores_missing(self) -> bool:
        return self.missing == "ignore"

    def _check_decoder(self, decoder: nn.Module) -> None:
        if hasattr(decoder, "vocab_size") and getattr(decoder, "conditional", False):
            raise ValueError(
                f"Expected decoder of data of a fixed shape, got a {type(decoder).__name__}, which needs the tokens "
                "before each token: use SequentialVAE"
            )

    def _decoder_takes_context(self, decoder: Any) -> bool:
        return bool(getattr(decoder, "conditional", False)) or super()._decoder_takes_context(decoder)

    @torch.no_grad()
    def sample_prior(
        self,
        num_samples: int = 1,
        context: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        mean: bool = False,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        r"""Draws from the prior predictive, of shape (num_samples, \*data shape).

        Args:
            num_samples: the number of data to draw.
            context: the context of each, or one for all: a label, or numbers of shape (C,) without a
                ``context_network``.
            offset: as for the model; 0 if None.
            mean: whether to return :math:`E[x \mid z]` for each drawn z instead of a draw of x.
            batch_size: the number of data that pass the decoder at a time; all at once if None.
            seed: a seed for the draws; the global random state if None.
        """
        given = self._to_decode(num_samples, context, offset)
        _checks.boolean("mean", mean)
        with seeded(seed):
            return self._decoded(self._prior_draws(torch.Size([given.num_data])), given, batch_size, mean=mean)

    def _prior_draws(self, shape: torch.Size) -> Tensor:
        """Draws of the latent variable that the decoder takes."""
        return self._prior().sample(shape)

    def _to_decode(self, num_data: int, context: Any, offset: Any) -> Given:
        """What a number of data are decoded with; one context may stand for all."""
        num_data = _checks.positive_int("num_samples", num_data)
        if context is not None and self._takes_context(self.decoder, self.encoder):
            context = self._checked_context("context", context, num_data, repeat=True)
        return self._given(None, context, offset=offset, num_data=num_data)

    def _decoded(self, z: Tensor, given: Given, batch_size: int | None = None, *, mean: bool) -> Tensor:
        """The mean of x, or a draw of x, for each row of ``z``."""
        done = []
        # In one context, so that a constant in nats follows the draw of a scale with a prior that the likelihood has.
        with evaluation_mode(self), self._pyro_context:
            rows = z.split(given.num_data if batch_size is None else _checks.positive_int("batch_size", batch_size))
            for points, part in zip(rows, given.batches(batch_size), strict=True):
                eta = self._natural_parameters(points, part)
                done.append(mean_of_data(self.likelihood, eta) if mean else self.likelihood(eta).sample())
        return torch.cat(done)

    def _natural_parameters(self, z: Tensor, given: Given) -> Tensor:
        """The value of the decoder, checked, and shifted by the offset."""
        context = self._context_of(self._decoder_context(given))
        eta = self.decoder(z) if context is None else self.decoder(z, context)
        if not isinstance(eta, Tensor):
            raise TypeError(f"Expected decoder to return a tensor, got a {type(eta).__name__}")
        split = eta.dim() - len(self.event_shape)
        if split < 1 or eta.shape[split:] != self.event_shape:
            expected = ", ".join(["...", *map(str, self.event_shape)])
            raise ValueError(f"Expected decoder to return shape ({expected}), got {tuple(eta.shape)}")
        return eta if given.offset is None else eta + given.offset

    def _sample_x(self, z: Tensor, given: Given, plate: pyro.plate) -> Tensor:
        """The value of site ``x`` given ``z``: the data, or a draw."""
        # The decoder runs outside the plate, so that a weight with a prior is drawn once and not for each datum.
        distribution = self._likelihood(self._natural_parameters(z, given), given)
        with plate:
            value: Tensor = pyro.sample("x", distribution, obs=given.x)
        return value

    def _likelihood(self, eta: Tensor, given: Given) -> TorchDistribution:
        check_nats(self.decoder, self.likelihood)  # either may have been replaced
        x, mask = given.x, given.mask
        if mask is not None and getattr(self.likelihood, "depends_on_batch", False):
            if not takes(self.likelihood, "mask", "takes_mask"):
                raise ValueError(
                    "Expected likelihood whose density depends on the batch to take a mask as its third argument, got "
                    f"a {type(self.likelihood).__name__}"
                )
            distribution = self.likelihood(eta, x, mask)
        else:
            distribution = self.likelihood(eta, x)
        if not isinstance(distribution, torch.distributions.Distribution):
            raise TypeError(f"Expected likelihood to return a distribution, got a {type(distribution).__name__}")
        data_shape = distribution.batch_shape[eta.dim() - len(self.event_shape) :]
        if x is not None and x.shape[1:] != data_shape:
            expected = ", ".join(["N", *map(str, data_shape)])
            raise ValueError(f"Expected data at site 'x' of shape ({expected}), got {tuple(x.shape)}")
        if mask is not None:
            distribution = distribution.mask(mask)
        return distribution.to_event(len(data_shape))
