"""The base of all models: checks that the parts fit, checks of the data, and the plate over the data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae.likelihoods import shape_of_datum
from pyro_ilvae.models._data import as_tensor, in_support, parts, refuse_single_datum
from pyro_ilvae.models._given import Given, are_labels, checked_context, checked_offset, takes, without_missing
from pyro_ilvae.models._minibatch import PLATE, check_replayed, checked_index, refuse_other_order
from pyro_ilvae.models._parts import agreed, check_bound, check_nats, check_roles
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
        context_network: nn.Module | None = None,
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
        widths = {
            name: getattr(part, "context_dim", None) for name, part in (("decoder", decoder), ("encoder", encoder))
        }
        widths = {f"{name}.context_dim": width for name, width in widths.items() if width is not None}
        self.context_dim: int | None = agreed("context_dim", widths) if widths else None
        self.context_network = None
        if context_network is not None:
            if not self._takes_context(decoder, encoder):
                raise ValueError(
                    "Expected context_network=None for a decoder and an encoder without context_dim, got a network"
                )
            _checks.instance("context_network", context_network, nn.Module, "a module, such as torch.nn.Embedding(...)")
            self.context_network = unused(context_network)
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

    def _check_decoder(self, decoder: nn.Module) -> None:
        """Raise unless the model can use a decoder of this kind."""

    def _takes_context(self, decoder: Any, encoder: Any) -> bool:
        """Whether one of the parts needs a context beside z or x."""
        return self._decoder_takes_context(decoder) or getattr(encoder, "context_dim", None) is not None

    def _decoder_takes_context(self, decoder: Any) -> bool:
        return getattr(decoder, "context_dim", None) is not None

    def _decoder_context(self, given: Given) -> Tensor | None:
        """The context to decode in, as it is given; None for a decoder that takes none."""
        if self._decoder_takes_context(self.decoder):
            return given.context if given.target_context is None else given.target_context
        if given.target_context is not None:
            raise ValueError("Expected target_context=None for a decoder without context_dim, got a context")
        return None

    def _check_initializes(self) -> None:
        if not callable(getattr(self.decoder, "initialize", None)):
            raise TypeError(f"Expected decoder with a method initialize, got {type(self.decoder).__name__}")

    def _prior(self) -> TorchDistribution:
        """The prior of z, with batch shape () and event shape (K,)."""
        return dist.Normal(self._prior_loc, torch.ones_like(self._prior_loc)).to_event(1)

    def _batches(
        self,
        x: Any,
        context: Any = None,
        *,
        mask: Any = None,
        offset: Any = None,
        target_context: Any = None,
        batch_size: int | None = None,
    ) -> Iterator[Given]:
        """The data, checked, from a tensor or an iterable of batches, at most ``batch_size`` at a time."""
        beside = {"context": context, "mask": mask, "offset": offset}
        for part, of_iterable in parts(x, self._datum_shapes(), len(self.event_shape)):
            own = beside | {"x": part}
            if of_iterable:
                for name in [name for name, value in beside.items() if value is not None]:
                    raise ValueError(
                        f"Expected {name}=None for an iterable of batches, got one: let each batch be a tuple of data "
                        "and context, or a mapping with the arguments of the model by name"
                    )
                own |= self._of_batch(part)
            given = self._given(**own) if own["x"] is not None else self._given(as_tensor(None))
            if target_context is not None:
                given = given._replace(target_context=self._checked_target(target_context, given))
            yield from given.batches(batch_size)

    _arguments: tuple[str, ...] = ("x", "context", "offset", "mask")  # that a batch of an iterable may hold by name

    def _of_batch(self, part: Any) -> dict[str, Any]:
        """The arguments of the model that a batch of an iterable holds."""
        if isinstance(part, Mapping):
            known = self._arguments
            if "x" not in part or not part.keys() <= {*known}:
                raise ValueError(f"Expected each batch to have x and other arguments among {known}, got {[*part]}")
            return dict(part)
        if not isinstance(part, tuple | list) or not part or not hasattr(part[0], "__array__"):
            return {"x": part}
        # Data sets with labels give tuples, of which the data come first.
        with_context = len(part) > 1 and self._takes_context(self.decoder, self.encoder)
        return {"x": part[0], "context": part[1]} if with_context else {"x": part[0]}

    def _code(self, given: Given) -> tuple[Tensor, Tensor]:
        """Location and scale of a batch, each (N, K), for an encoder that returns these two."""
        with evaluation_mode(self):
            loc, scale = self._location_and_scale(self._encoder_output(given))
        if loc.dim() > 2 or loc.shape[:-1] not in ((), (1,), (given.num_data,)):
            raise ValueError(
                f"Expected encoder to return location and scale of shape {(given.num_data, self.latent_dim)}, got "
                f"{tuple(loc.shape)}"
            )
        return loc.expand(given.num_data, -1), scale.expand(given.num_data, -1)

    def _encoded(self, batches: Iterable[Given]) -> tuple[Tensor, Tensor]:
        """Location and scale of all data, for an encoder that returns these two."""
        codes = [self._code(given) for given in batches]
        return torch.cat([loc for loc, _ in codes]), torch.cat([scale for _, scale in codes])

    def _sample_z(self, given: Given, plate: pyro.plate) -> Tensor:
        """The value of site ``z`` in the guide; without data, the guide is the prior."""
        if given.x is None:
            fn = self._prior()
        else:
            if hasattr(self.encoder, "_check_prior"):
                check_bound(self.encoder, self._prior())
            fn = dist.Normal(*self._location_and_scale(self._encoder_output(given))).to_event(1)
        with plate:
            value: Tensor = pyro.sample("z", fn)
        return value

    def _plate_of_guide(self, given: Given, index: Any) -> pyro.plate:
        """The plate over the data, for a guide that holds values for each datum."""
        x = given.x
        index = checked_index(index, x, self.data_size)
        if x is not None and index is None and self.data_size not in (None, len(x)):
            raise ValueError(
                f"Expected index, the numbers of the {len(x)} data at site 'x' among data_size = {self.data_size}, "
                "for a guide that holds values for each datum, got None: pass index="
            )
        if self.data_size is not None:
            refuse_other_order(index, self.data_size)
        return self._data_plate(given, index)

    def _data_plate(self, given: Given, index: Any) -> pyro.plate:
        x = given.x
        index = checked_index(index, x, self.data_size)
        if x is None:
            return pyro.plate(PLATE, given.num_data)
        size = len(x) if self.data_size is None else self.data_size
        if size < len(x):
            raise ValueError(f"Expected at most data_size = {size} data at site 'x', got {len(x)}")
        check_replayed(self, len(x), size, index)
        if index is None and size > len(x):
            # The caller has drawn a random batch. These indices stand for it, because letting the plate draw indices
            # would cost a permutation of the whole data set.
            index = torch.arange(len(x), device=x.device)
        return pyro.plate(PLATE, size, subsample=index)

    def _given(self, x: Any, context: Any = None, *, mask: Any = None, offset: Any = None, num_data: int = 1) -> Given:
        """The arguments of model and guide, checked; ``num_data`` counts only without data."""
        found, present = (None, None) if x is None else self._checked_data(x, mask)
        if found is not None:
            count = len(found)
        elif mask is not None:
            raise ValueError("Expected mask=None without x, got a mask")
        else:
            count = _num_data(num_data, context, offset)
        if self._takes_context(self.decoder, self.encoder):
            if context is None and not (x is None and not self._decoder_takes_context(self.decoder)):
                width = "C" if self.context_dim is None or self.context_network is not None else self.context_dim
                raise ValueError(
                    f"Expected context of shape ({count}, {width}), one for each datum, for a model whose decoder or "
                    "encoder has a context, got None"
                )
            context = None if context is None else self._checked_context("context", context, count)
        elif context is not None:
            raise ValueError(
                "Expected context=None for a model whose decoder and encoder have no context_dim, got a context"
            )
        if offset is not None:
            offset = checked_offset(offset, count, self._prior_loc, self.event_shape)
        return Given(count, found, context, offset, present)

    def _checked_context(self, name: str, context: Any, num_data: int, *, repeat: bool = False) -> Tensor:
        network = self.context_network
        return checked_context(
            name, context, num_data, self._prior_loc, self.context_dim, network=network, repeat=repeat
        )

    def _checked_target(self, target: Any, given: Given) -> Tensor:
        """The context to decode in: a label says nothing about numbers that the context has beside indicators."""
        found = self._checked_context("target_context", target, given.num_data, repeat=True)
        context = given.context
        if self.context_network is not None or context is None or not are_labels(target):
            return found
        if not (((context == 0) | (context == 1)).all() and (context.sum(-1) == 1).all()):
            raise ValueError(
                "Expected target_context to hold numbers of shape (..., C), as context, got labels for a context that "
                "is no indicator of a label: change its columns in a copy of context"
            )
        return found

    def _checked_data(self, x: Any, mask: Any = None) -> tuple[Tensor, Tensor | None]:
        """The data, checked, and converted to floating point unless the likelihood takes integers, and their mask."""
        x = as_tensor(x)
        refuse_single_datum(x, self._datum_shapes())
        x, mask = without_missing(x, mask, self.likelihood, self._ignores_missing)
        try:
            x = in_support(x, self.likelihood, self._prior_loc)
        except ValueError as error:
            if mask is None and x.is_floating_point() and x.isnan().any():
                raise ValueError(f"{error}; entries that are missing need missing='ignore' or mask=...") from None
            raise
        return x, None if mask is None else mask.to(x.device)

    @property
    def _ignores_missing(self) -> bool:
        """Whether NaN in the data are missing entries."""
        return False

    def _context_of(self, context: Tensor | None) -> Tensor | None:
        """The context that decoder and encoder take, of shape (..., C)."""
        if context is None or self.context_network is None:
            return context
        found: Tensor = self.context_network(context)
        fits = isinstance(found, Tensor) and found.dim() > 1 and found.shape[-2] == len(context)
        if not fits or self.context_dim not in (None, found.shape[-1]):
            got = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            width = "C" if self.context_dim is None else self.context_dim
            raise ValueError(f"Expected context_network to return shape ({len(context)}, {width}), got {got}")
        return found

    def _encoder_context(self, context: Any) -> Tensor | None:
        """What the encoder takes, for a context as the model is given it."""
        count = len(_checks.tensor("context", context))
        return self._context_of(self._checked_context("context", context, count))

    def _datum_shapes(self) -> set[torch.Size]:
        """The shapes that one datum is known to have: parts of users need not say it."""
        of_encoder = getattr(self.encoder, "event_shape", None)
        known = (shape_of_datum(self.likelihood, self.event_shape), of_encoder)
        return {torch.Size(shape) for shape in known if isinstance(shape, tuple)}

    def _encoder_output(self, given: Given) -> tuple[Tensor, ...]:
        """The output of the encoder, which must not have read the data as a single datum."""
        x = given.x
        assert x is not None
        beside: dict[str, Any] = {}
        if given.context is not None and takes(self.encoder, "context", "context_dim"):
            beside["context"] = self._context_of(given.context)
        if given.mask is not None:
            self._check_takes_mask()
            beside["mask"] = given.mask
        output: tuple[Tensor, ...] = self.encoder(x, **beside)
        if not beside and len(x) > 1 and _batch_shape(output) in ((), (1,)):
            # Either the posterior is the same for all data, or the encoder has added the batch dimension.
            with pyro.poutine.block():
                of_two = self.encoder(torch.stack([x, x]))
            if _batch_shape(of_two) == (2,):
                refuse_single_datum(x, {x.shape})
        return output

    def _check_takes_mask(self) -> None:
        if not takes(self.encoder, "mask", "takes_mask"):
            raise ValueError(
                "Expected encoder that sees which entries are missing, such as MLPEncoder(..., takes_mask=True), got "
                f"a {type(self.encoder).__name__} without"
            )

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


def _batch_shape(output: Any) -> tuple[int, ...] | None:
    """The shape of an encoder's first output, without its last dimension; None if it is something else."""
    first = output[0] if isinstance(output, tuple | list) and output else None
    return tuple(first.shape[:-1]) if isinstance(first, Tensor) and first.dim() > 0 else None


def _num_data(num_data: int, context: Any, offset: Any) -> int:
    """The number of data to draw: as many as there are contexts or offsets, unless it is given."""
    sizes = [len(part) for part in (context, offset) if getattr(part, "ndim", 0) > 0 or isinstance(part, list | tuple)]
    count = _checks.positive_int("num_data", num_data)
    return sizes[0] if sizes and count == 1 else count
