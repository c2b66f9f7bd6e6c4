"""Where a decoder starts: natural parameters of the mean of data, their directions, and the likelihood's noise unit."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_ilvae.decoders.brenier import INITIAL_SCALE
from pyro_ilvae.decoders.frames import Frame, OrthonormalFrame
from pyro_ilvae.decoders.nats import noise_unit
from pyro_ilvae.decoders.principal import Moments, TokenCounts, batches_of
from pyro_ilvae.likelihoods import Categorical, check_support

__all__ = ["Start", "start_from_data"]


class Start(NamedTuple):
    """What a decoder takes from data."""

    offset: Tensor  #: the natural parameters b of the mean of the data, of shape (D,)
    directions: Tensor | None  #: the leading directions of the data, of shape (D, K) or fewer; None to keep the frame
    unit: float  #: the noise unit u of the likelihood at b, in the directions of the frame
    spread: float  #: how far z is to move the natural parameters at most: the data's root mean square in the frame


@torch.no_grad()
def start_from_data(
    x: Any, likelihood: Any, event_shape: torch.Size, num_directions: int, frame: Frame | None = None
) -> Start:
    """The start for a sample or its batches, with a ``frame`` that stays, or else with the directions of the data.

    Data may vary in fewer directions than ``num_directions``.
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
    offset = likelihood.natural_parameters(average if interior is None else interior(average, moments.total))
    directions = None
    if frame is None:
        directions = moments.directions(num_directions)
        frame = OrthonormalFrame(directions).to(offset)
    if frame.latent_dim == 0:  # all data are equal
        return Start(offset.flatten(), directions, 1.0, 1.0)
    noise = normal_scale(likelihood)
    unit = noise_unit(likelihood, offset, frame) if noise is None else noise
    # One step of scoring: the natural parameters of a datum differ from b by about I(b)^-1 times its score.
    columns = frame.embed(torch.eye(frame.latent_dim).to(offset)).mT.double()
    spread = math.sqrt(float(moments.variances(columns).mean()))
    return Start(offset.flatten(), directions, unit, spread * unit * unit if noise is None else spread)


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
    if directions.shape[1] == 0:
        return Start(offset, directions, 1.0, 1.0)
    # A sequence tells about z at each of its tokens.
    length = num_tokens / counts.num_sequences
    unit = noise_unit(likelihood, offset, OrthonormalFrame(directions)) / math.sqrt(length)
    # A token's history says most of what z could, so z starts with little: names are fitted best from 0.1 to 0.3 logits.
    return Start(offset, directions, unit, min(unit, INITIAL_SCALE))


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
