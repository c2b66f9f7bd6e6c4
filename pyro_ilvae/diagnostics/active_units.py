"""Active units: the latent dimensions whose posterior mean moves with the data."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.arrays import check_finite
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.batches import data_batches
from pyro_ilvae.diagnostics._engine.moments import Moments
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError, site_posterior
from pyro_ilvae.diagnostics._engine.sites import dims_of_unit, local_dim, only_site
from pyro_ilvae.diagnostics._engine.summaries import Call, OfSite
from pyro_ilvae.distributions import innermost

__all__ = ["ActiveUnits", "active_units"]


class ActiveUnits(NamedTuple):
    """Variances over the data of the posterior means, and which of them lie above a threshold."""

    #: the variances in squared units of z, of the shape of the site's units, (\*other plates, \*event shape)
    variances: Tensor
    threshold: float  #: the variance above which a unit is active, in squared units of z
    active: Tensor  #: which units are active, booleans of the shape of ``variances``
    standard_errors: Tensor  #: the standard errors of the variances over the data; NaN for two data

    @property
    def num_active(self) -> int:
        """The number of active units."""
        return int(self.active.sum())

    def __repr__(self) -> str:
        return printing.described(
            self,
            f"{self.num_active} of {self.active.numel()} units active",
            f"mean variance {printing.number(self.variances.mean(), self.standard_errors.mean())}",
            f"threshold {printing.number(self.threshold)}",
        )


def active_units(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    site: str | None = None,
    threshold: float = 0.01,
    batch_size: int | None = None,
    num_samples: int = 100,
    seed: int | None = None,
    plate: str | None = None,
) -> ActiveUnits:
    r"""The latent dimensions whose posterior mean moves with the data.

    .. math:: A_j = \operatorname{Var}_x(E_{q(z_j \mid x)}[z_j]), \qquad \text{active if } A_j > \text{threshold}.

    The variance over all data is the unbiased one, computed in two passes. A mean that has no formula, or that depends
    on other latent sites, is estimated by draws. The sampling adds to the variance; this part is estimated and
    subtracted. A vector or matrix whose entries are one variable, such as a one-hot vector, a point of the simplex or a
    covariance, is one unit, whose variance is the sum over its entries. The measure has the units of z: a threshold of
    0.01 is meant for a prior of scale 1, and a prior whose mean differs between data makes a posterior move that is
    equal to it.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        site: the name of a latent site in a plate over the data; if None, the only latent site that the guide samples.
        threshold: the variance above which a unit counts as active, in squared units of z.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws where the mean has no formula.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        The variances in squared units of z, the threshold, the active units, and the standard errors of the variances
        over the data. Tensors have the shape of the site's other plates and event, without dimensions within a unit.

    Raises:
        ValueError: for fewer than two data, a negative threshold, a site that is not latent or has no value for each
            datum, and if ``site`` is None and there are several.
        UnavailableError: if the site is a point in the guide, or has categories and therefore no mean.

    References:
        Burda, Grosse & Salakhutdinov 2016, Importance weighted autoencoders, https://arxiv.org/abs/1509.00519

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x * torch.tensor([1.0, 0.0]), 1.0).to_event(1))
        >>> units = active_units(model, guide, torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
        >>> units.variances.tolist(), units.active.tolist()
        ([2.0, 0.0], [True, False])
    """
    _checks.positive_int("num_samples", num_samples)
    _checks.non_negative("threshold", threshold)
    with seeded(seed), torch.no_grad():
        means, errors, withins = zip(
            *(
                _posterior_means(batch, only_site(batch, site), num_samples)
                for batch in data_batches(model, guide, model_args, model_kwargs, batch_size, plate)
            ),
            strict=True,
        )
    mean, error = torch.cat(means), torch.cat(errors)
    if mean.isnan().any():
        return _variances_of_masked(mean, error, threshold, withins[0])
    # The error of a single draw is unknown.
    return variances_over_data(mean, threshold, error.square().mean(0).nan_to_num(), withins[0])


def _posterior_means(batch: Batch, name: str, num_samples: int) -> tuple[Tensor, Tensor, int]:
    """Posterior means of shape (N, *other plates, *event), their Monte Carlo errors, the dimensions within a unit."""
    local_dim(batch, batch.site(batch.guide_trace, name, "guide"))
    within = dims_of_unit(batch.site(batch.model_trace, name, "model"))
    if len(batch.latent_sites) == 1:
        means, has_formula = _means(batch, name, (batch.guide_trace, batch.model_trace))
        if has_formula:
            return means[0], torch.zeros_like(means[0]), within
    moments = Moments()
    for count in batch.passes(num_samples):
        means, _ = _means(batch, name, batch.traces(count))
        moments.add(means.expand(count, *means.shape[1:]))
    mean, _, error = moments.mean_and_error("sampled")
    return mean, error, within


def _means(batch: Batch, name: str, traces: tuple[Trace, Trace]) -> tuple[Tensor, bool]:
    """Means given each draw of the other sites, or draws where there is no formula for the mean."""
    guide_trace, model_trace = traces
    site = batch.site(guide_trace, name, "guide")
    fn = site_posterior(batch, guide_trace, model_trace, name)
    if isinstance(innermost(fn), dist.Categorical):
        raise UnavailableError(f"Expected site '{name}' to have a mean, got categories")
    try:
        value, has_formula = fn.mean, True
    except NotImplementedError:
        value, has_formula = site["value"], False
    check_finite(f"posterior means of site '{name}'", value)
    value = value.detach()  # because a mean can be a parameter itself
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"], device=value.device)
        value = torch.where(mask.reshape(mask.shape + (1,) * fn.event_dim), value, math.nan)
    return batch.data_first(value, site, fn.event_dim), has_formula


def _variances_of_masked(means: Tensor, errors: Tensor, threshold: float, within: int) -> ActiveUnits:
    """The active units of means that are NaN for masked data, each unit over its own data."""
    units = means.shape[1 : means.dim() - within]
    means, errors = (values.reshape(len(values), units.numel(), -1).unbind(1) for values in (means, errors))  # type: ignore[assignment]
    parts = []
    for mean, error in zip(means, errors, strict=True):
        kept = ~mean.isnan().any(-1)
        if kept.sum() < 2:
            raise UnavailableError("Expected at least two data that are not masked for a variance over data, got fewer")
        parts.append(variances_over_data(mean[kept], threshold, error[kept].square().mean(0).nan_to_num(), within=1))
    variances = torch.stack([part.variances for part in parts]).reshape(units)
    spreads = torch.stack([part.standard_errors for part in parts]).reshape(units)
    return ActiveUnits(variances, float(threshold), variances > threshold, spreads)


def variances_over_data(
    means: Tensor, threshold: float, sampling: Tensor | float = 0.0, within: int = 0
) -> ActiveUnits:
    """The active units of means of shape (N, *units), whose sampling adds ``sampling`` to the variances.

    The entries along the last ``within`` dimensions belong to one unit, and their variances are added up.
    """
    _checks.non_negative("threshold", threshold)
    if len(means) < 2:
        raise ValueError(f"Expected at least two data for a variance over data, got {len(means)}")
    squares = (means - means.mean(0)).square()
    if within:
        together = tuple(range(-within, 0))
        squares = squares.sum(together)
        sampling = sampling.sum(together) if isinstance(sampling, Tensor) else sampling
    variances = squares.sum(0) / (len(means) - 1)
    # Two data are always equally far from their mean, so that their squares say nothing about the error.
    errors = squares.std(0) / len(means) ** 0.5 if len(means) > 2 else torch.full_like(variances, float("nan"))
    variances = variances - sampling
    return ActiveUnits(variances, float(threshold), variances > threshold, errors)


def _columns(call: Call, site: str) -> dict[str, Any]:
    units = call(active_units, site=site, threshold=call.limits["threshold"])
    return {
        "mean_variance": units.variances,
        "mean_variance_se": units.standard_errors,
        "active_units": float(units.num_active),
    }


SUMMARY = OfSite(
    "active_units",
    _columns,
    units=("mean_variance", "mean_variance_se"),
    missing={"active_units": float("nan")},
)
