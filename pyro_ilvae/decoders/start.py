"""Where a decoder starts: natural parameters of the mean of data, their directions, and the likelihood's noise unit."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae._contexts import seeded
from pyro_ilvae.decoders.frames import Frame, centered, columns_of
from pyro_ilvae.decoders.inversion import weights_are_drawn
from pyro_ilvae.decoders.nats import information_diagonal, noise_unit
from pyro_ilvae.decoders.principal import Moments, TokenCounts, batches_of
from pyro_ilvae.likelihoods import Categorical, check_support

__all__ = [
    "LinearContext",
    "Place",
    "Start",
    "WorkingData",
    "categories_of",
    "check_weights",
    "last_layer",
    "start_from_data",
    "start_from_tokens",
    "start_linear_path",
]


# Of data for whose dtypes PyTorch has few operations.
_WIDER = {torch.bool: torch.uint8} | dict.fromkeys((torch.uint16, torch.uint32, torch.uint64), torch.int64)


class Place(NamedTuple):
    """What a start from data has to know about a decoder."""

    event_shape: torch.Size  #: of its natural parameters, with D entries
    num_directions: int  #: K, or more with a context
    like: Tensor  #: one of its parameters, for dtype and device
    frame: Frame | None = None  #: a frame that stays; None for the directions of the data
    num_categories: int = 0  #: of a centered frame
    weights: Tensor | None = None  #: scales of the entries, in units of which the frame lies


class WorkingData(NamedTuple):
    """A sample on the scale of means, from which what else explains the data has been taken off."""

    values: Tensor  #: of shape (N, *event_shape); they need not be in the support of the likelihood
    center: Tensor | None  #: the natural parameters of their mean, of shape event_shape; computed from the mean if None
    shift: Tensor | None  #: what the natural parameters have beyond the decoder's; nothing if None
    context: "LinearContext | None" = None  #: what the natural parameters owe to a context; nothing if None


class LinearContext(NamedTuple):
    """The part of natural parameters that is linear in a context."""

    slopes: Tensor  #: of shape (C, *event_shape)
    mean: Tensor  #: the mean context, of shape (C,), at which this part is 0


class Start(NamedTuple):
    """What a decoder takes from data."""

    bias: Tensor | None  #: the natural parameters b of the mean of the data, of shape (D,); None to leave it
    directions: Tensor  #: orthonormal columns: the leading directions of the data, or the columns of a frame that stays
    num_found: int  #: how many of the columns come from the data, which may vary in few directions
    unit: float  #: the noise unit u of the likelihood at b, in these directions
    spread: float  #: the root mean square of the data's coordinates in these directions, in natural parameters
    context: LinearContext | None = None  #: what the natural parameters owe to a context
    share: float = 0.5  #: how many noise units a map adds to a linear one; more learn faster at first and end lower

    @property
    def extent(self) -> float:
        """How far the data reach, in natural parameters: their spread, and at most 1 for data that do not vary."""
        # Where data do not vary, the information at their mean may be near 0, and the noise unit very large.
        return self.spread if self.spread > 0 else min(self.unit, 1.0)

    @property
    def scale(self) -> float:
        """The size of what a map adds at the start: a share of a noise unit, or less where the data vary less."""
        return self.share * min(self.unit, self.extent)


@torch.no_grad()
def start_from_data(x: Any, likelihood: Any, place: Place, seed: int | None) -> Start:
    """The start for a sample or its batches."""
    with seeded(seed):  # a loader may draw, and what is drawn afterwards must not depend on that
        moments = _moments(x, likelihood, place)
    center = x.center if isinstance(x, WorkingData) else None
    bias = _natural_parameters(likelihood, moments, place) if center is None else center.to(place.like)
    if place.frame is None:
        found = _directions(moments, likelihood, bias, place).to(place.like.device)
        directions, num_found = completed(found, place.num_directions, place.num_categories), found.shape[1]
    else:
        directions, num_found = columns_of(place.frame), 0
    likelihood.information_product(bias, bias)  # which raises for scales of another shape than a datum's
    noise = normal_scale(likelihood)
    unit = noise_unit(likelihood, bias) if noise is None else noise
    columns = directions.double()
    columns = columns if place.weights is None else columns / place.weights.to(columns)[:, None]
    spread = math.sqrt(float(moments.variances(columns).mean()))
    # One step of scoring: the natural parameters of a datum differ from b by about I(b)^-1 times its score.
    spread = spread * unit * unit if noise is None else spread
    if isinstance(x, WorkingData) and x.shift is not None:
        bias = bias - x.shift.to(place.like)
    context = None
    if isinstance(x, WorkingData) and x.context is not None:
        context = LinearContext(x.context.slopes.flatten(1).to(place.like), x.context.mean.to(place.like))
    return Start(bias.flatten().to(place.like), directions.to(place.like), num_found, unit, spread, context)


@torch.no_grad()
def start_from_tokens(x: Any, latent_dim: int, place: Place, seed: int | None) -> Start:
    """The start of the logits of each token, for a sample of sequences or its batches."""
    (vocab_size,) = place.event_shape
    with seeded(seed):
        counts = TokenCounts(x, vocab_size)
    totals = counts.totals()
    num_tokens = float(totals.sum())
    if num_tokens == 0:
        raise ValueError("Expected x with at least one token, got none")
    likelihood = Categorical(vocab_size)
    mean = likelihood._interior_mean(totals / num_tokens, int(num_tokens))
    bias = likelihood.natural_parameters(mean).to(place.like)
    if place.frame is None:
        found = counts.directions(latent_dim).to(place.like.device)
        directions, num_found = completed(found, place.num_directions, vocab_size), found.shape[1]
    else:
        directions, num_found = columns_of(place.frame), 0
    # A sequence tells about z at each of its tokens.
    unit = noise_unit(likelihood, bias) / math.sqrt(num_tokens / counts.num_sequences)
    # The bias stays: logits of rare tokens that start low are learned more slowly, and end higher, measured on words.
    return Start(None, directions.to(place.like), num_found, unit, unit, share=0.2)


def _directions(moments: Moments, likelihood: Any, bias: Tensor, place: Place) -> Tensor:
    """The leading directions of the data, of shape (D, K) or fewer.

    For counts they are those of the data in units of their noise, taken to the space of natural parameters: log rates
    are as much in the directions of rare counts, where data vary little.
    """
    if not getattr(likelihood, "_natural_directions", False):
        return moments.directions(place.num_directions, place.weights, place.num_categories)
    information = information_diagonal(likelihood, bias).flatten().sqrt()
    noise = likelihood(bias).variance.double().flatten().sqrt()
    columns = moments.directions(place.num_directions, noise)
    columns = centered(columns / information.to(columns)[:, None], place.num_categories)
    q, r = torch.linalg.qr(columns)
    # What lies in a shift of all categories alone is no direction.
    return (q * r.diagonal().sign())[:, r.diagonal().abs() > 1e-9 * columns.norm(dim=0)]


def check_weights(decoder: Any) -> None:
    """Raise where a start would be set on weights that are drawn anew, or constrained."""
    if weights_are_drawn(decoder):
        raise ValueError(
            f"Expected decoder whose weights are parameters for a start from data, got a {type(decoder).__name__} with "
            "a prior or a constraint on some: call initialize before these are set"
        )


def _moments(x: Any, likelihood: Any, place: Place) -> Moments:
    """The moments of the data, checked; those of the indicators of categories."""
    categories, data_shape = categories_of(likelihood, place.event_shape)
    moments = Moments()
    if isinstance(x, WorkingData):
        moments.add(x.values)
        return moments
    for batch in batches_of(x, data_shape, place.event_shape.numel()):
        if len(batch) > 0:
            batch = batch.to(_WIDER.get(batch.dtype, batch.dtype))
            check_support(likelihood, batch, "x")
            moments.add(F.one_hot(batch.long(), categories) if categories else batch)
    if moments.total == 0:
        raise ValueError("Expected x with at least one datum, got none")
    return moments


def categories_of(likelihood: Any, event_shape: torch.Size) -> tuple[int, torch.Size]:
    """The number of categories, 0 without, and the shape of a datum."""
    for name in ("natural_parameters", "information_product"):
        if isinstance(likelihood, type) or not callable(getattr(likelihood, name, None)):
            raise TypeError(f"Expected likelihood to be an object with the method {name}, got {likelihood!r}")
    own = getattr(likelihood, "num_categories", None)
    if own is None or not getattr(likelihood, "integer_data", False):
        return 0, event_shape
    if own != event_shape[-1]:
        raise ValueError(
            f"Expected likelihood with num_categories = {event_shape[-1]}, the last entry of the decoder's "
            f"event_shape, got {own}"
        )
    return int(own), event_shape[:-1]


def interior_mean(likelihood: Any, mean: Tensor, num_data: int) -> Tensor:
    """A mean of ``num_data`` data, moved inside of the range of means where a likelihood can."""
    own = getattr(likelihood, "_interior_mean", None)
    return mean if own is None else own(mean, num_data)  # type: ignore[no-any-return]


def _natural_parameters(likelihood: Any, moments: Moments, place: Place) -> Tensor:
    """The natural parameters of the mean of the data, moved inside of the range of means where a likelihood can."""
    average = moments.mean.to(place.like.device).reshape(place.event_shape)
    bias = likelihood.natural_parameters(interior_mean(likelihood, average, moments.total))
    if not isinstance(bias, Tensor) or bias.shape != place.event_shape:
        got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(
            f"Expected likelihood whose natural_parameters have the shape {tuple(place.event_shape)} of the mean, got "
            f"{got}"
        )
    if not bias.isfinite().all():
        raise ValueError(
            "Expected likelihood with finite natural_parameters for the mean of x, got NaN or infinity: move means "
            "at the limit of their range inside of it"
        )
    return bias


def normal_scale(likelihood: Any) -> float | None:
    """The scale of Normal noise, the geometric mean of several; None without."""
    scale = getattr(likelihood, "noise_scale", None)
    if scale is None:
        return None
    return float(torch.as_tensor(scale).detach().double().log().mean().exp())


def completed(directions: Tensor, num_directions: int, num_categories: int) -> Tensor:
    """Orthonormal columns, those that are missing drawn at random, centered over each set of categories if any."""
    features = directions.shape[0]
    if directions.shape[1] == num_directions:
        return directions
    others = torch.randn(features, num_directions - directions.shape[1]).to(directions)
    # Twice, because what is left of a draw may be little.
    for _ in range(2):
        others = centered(others - directions @ (directions.mT @ others), num_categories)
        others = torch.linalg.qr(others).Q
    return torch.cat([directions, others], dim=1)


@torch.no_grad()
def start_linear_path(weight: Tensor, start: Start, network: nn.Module | None) -> None:
    """Put a linear path at the leading directions of the data, and nothing beside it if there is a network to zero."""
    # The data may vary in fewer directions than z.
    weight.zero_()[:, : start.num_found].copy_(start.unit * start.directions[:, : start.num_found])
    if network is not None:
        zero_last_layer(network)


def last_layer(network: nn.Module) -> nn.Module | None:
    """The linear layer with which an MLPDecoder or a sequence of layers ends; None where it is not known."""
    layers = getattr(network, "network", network)
    last = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) > 0 else None
    # A weight that is normalized is computed from others, for which 0 is no value.
    known = isinstance(last, nn.Linear | nn.modules.conv._ConvNd) and "weight" in last._parameters
    return last if known else None


@torch.no_grad()
def zero_last_layer(network: nn.Module) -> None:
    """Let a network return 0 at the start, if it is an MLPDecoder or a sequence of layers that ends with a linear one.

    What other networks return at their start is not known from outside, and is left as it is.
    """
    last = last_layer(network)
    for parameter in last._parameters.values() if last is not None else ():
        if parameter is not None:
            parameter.zero_()
