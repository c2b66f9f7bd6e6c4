"""Data as a decoder's start needs them, without what a context and known shifts explain of them."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae.decoders.start import LinearContext, WorkingData, categories_of, interior_mean
from pyro_ilvae.likelihoods import mean_of_data
from pyro_ilvae.models._given import Given

_ITERATIONS = 50  # at most; for a log link the first is exact
_LARGEST = 1e15  # of numbers whose squares are still told apart in double precision
_CAUTION = 100  # the number of data that means at the end of their range are taken to come from


def working_data(batches: Iterator[Given], likelihood: Any, event_shape: torch.Size) -> Any:
    """The data of the batches themselves where nothing is beside them, or else all of them in one sample."""
    categories, _ = categories_of(likelihood, event_shape)
    first = next(batches)
    if first.context is None and first.offset is None and first.mask is None:
        return _data_alone(chain([first], batches))
    with evaluation_mode(likelihood):
        return _sample([first, *batches], likelihood, event_shape, categories)


def _data_alone(batches: Iterator[Given]) -> Iterator[Tensor]:
    for given in batches:
        for name in ("offset", "mask"):
            if getattr(given, name) is not None:
                raise ValueError(f"Expected {name} in each batch of x or in none, got one in a later batch alone")
        assert given.x is not None
        yield given.x


def _sample(batches: list[Given], likelihood: Any, event_shape: torch.Size, categories: int) -> WorkingData:
    x, context, offset, mask = (_joined(name, batches) for name in ("x", "context", "offset", "mask"))
    assert x is not None
    if categories:
        x = F.one_hot(x.long(), categories)
        mask = None if mask is None else mask.unsqueeze(-1)
    x = x.double()
    weight = torch.ones_like(x) if mask is None else mask.expand_as(x).double()
    if categories:  # of an entry that no datum has, all are alike
        unseen = weight.sum(0) == 0
        x, weight = torch.where(unseen, 1 / categories, x), torch.where(unseen, 1.0, weight)
    low, high = x.amin(0), x.amax(0)
    center = shift = None
    if offset is not None:
        offset = offset.double().expand(-1, *event_shape)
        shift = _mean(offset, weight)
        center = shift + _base(x, weight, offset, likelihood)
        x = _at_center(x, offset - shift, center, likelihood)
        _check_range(x, offset)
    mean = _mean(x, weight)
    x = torch.where(weight > 0, x, mean)
    if context is None:
        return WorkingData(x, center, shift)
    columns = context.flatten(1).double()
    columns = columns - columns.mean(0)
    solve = torch.linalg.pinv(columns)  # of least squares
    explained = (columns @ (solve @ (x - mean).flatten(1))).reshape(x.shape)
    slopes = (solve @ _at_means((mean + explained).clamp(low, high), likelihood, categories).flatten(1)).reshape(
        -1, *event_shape
    )
    return WorkingData(x - explained, center, shift, LinearContext(slopes, context.double().mean(0)))


def _joined(name: str, batches: list[Given]) -> Tensor | None:
    parts = [getattr(given, name) for given in batches]
    there = [part for part in parts if part is not None]
    if there and len(there) < len(parts):
        raise ValueError(f"Expected {name} in each batch of x or in none, got it in {len(there)} of {len(parts)}")
    return torch.cat(there) if there else None


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """The mean of the entries that are there, 0 where none is."""
    return (weight * values).sum(0) / weight.sum(0).clamp(min=1)


def _base(x: Tensor, weight: Tensor, offset: Tensor, likelihood: Any) -> Tensor:
    """The b at which the means of data with natural parameters b + offset are those of ``x``."""
    mean = interior_mean(likelihood, _mean(x, weight), len(x))
    at = likelihood.natural_parameters(mean).double()
    base = at - _mean(offset, weight)
    seen = weight.sum(0) > 0
    for _ in range(_ITERATIONS):
        found = torch.where(seen, _mean(mean_of_data(likelihood, base + offset).double(), weight), mean.double())
        _check_range(found, offset)
        step = at - likelihood.natural_parameters(found).double()
        base = base + step
        if step.abs().max() < 1e-8:
            break
    return base


def _at_center(x: Tensor, offset: Tensor, center: Tensor, likelihood: Any) -> Tensor:
    """The data as they would be without an offset from the center, to first order: for counts, counts over sizes."""
    mean, slope = _mean_and_slope(likelihood, center + offset)
    target, own_slope = _mean_and_slope(likelihood, center)
    # A mean at the end of its range does not move.
    tiny = torch.finfo(torch.float64).tiny
    return target + (x - mean) * torch.where(slope > tiny, own_slope / slope.clamp(min=tiny), 1.0)


def _mean_and_slope(likelihood: Any, eta: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of data, and the derivative of each entry by its own natural parameter."""
    with torch.enable_grad():
        eta = eta.detach().clone().requires_grad_()
        mean = mean_of_data(likelihood, eta).double()
        if getattr(likelihood, "integer_data", False):  # probabilities of categories, each of which follows all of eta
            slope = mean * (1 - mean)
        else:
            (slope,) = torch.autograd.grad(mean.sum(), eta)
    return mean.detach(), slope.detach()


def _at_means(means: Tensor, likelihood: Any, categories: int) -> Tensor:
    """The natural parameters of means, moved inside of the range of the likelihood's means."""
    if categories:
        means = means / means.sum(-1, keepdim=True)
    eta: Tensor = likelihood.natural_parameters(interior_mean(likelihood, means, _CAUTION))
    return eta.double()


def _check_range(x: Tensor, offset: Tensor) -> None:
    """Raise for offsets at which means or data over sizes are no numbers to compute with."""
    if not x.isfinite().all() or x.abs().max() > _LARGEST:
        raise ValueError(
            "Expected offset on the scale of natural parameters, such as the log of a size, at which data can start a "
            f"decoder, got values from {float(offset.min()):.4g} to {float(offset.max()):.4g}"
        )
