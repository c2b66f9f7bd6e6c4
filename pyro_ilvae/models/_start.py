"""Data as a decoder's start needs them, without what a context and known shifts explain of them."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae.decoders.start import LinearContext, WorkingData
from pyro_ilvae.models._given import Given

_ITERATIONS = 50  # at most; for a log link the first is exact
_CAUTION = 100  # the number of data that means at the end of their range are taken to come from


@torch.no_grad()
def working_data(batches: Iterator[Given], likelihood: Any, event_shape: torch.Size) -> Any:
    """The data of the batches themselves where nothing is beside them, or else all of them in one sample."""
    first = next(batches)
    if first.context is None and first.offset is None and first.mask is None:
        return (given.x for given in chain([first], batches))
    with evaluation_mode(likelihood):
        return _sample([first, *batches], likelihood, event_shape)


def _sample(batches: list[Given], likelihood: Any, event_shape: torch.Size) -> WorkingData:
    x, context, offset, mask = (_joined([part[i] for part in batches]) for i in (1, 2, 3, 4))
    assert x is not None
    if getattr(likelihood, "integer_data", False):
        x = F.one_hot(x.long(), event_shape[-1])
        mask = None if mask is None else mask.unsqueeze(-1)
    x = x.double()
    weight = torch.ones_like(x) if mask is None else mask.expand_as(x).double()
    center = shift = None
    if offset is not None:
        offset = offset.double().expand(-1, *event_shape)
        shift = _mean(offset, weight)
        center = shift + _base(x, weight, offset, likelihood)
        x = _at_center(x, offset - shift, center, likelihood)
    mean = _mean(x, weight)
    x = torch.where(weight > 0, x, mean)
    if context is None:
        return WorkingData(x, center, shift)
    columns = context.flatten(1).double()
    columns = columns - columns.mean(0)
    solve = torch.linalg.pinv(columns)  # of least squares
    explained = (columns @ (solve @ (x - mean).flatten(1))).reshape(x.shape)
    slopes = (solve @ _at_means(mean + explained, x, likelihood).flatten(1)).reshape(-1, *event_shape)
    return WorkingData(x - explained, center, shift, LinearContext(slopes, context.double().mean(0)))


def _joined(parts: list[Any]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """The mean of the entries that are there, 0 where none is."""
    return (weight * values).sum(0) / weight.sum(0).clamp(min=1)


def _base(x: Tensor, weight: Tensor, offset: Tensor, likelihood: Any) -> Tensor:
    """The b at which the means of data with natural parameters b + offset are those of ``x``."""
    interior = getattr(likelihood, "_interior_mean", None)
    mean = _mean(x, weight)
    at = likelihood.natural_parameters(mean if interior is None else interior(mean, len(x))).double()
    base = at - _mean(offset, weight)
    for _ in range(_ITERATIONS):
        found = _mean(_mean_of_data(likelihood, base + offset), weight)
        step = at - likelihood.natural_parameters(found).double()
        base = base + step
        if step.abs().max() < 1e-8:
            break
    return base


def _at_center(x: Tensor, offset: Tensor, center: Tensor, likelihood: Any) -> Tensor:
    """The data as they would be without an offset from the center, to first order."""
    residual = x - _mean_of_data(likelihood, center + offset)
    information = getattr(likelihood, "smallest_information", None)
    if information is not None and not getattr(likelihood, "integer_data", False):
        residual = residual * (information(center) / information(center + offset)).double()
    return _mean_of_data(likelihood, center) + residual


def _mean_of_data(likelihood: Any, eta: Tensor) -> Tensor:
    own = getattr(likelihood, "mean", None)
    mean: Tensor = likelihood(eta).mean if own is None else own(eta)
    return mean.double()


def _at_means(means: Tensor, x: Tensor, likelihood: Any) -> Tensor:
    """The natural parameters of means, moved inside of the range of the data and of the likelihood's means."""
    means = torch.minimum(torch.maximum(means, x.amin(0)), x.amax(0))
    interior = getattr(likelihood, "_interior_mean", None)
    eta: Tensor = likelihood.natural_parameters(means if interior is None else interior(means, _CAUTION))
    return eta.double()
