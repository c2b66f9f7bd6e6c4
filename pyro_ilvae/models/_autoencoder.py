"""The base of all models: checks that the parts fit, checks of the data, and the plate over the data."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.likelihoods import mean_of_data, shape_of_datum
from pyro_ilvae.models._data import as_tensor, in_support, parts, refuse_single_datum
from pyro_ilvae.models._minibatch import PLATE, check_replayed, checked_index, refuse_other_order
from pyro_ilvae.models._parts import agreed, check_nats, check_roles
from pyro_ilvae.networks import unused, warn_of_another


class Autoencoder(PyroModule):
    """A decoder, an encoder and a likelihood that fit together; see :class:`~pyro_ilvae.VAE` for the arguments."""

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        likelihood: Callable[..., TorchDistribution],
        *,
        data_size: int | None = None,
        latent_dim: int | None = None,
        event_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_roles(decoder, encoder, likelihood)
        self._check_decoder(decoder)
        dims = {
            "the argument latent_dim": latent_dim,
            "decoder.latent_dim": getattr(decoder, "latent_dim", None),
            "encoder.latent_dim": getattr(encoder, "latent_dim", None),
        }
        self.latent_dim = _checks.positive_int("latent_dim", agreed("latent_dim", dims))
        own_shape = getattr(decoder, "event_shape", None)
        shapes = {
            "the argument event_shape": None if event_shape is None else _checks.event_shape(event_shape),
            "decoder.event_shape": None if own_shape is None else _checks.event_shape(own_shape),
        }
        self.event_shape: torch.Size = agreed("event_shape", shapes)
        self.data_size = None if data_size is None else _checks.positive_int("data_size", data_size)
        self.decoder = unused(decoder)
        self.encoder = unused(encoder)
        self.likelihood = unused(likelihood)
        check_nats(decoder, likelihood)
        if hasattr(likelihood, "_event_dim"):
            likelihood._event_dim = len(self.event_shape)
        self.register_buffer("_prior_loc", torch.zeros(self.latent_dim), persistent=False)

    _prior_loc: Tensor

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return f"latent_dim={self.latent_dim}, event_shape={tuple(self.event_shape)}, data_size={self.data_size}"

    @property
    def prior(self) -> TorchDistribution:
        """The prior of z, a distribution of event shape (K,)."""
        return self._prior()

    def initialize(self, x: Any, *, seed: int | None = None) -> None:
        r"""Start where the data are: the decoder's start from data, with the likelihood of this model.

        Call it before training; see :meth:`~pyro_ilvae.ProjectedDecoder.initialize` for what is set.

        Args:
            x: a sample of the data of shape (N, \*data shape), or an iterable of batches, which is read once.
            seed: a seed for the weights that are drawn anew; the global random state if None.

        Raises:
            TypeError: for a decoder without a method ``initialize``.
            ValueError: as for the model.
        """
        if not callable(getattr(self.decoder, "initialize", None)):
            raise TypeError(f"Expected decoder with a method initialize, got {type(self.decoder).__name__}")
        check_nats(self.decoder, self.likelihood)
        self._initialize(self._batches(x, None), seed)

    def _initialize(self, batches: Iterator[Tensor], seed: int | None) -> None:
        self.decoder.initialize(batches, self.likelihood, seed=seed)  # type: ignore[operator]

    @pyro_method
    def guide(self, x: Tensor | None = None, *, index: Tensor | None = None, num_data: int = 1) -> Tensor:
        """The amortized posterior, or the prior without data; the arguments are as for the model.

        Returns:
            The value of site ``z``.
        """
        x = self._checked(x)
        self._warn_of_another_model()
        return self._sample_z(x, self._data_plate(x, index, num_data))

    @torch.no_grad()
    def encode(self, x: Tensor, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        r"""Location and scale of q(z | x), each of shape (N, K), for ``x`` of shape (N, \*data shape).

        Args:
            x: the data, or an iterable of batches, such as a DataLoader or a list, which are encoded one after the
                other. Each batch is a tensor or an array of data, or a tuple or list with it in its first place. A
                single datum needs a batch dimension too.
            batch_size: the number of data encoded at a time; all, or all of a batch, at once if None.
        """
        return self._encoded(x, batch_size)

    def _check_decoder(self, decoder: nn.Module) -> None:
        """Raise unless the model can use a decoder of this kind."""

    def _prior(self) -> TorchDistribution:
        """The prior of z, with batch shape () and event shape (K,)."""
        return dist.Normal(self._prior_loc, torch.ones_like(self._prior_loc)).to_event(1)

    def _batches(self, x: Any, batch_size: int | None) -> Iterator[Tensor]:
        """The data, checked, from a tensor or an iterable of batches, at most ``batch_size`` at a time."""
        for part in parts(x, self._datum_shapes(), len(self.event_shape)):
            yield from batches(self._checked_data(part), batch_size)

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of a batch, each (N, K), for an encoder that returns these two."""
        with evaluation_mode(self):
            loc, scale = self._location_and_scale(self._encoder_output(x))
        if loc.dim() > 2 or loc.shape[:-1] not in ((), (1,), (len(x),)):
            raise ValueError(
                f"Expected encoder to return location and scale of shape {(len(x), self.latent_dim)}, got "
                f"{tuple(loc.shape)}"
            )
        return loc.expand(len(x), -1), scale.expand(len(x), -1)

    def _encoded(self, x: Any, batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Location and scale of all data, for an encoder that returns these two."""
        codes = [self._code(batch) for batch in self._batches(x, batch_size)]
        return torch.cat([loc for loc, _ in codes]), torch.cat([scale for _, scale in codes])

    def _sample_z(self, x: Tensor | None, plate: pyro.plate) -> Tensor:
        """The value of site ``z`` in the guide; without data, the guide is the prior."""
        fn = self._prior() if x is None else dist.Normal(*self._location_and_scale(self._encoder_output(x))).to_event(1)
        with plate:
            value: Tensor = pyro.sample("z", fn)
        return value

    def create_plates(self, x: Tensor | None = None, *, index: Tensor | None = None, num_data: int = 1) -> pyro.plate:
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
        x = self._checked(x)
        index = checked_index(index, x, self.data_size)
        if x is not None and index is None and self.data_size not in (None, len(x)):
            raise ValueError(
                f"Expected index, the numbers of the {len(x)} data at site 'x' among data_size = {self.data_size}, "
                "for a guide that holds values for each datum, got None: pass index="
            )
        if self.data_size is not None:
            refuse_other_order(index, self.data_size)
        return self._data_plate(x, index, num_data)

    def _data_plate(self, x: Tensor | None, index: Any, num_data: int) -> pyro.plate:
        index = checked_index(index, x, self.data_size)
        if x is None:
            return pyro.plate(PLATE, _checks.positive_int("num_data", num_data))
        size = len(x) if self.data_size is None else self.data_size
        if size < len(x):
            raise ValueError(f"Expected at most data_size = {size} data at site 'x', got {len(x)}")
        check_replayed(self, len(x), size, index)
        if index is None and size > len(x):
            # The caller has drawn a random batch. These indices stand for it, because letting the plate draw indices
            # would cost a permutation of the whole data set.
            index = torch.arange(len(x), device=x.device)
        return pyro.plate(PLATE, size, subsample=index)

    def _checked(self, x: Any) -> Tensor | None:
        """The data, checked, if there are any."""
        return None if x is None else self._checked_data(x)

    def _checked_data(self, x: Any) -> Tensor:
        """The data, checked, and converted to floating point unless the likelihood takes integers."""
        x = as_tensor(x)
        refuse_single_datum(x, self._datum_shapes())
        return in_support(x, self.likelihood, self._prior_loc)

    def _datum_shapes(self) -> set[torch.Size]:
        """The shapes that one datum is known to have: parts of users need not say it."""
        of_encoder = getattr(self.encoder, "event_shape", None)
        known = (shape_of_datum(self.likelihood, self.event_shape), of_encoder)
        return {torch.Size(shape) for shape in known if isinstance(shape, tuple)}

    def _encoder_output(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of the encoder, which must not have read ``x`` as a single datum."""
        output: tuple[Tensor, ...] = self.encoder(x)
        if len(x) > 1 and _batch_shape(output) in ((), (1,)):
            # Either the posterior is the same for all data, or the encoder has added the batch dimension.
            with pyro.poutine.block():
                of_two = self.encoder(torch.stack([x, x]))
            if _batch_shape(of_two) == (2,):
                refuse_single_datum(x, {x.shape})
        return output

    def _location_and_scale(self, output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The output of an encoder, checked to be a location and a scale."""
        if not isinstance(output, tuple | list) or not all(isinstance(part, Tensor) for part in output):
            raise TypeError(f"Expected encoder to return a tuple of tensors, got a {type(output).__name__}")
        shapes = tuple(tuple(part.shape) for part in output)
        if len(output) != 2 or shapes[0] != shapes[1] or shapes[0][-1:] != (self.latent_dim,):
            raise ValueError(
                f"Expected encoder to return location and scale of shape (..., {self.latent_dim}), got {shapes}"
            )
        loc, scale = output
        return loc, scale

    def _warn_of_another_model(self) -> None:
        """Warn if the param store holds parameters of another model, under the names of this model's parameters."""
        warn_of_another(self, "model", "Call pyro.clear_param_store() before fitting a new model")


class DenseAutoencoder(Autoencoder):
    """A model of data of a fixed shape, for which the decoder returns all natural parameters at once."""

    def _check_decoder(self, decoder: nn.Module) -> None:
        if getattr(decoder, "conditional", False):
            raise ValueError(
                f"Expected decoder to be a function of z alone, got a {type(decoder).__name__} that needs a context; "
                "fix the context by decoder.given(context)"
            )

    @torch.no_grad()
    def sample_prior(
        self, num_samples: int = 1, batch_size: int | None = None, *, mean: bool = False, seed: int | None = None
    ) -> Tensor:
        r"""Draws from the prior predictive, of shape (num_samples, \*data shape).

        Args:
            num_samples: the number of data to draw.
            batch_size: the number of data drawn at a time; all at once if None.
            mean: whether to return :math:`E[x \mid z]` for each drawn z instead of a draw of x.
            seed: a seed for the draws; the global random state if None.
        """
        shape = torch.Size([_checks.positive_int("num_samples", num_samples)])
        _checks.boolean("mean", mean)
        with seeded(seed):
            return self._decoded(self._prior_draws(shape), batch_size, mean=mean)

    def _prior_draws(self, shape: torch.Size) -> Tensor:
        """Draws of the latent variable that the decoder takes."""
        return self._prior().sample(shape)

    def _decoded(self, z: Tensor, batch_size: int | None, *, mean: bool) -> Tensor:
        """The mean of x, or a draw of x, for each row of ``z``."""
        parts = []
        # In one context, so that a constant in nats follows the draw of a scale with a prior that the likelihood has.
        with evaluation_mode(self), self._pyro_context:
            for batch in batches(z, batch_size):
                eta = self.decoder(batch)
                parts.append(mean_of_data(self.likelihood, eta) if mean else self.likelihood(eta).sample())
        return torch.cat(parts)

    def _sample_x(self, z: Tensor, x: Tensor | None, plate: pyro.plate) -> Tensor:
        """The value of site ``x`` given ``z``: the data, or a draw."""
        # The decoder runs outside the plate, so that a weight with a prior is drawn once and not for each datum.
        distribution = self._likelihood(self.decoder(z), x)
        with plate:
            value: Tensor = pyro.sample("x", distribution, obs=x)
        return value

    def _likelihood(self, eta: Tensor, x: Tensor | None) -> TorchDistribution:
        if not isinstance(eta, Tensor):
            raise TypeError(f"Expected decoder to return a tensor, got a {type(eta).__name__}")
        split = eta.dim() - len(self.event_shape)
        if split < 1 or eta.shape[split:] != self.event_shape:
            expected = ", ".join(["...", *map(str, self.event_shape)])
            raise ValueError(f"Expected decoder to return shape ({expected}), got {tuple(eta.shape)}")
        check_nats(self.decoder, self.likelihood)  # either may have been replaced
        distribution = self.likelihood(eta, x)
        if not isinstance(distribution, torch.distributions.Distribution):
            raise TypeError(f"Expected likelihood to return a distribution, got a {type(distribution).__name__}")
        data_shape = distribution.batch_shape[split:]
        if x is not None and x.shape[1:] != data_shape:
            expected = ", ".join(["N", *map(str, data_shape)])
            raise ValueError(f"Expected data at site 'x' of shape ({expected}), got {tuple(x.shape)}")
        return distribution.to_event(len(data_shape))


def _batch_shape(output: Any) -> tuple[int, ...] | None:
    """The shape of an encoder's first output, without its last dimension; None if it is something else."""
    first = output[0] if isinstance(output, tuple | list) and output else None
    return tuple(first.shape[:-1]) if isinstance(first, Tensor) and first.dim() > 0 else None


def batches(x: Tensor, batch_size: int | None) -> tuple[Tensor, ...]:
    """The rows of ``x``, ``batch_size`` at a time; all at once if None."""
    if batch_size is None:
        return (x,)
    return x.split(_checks.positive_int("batch_size", batch_size))
