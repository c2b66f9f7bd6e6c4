"""The posterior of a site for each datum, and its densities at other data's draws."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError, correlated, depends_on_draws, site_posterior
from pyro_ilvae.diagnostics._engine.sites import local_dim
from pyro_ilvae.distributions import innermost, without_event

_MOST_NUMBERS = 300_000  # in the pairs of a row and a posterior at a time: what a cache of a CPU holds
_MOST_NUMBERS_OF_GPU = 30_000_000  # which a GPU takes in the time that it needs to begin
# Of values in units of the smallest scale, by the precision of the result. The sums below are of squares of such
# numbers in double precision, so their errors are about 1e-8 and 1e-10 nats.
_FARTHEST = {torch.float64: 1e3}
_FARTHEST_OTHERWISE = 1e4
_MOST_VALUES = 256  # of a discrete site that are enumerated


class DataPosterior(NamedTuple):
    """The posteriors of a site for a batch of data, as one distribution.

    A row is a value of the site for one datum, of shape (*others, *event): the batch dimensions other than the
    dimension of the data, and the event.

    Attributes:
        fn: the distribution, with the data along one of its batch dimensions.
        dim: that dimension, from the right of the batch shape.
    """

    fn: Any
    dim: int

    def rows(self, values: Tensor) -> Tensor:
        """Values of shape (S, *batch, *event) as rows for each draw and datum: (S, N, *others, *event)."""
        return values.movedim(self.dim - self.fn.event_dim, 1)

    def at_each_datum(self, rows: Tensor) -> Tensor:
        """Rows (R, *others, *event) as a value of every datum: (R, *batch, *event)."""
        values = rows.unsqueeze(1).movedim(1, self.dim - self.fn.event_dim)
        return values.expand(len(rows), *self.fn.batch_shape, *self.fn.event_shape)

    def by_datum(self, log_prob: Tensor) -> Tensor:
        """Log densities of shape (S, *batch), summed to (S, N)."""
        log_prob = log_prob.movedim(self.dim, 1)
        return log_prob.sum(tuple(range(2, log_prob.dim()))) if log_prob.dim() > 2 else log_prob

    def log_prob(self, rows: Tensor) -> Tensor:
        """The log density of each row under each datum's posterior: (R, N)."""
        if self._has_products(rows):
            return self._products(rows)
        try:
            return self.by_datum(log_density_anywhere(self.fn, self.at_each_datum(rows)))
        except (NotImplementedError, KeyError) as error:  # KeyError: of transforms that only know their own draws
            raise UnavailableError(
                "Expected a guide with densities at draws of other data's posteriors, got a "
                f"{type(self.fn).__name__} that has none: {error}"
            ) from error

    def _has_products(self, rows: Tensor) -> bool:
        """Whether the posteriors are Normal, and products of matrices have their densities but for rounding."""
        base = without_event(self.fn)
        if type(base) not in (torch.distributions.Normal, dist.Normal) or 0 in (rows.numel(), base.loc.numel()):
            return False
        farthest = _FARTHEST.get(torch.promote_types(rows.dtype, base.loc.dtype), _FARTHEST_OTHERWISE)
        reach = torch.maximum(rows.detach().abs().max().double(), base.loc.detach().abs().max().double())
        smallest = base.scale.detach().min().double()
        numbers = base.loc.numel() // self.fn.batch_shape[self.dim]
        return bool((smallest > 1e-100) & (reach * numbers**0.5 < farthest * smallest))

    def _products(self, rows: Tensor) -> Tensor:
        r"""The log densities of all pairs of a row and a Normal posterior as two products of matrices.

        .. math:: \log q_n(z) = -\tfrac12 \sum_k z_k^2 / \sigma_{nk}^2 + \sum_k z_k \mu_{nk} / \sigma_{nk}^2 + c_n.
        """
        base = without_event(self.fn)
        first = self.dim - self.fn.event_dim
        loc, scale = (value.double().movedim(first, 0) for value in (base.loc, base.scale))
        loc, scale, values = (value.reshape(len(value), -1) for value in (loc, scale, rows.double()))
        precision = scale**-2
        constants = -(0.5 * loc.square() * precision + scale.log() + 0.5 * math.log(2 * math.pi)).sum(1)
        log_prob = torch.addmm(constants, values.square(), -0.5 * precision.T).addmm_(values, (loc * precision).T)
        return log_prob.to(torch.promote_types(rows.dtype, base.loc.dtype))

    def passes(self, rows: Tensor, rows_per_pass: int | None) -> Iterator[slice]:
        """Yield parts of the rows whose pairs with the posteriors fit in memory."""
        alone = self.fn.batch_shape[self.dim] if self._has_products(rows) else self.at_each_datum(rows[:1]).numel()
        most = _MOST_NUMBERS if rows.device.type == "cpu" else _MOST_NUMBERS_OF_GPU
        step = rows_per_pass or max(1, most // alone)
        for start in range(0, len(rows), step):
            yield slice(start, start + step)

    def all_values(self) -> Tensor | None:
        """Return all values of one datum as rows if they are few, and None otherwise."""
        base = without_event(self.fn)
        if not base.has_enumerate_support:
            return None
        try:
            single = base.enumerate_support(expand=False)
        except NotImplementedError:
            return None
        single = single.reshape(len(single), *base.event_shape)
        shape = self.rows(torch.empty(1, *self.fn.batch_shape, *self.fn.event_shape, device="meta")).shape[2:]
        number = math.prod(shape[: len(shape) - len(base.event_shape)])
        if number * math.log(len(single)) > math.log(_MOST_VALUES):
            return None
        choices = torch.cartesian_prod(*[torch.arange(len(single), device=single.device)] * number)
        return single[choices].reshape(-1, *shape)


def data_posterior(batch: Batch, name: str) -> DataPosterior:
    guide_site = batch.site(batch.guide_trace, name, "guide")
    model_site = batch.site(batch.model_trace, name, "model")
    dim = local_dim(batch, guide_site)
    if any(site["mask"] is not None and not torch.as_tensor(site["mask"]).all() for site in (guide_site, model_site)):
        raise UnavailableError(f"Expected site '{name}' to be the same variable for all data, got one with a mask")
    fn = site_posterior(batch, batch.guide_trace, batch.model_trace, name)
    if len(fn.batch_shape) < -dim or fn.batch_shape[dim] != batch.num_data:
        raise ValueError(
            f"Expected the guide to give site '{name}' a distribution for each of {batch.num_data} data, got batch "
            f"shape {tuple(fn.batch_shape)}; a guide with parameters for each datum takes all data at once"
        )
    if depends_on_draws(batch, name, fn):
        raise UnavailableError(
            f"Expected site '{name}' to have a density q({name} | x) of its own, got one that depends on the guide's "
            "draws of other sites"
        )
    inner = fn.batch_shape.numel() // batch.num_data
    if inner > 1 and correlated(batch, name):
        raise UnavailableError(
            f"Expected site '{name}' to have a density q({name} | x) of its own, got the marginals of {inner} "
            "correlated values in inner plates"
        )
    return DataPosterior(fn, dim)


def log_density_anywhere(fn: Any, values: Tensor) -> Tensor:
    """Return the log density, which is -inf outside of the support also where validation is off."""
    log_prob: Tensor = fn.log_prob(values)
    if innermost(fn).support is constraints.real:
        return log_prob
    return torch.where(_in_support(fn, values), log_prob, -math.inf)


def _in_support(fn: Any, values: Tensor) -> Tensor:
    if isinstance(fn, torch.distributions.Independent):
        return _in_support(fn.base_dist, values).flatten(-fn.reinterpreted_batch_ndims).all(-1)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        # Its attribute names the support of the transforms alone.
        for transform in reversed(fn.transforms):
            values = transform.inv(values)
        return _in_support(fn.base_dist, values)
    return fn.support.check(values)
