"""Where a decoder starts: natural parameters of the mean of data, their directions, and the likelihood's noise unit."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae.decoders.frames import Frame, OrthonormalFrame
from pyro_ilvae.decoders.nats import noise_unit
from pyro_ilvae.decoders.principal import Moments, TokenCounts, batches_of
from pyro_ilvae.likelihoods import Categorical, check_support

__all__ = ["Start", "start_from_data"]

# In noise units. A larger start learns faster and ends lower; see the results of the experiments.
SCALE, SCALE_OF_TOKENS = 0.5, 0.2


class Start(NamedTuple):
    """What a decoder takes from data."""

    offset: Tensor  #: the natural parameters b of the mean of the data, of shape (D,)
    directions: Tensor | None  #: the leading directions of the data, of shape (D, K) or fewer; None to keep the frame
    unit: float  #: the noise unit u of the likelihood at b, in the directions of the frame
    spread: float  #: the root mean square of the data's coordinates in the frame, in units of natural parameters
    scale: float  #: what a map adds to each coordinate of a linear map at the start, as a root mean square


@torch.no_grad()
def start_from_data(
    x: Any,
    likelihood: Any,
    event_shape: torch.Size,
    num_directions: int,
    frame: Frame | None = None,
    units: Tensor | None = None,
) -> Start:
    """The start for a sample or its batches, with a ``frame`` that stays, or else with the directions of the data.

    The directions are those of data that differ by more than their noise, in the space of natural parameters, in
    ``units`` of shape (D,) if they are given. Data may vary in fewer directions than ``num_directions``.
    """
    for name in ("natural_parameters", "information_product"):
        if isinstance(likelihood, type) or not callable(getattr(likelihood, name, None)):
            raise TypeError(f"Expected likelihood to be an object with the method {name}, got {likelihood!r}")
    categories = event_shape[-1] if getattr(likelihood, "integer_data", False) else 0
    data_shape = event_shape[:-1] if categories else event_shape
    moments = Moments()
    for batch in batches_of(x):
        if batch.shape[1:] != data_shape:
            expected = ", ".join(["N", *map(str, data_shape)])
            raise ValueError(f"Expected x of shape ({expected}), got {tuple(batch.shape)}")
        check_support(likelihood, batch, "x")
        moments.add(F.one_hot(batch.long(), categories) if categories else batch)
    if moments.total == 0:
        raise ValueError("Expected x with at least one datum, got none")
    average = moments.mean.reshape(event_shape)
    interior = getattr(likelihood, "_interior_mean", None)
    mean = average if interior is None else interior(average, moments.total)
    offset = likelihood.natural_parameters(mean)
    directions = None
    if frame is None:
        spread_of_noise, slope = _noise(likelihood, offset, mean, categories)
        per_unit = slope if units is None else slope * units
        directions = moments.directions(num_directions, spread_of_noise, per_unit, categories)
        frame = OrthonormalFrame(directions).to(offset)
    noise = normal_scale(likelihood)
    unit = noise_unit(likelihood, offset) if noise is None else noise
    if frame.latent_dim == 0:  # all data are equal
        return Start(offset.flatten(), directions, unit, unit, SCALE * unit)
    # One step of scoring: the natural parameters of a datum differ from b by about I(b)^-1 times its score.
    columns = frame.embed(torch.eye(frame.latent_dim).to(offset)).mT.double()
    if units is not None:
        columns = columns / units.double()[:, None]
    spread = math.sqrt(float(moments.variances(columns).mean()))
    spread = spread * unit * unit if noise is None else spread
    return Start(offset.flatten(), directions, unit, spread, SCALE * min(unit, spread))


@torch.no_grad()
def start_from_tokens(x: Any, vocab_size: int, num_directions: int) -> Start:
    """The start of the logits of each token, for a sample of sequences or its batches."""
    counts = TokenCounts(x, vocab_size)
    totals = counts.totals()
    num_tokens = float(totals.sum())
    if num_tokens == 0:
        raise ValueError("Expected x with at least one token, got none")
    likelihood = Categorical(vocab_size)
    mean = likelihood._interior_mean(totals / num_tokens, int(num_tokens))
    offset = likelihood.natural_parameters(mean).to(torch.get_default_dtype())
    directions = counts.directions(num_directions)
    # A sequence tells about z at each of its tokens.
    unit = noise_unit(likelihood, offset) / math.sqrt(num_tokens / counts.num_sequences)
    return Start(offset, directions, unit, unit, SCALE_OF_TOKENS * unit)


def _noise(likelihood: Any, offset: Tensor, mean: Tensor, categories: int) -> tuple[Tensor, Tensor]:
    """The standard deviation of each entry of a datum at the mean, and the square root of its Fisher information."""
    if categories:  # of an entry of a one-hot vector
        variance = mean * (1 - mean)
        return variance.flatten().double().sqrt(), variance.flatten().double().sqrt()
    information = likelihood.information_product(offset, torch.ones_like(offset))
    variance = likelihood(offset).variance
    for name, value in (("variance", variance), ("information", information)):
        if not (value.isfinite() & (value > 0)).all():
            raise ValueError(f"Expected likelihood with a finite {name} at the mean of x, got {value.flatten()}")
    return variance.flatten().double().sqrt(), information.flatten().double().sqrt()


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
    if num_categories:
        others = others.reshape(-1, num_categories, others.shape[-1])
        others = (others - others.mean(1, keepdim=True)).reshape(features, -1)
    # Twice, because what is left of a draw may be little.
    for _ in range(2):
        others = torch.linalg.qr(others - directions @ (directions.mT @ others)).Q
    return torch.cat([directions, others], dim=1)


@torch.no_grad()
def zero_last_layer(network: nn.Module) -> None:
    """Let a network return 0 at the start, if it is an MLPDecoder or a sequence of layers that ends with a linear one.

    What other networks return at their start is not known from outside, and is left as it is.
    """
    layers = getattr(network, "network", network)
    last = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) > 0 else None
    if isinstance(last, nn.Linear | nn.modules.conv._ConvNd):
        for parameter in last._parameters.values():
            if parameter is not None:
                parameter.zero_()
