"""The mutual information of data and a latent site under a guide, and the aggregate posterior's divergence."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.aggregates import controlled, exact, log_sum, mean_and_error
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.batches import batches, data_arguments
from pyro_ilvae.diagnostics._engine.data_posteriors import DataPosterior, data_posterior, log_density_anywhere
from pyro_ilvae.diagnostics._engine.densities import marginal
from pyro_ilvae.diagnostics._engine.sites import only_site
from pyro_ilvae.diagnostics._engine.summaries import Call, OfSite

__all__ = ["MutualInformation", "mutual_information"]

_MOST_PAIRS = 10_000_000  # of a draw and a datum's posterior that a summary compares, in a few seconds


class MutualInformation(NamedTuple):
    """The mutual information, and the two divergences whose difference it is."""

    mutual_information: float  #: the mutual information I_q(x; z) in nats
    mutual_information_se: float  #: the Monte Carlo standard error of ``mutual_information`` in nats
    aggregate_kl: float  #: KL(q(z) || p(z)) of the aggregate posterior in nats; NaN without one prior for all data
    aggregate_kl_se: float  #: the Monte Carlo standard error of ``aggregate_kl`` in nats
    mean_kl: float  #: the mean of KL(q(z | x) || p(z)) over the data in nats; NaN without one prior for all data
    mean_kl_se: float  #: the Monte Carlo standard error of ``mean_kl`` in nats
    limit: float  #: the largest value in nats that ``mutual_information`` can take
    aggregate_size: int  #: the number M of posteriors that make up the aggregate posterior
    estimator: str  #: "exact", "sampled, analytic mean KL" or "sampled", and why there is no divergence

    def __repr__(self) -> str:
        parts = [
            f"{name} {printing.number(getattr(self, field), getattr(self, f'{field}_se'))}"
            for name, field in (("aggregate KL", "aggregate_kl"), ("mean KL", "mean_kl"))
        ]
        information = printing.number(self.mutual_information, self.mutual_information_se)
        return printing.described(
            self, f"{information} of at most {printing.number(self.limit)} nats", *parts, self.estimator
        )


def mutual_information(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    site: str | None = None,
    num_samples: int = 4,
    batch_size: int | None = None,
    aggregate_size: int | None = None,
    samples_per_pass: int | None = None,
    seed: int | None = None,
    plate: str | None = None,
) -> MutualInformation:
    r"""How much the latent site says about which datum it was inferred from, in nats.

    .. math:: I_q(x; z) = \frac{1}{N} \sum_n E_{q(z \mid x_n)} \log \frac{q(z \mid x_n)}{q(z)}
        = \frac{1}{N} \sum_n \mathrm{KL}(q(z \mid x_n) \,\|\, p(z)) - \mathrm{KL}(q(z) \,\|\, p(z)), \qquad
        q(z) = \frac{1}{N} \sum_m q(z \mid x_m).

    The mutual information of the empirical distribution of the data lies between 0 and :math:`\log N`. A value near
    the ``limit`` says that the posteriors hardly overlap, and that more data would give a larger value. The estimate is
    the mean of :math:`\log q(z \mid x_n) - \log q(z)` over draws from each datum's posterior. If PyTorch has a formula
    for the mean divergence, the error of its sampled form is known and serves as a control variate, with a slope in
    [0, 1]: slope 0 gives the mean above, and slope 1 gives the analytic divergence less the mean of
    :math:`\log q(z) - \log p(z)`. Without a formula all three numbers come from the same draws. A discrete site of at
    most 256 values is enumerated, and its results are exact.

    With ``aggregate_size`` M < N, each draw is compared with its own datum's posterior and the posteriors of M - 1
    other data from a random subsample, in place of all N. On average over subsamples S of M data this gives the mutual
    information :math:`I_M` of such a sample. It is an underestimate, and ``aggregate_kl`` an overestimate, by the same
    amount

    .. math:: I_q - I_M = E_S \mathrm{KL}(q_S(z) \,\|\, q(z)) \in [0, \log (N / M)], \qquad 0 \le I_M \le \log M.

    Without the datum's own posterior the estimate would be too large, by an amount that has no bound. The standard
    errors are due to the draws, for the data and the subsample at hand. With ``num_samples=1`` they include the
    spread over the data and are, if anything, too large.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        site: the name of a latent site in a plate over the data; if None, the only latent site that the guide samples.
            If the site is in further plates, all values of a datum count as one z.
        num_samples: the number of draws for each datum.
        batch_size: the number of data treated at a time; all at once if None.
        aggregate_size: the number M of posteriors that make up the aggregate posterior; all N if None.
        samples_per_pass: the number of draws compared with a batch of posteriors at a time, which bounds the memory
            and changes nothing else; if None, as many as make pairs of at most 300,000 numbers.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        The mutual information, ``aggregate_kl`` = KL(q(z) || p(z)) and ``mean_kl``, each with its standard error; the
        largest value ``limit`` that the mutual information can take, the log of M or of a smaller number of discrete
        values; ``aggregate_size``; and the estimator. If the prior differs between data or with other latent sites,
        there is no p(z) for all data: both divergences are NaN, and the estimator says why. Discrete sites that are
        summed out of the model are summed out of p(z) too.

    Raises:
        ValueError: if the site is not a latent site of model and guide or has no value for each datum, and if ``site``
            is None and there are several.
        UnavailableError: if the site has no density q(z | x) of its own: for a point estimate, a site whose posterior
            depends on draws of other sites, masks, and flows without an inverse.

    References:
        | Hoffman & Johnson 2016, ELBO surgery, http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
        | He et al. 2019, Lagging inference networks and posterior collapse, https://arxiv.org/abs/1901.05534

    Example:
        >>> import pyro
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 0.1))
        >>> result = mutual_information(model, guide, torch.tensor([-5.0, 0.0, 5.0]))
        >>> round(result.mutual_information, 4), round(result.limit, 4), result.estimator
        (1.0986, 1.0986, 'sampled, analytic mean KL')
    """
    _checks.positive_int("num_samples", num_samples)
    arguments = data_arguments(model, guide, model_args, model_kwargs, plate, batch_size)
    if aggregate_size is not None:
        arguments = arguments.in_order()  # The posteriors of a subsample are made in a second iteration.
    size = arguments.num_data
    components = size if aggregate_size is None else _checks.positive_int("aggregate_size", aggregate_size)
    if components > size:
        raise ValueError(f"Expected aggregate_size to be at most the number {size} of data, got {components}")
    if samples_per_pass is not None:
        _checks.positive_int("samples_per_pass", samples_per_pass)
    # Without validation, which would refuse a draw outside of the support of another datum's posterior: the density
    # of the draw under this posterior is 0.
    with (
        seeded(seed),
        torch.no_grad(),
        poutine.block(),
        evaluation_mode(model, guide),
        dist.validation_enabled(False),
    ):
        posteriors: list[DataPosterior] = []
        parts: list[_Draws] = []
        log_priors: list[Tensor] = []
        values: Tensor | None = None
        for batch in batches(model, guide, arguments, batch_size, plate):
            name, plate = only_site(batch, site), batch.data_plate
            posterior = data_posterior(batch, name)
            if not posteriors:
                values = posterior.all_values()
            posteriors.append(posterior)
            if values is None:
                parts.append(_draws(batch, posterior, name, num_samples))
            log_priors += _log_priors(batch, posterior, name, parts[0].rows[:4, 0] if values is None else values)
        log_prior = log_priors[0][:, :1]
        shared = all(torch.allclose(other, log_prior, rtol=1e-4, atol=1e-4, equal_nan=True) for other in log_priors)
        no_kl = "" if shared else f", no KL: the prior of '{name}' differs between data or with other sites"

        if values is not None:
            exact_information, exact_kl = exact(posteriors, values, log_prior[:, 0], samples_per_pass)
            exact_kl = exact_kl if shared else math.nan
            limit, mean_kl = math.log(min(size, len(values))), exact_information + exact_kl
            return MutualInformation(exact_information, 0.0, exact_kl, 0.0, mean_kl, 0.0, limit, size, f"exact{no_kl}")

        own = torch.arange(size)
        if components < size:
            chosen = torch.randperm(size)[:components]
            ordered, ranks = chosen.sort().values, chosen.argsort().argsort()
            # A datum outside of the subsample takes the place of one of the members.
            own = torch.full_like(own, int(ranks[0])).index_copy(0, chosen, ranks)
            subsample = arguments.select(ordered)
            posteriors = [data_posterior(batch, name) for batch in batches(model, guide, subsample, batch_size, plate)]
        log_q = torch.cat([part.log_q for part in parts], 1)
        log_total = log_sum(posteriors, torch.cat([part.rows for part in parts], 1), log_q, own, samples_per_pass)
    if not (log_q.isfinite().all() and log_total.isfinite().all()):
        raise ValueError(f"Expected the guide to give draws of site '{name}' a finite density, got NaN or infinity")
    limit = math.log(components)
    information = limit + log_q.double() - log_total.double()
    if not shared:
        mean, se = mean_and_error(information)
        nan = math.nan
        return MutualInformation(min(mean, limit), se, nan, nan, nan, nan, limit, components, f"sampled{no_kl}")
    log_p = torch.cat([part.log_p for part in parts], 1)
    if log_p.isnan().any():
        raise ValueError(f"Expected the model to give draws of site '{name}' a prior density, got NaN")
    kl = log_q.double() - log_p.double()
    analytic = [part.kl for part in parts if part.kl is not None]
    if analytic:
        sampled, kl = kl, torch.cat(analytic).double().expand_as(kl)
        information = controlled(information, sampled - kl)
    mean, se = mean_and_error(information)
    estimator = "sampled, analytic mean KL" if analytic else "sampled"
    return MutualInformation(
        min(mean, limit), se, *mean_and_error(kl - information), *mean_and_error(kl), limit, components, estimator
    )


class _Draws(NamedTuple):
    """Draws for each datum of a batch (S, N, ...), their log densities (S, N), and the divergences (N,) if known."""

    rows: Tensor
    log_q: Tensor
    log_p: Tensor
    kl: Tensor | None


def _draws(batch: Batch, posterior: DataPosterior, name: str, num_samples: int) -> _Draws:
    try:
        sample = posterior.fn.sample(torch.Size([num_samples]))
    except RuntimeError as error:  # PyTorch's own, for a scale that is NaN and that nothing has validated
        raise ValueError(f"Expected the guide to give site '{name}' a distribution, got {error}") from error
    log_q = posterior.by_datum(posterior.fn.log_prob(sample))
    log_p = _log_prior(batch, batch.model_trace, posterior, name, sample)
    return _Draws(posterior.rows(sample), log_q, log_p, _analytic_divergence(batch, posterior, name))


def _log_prior(batch: Batch, model_trace: Trace, posterior: DataPosterior, name: str, values: Tensor) -> Tensor:
    """The prior's log density of values (R, *batch, *event), as (R, N)."""
    if not batch.enumerated_sites:
        return posterior.by_datum(log_density_anywhere(model_trace.nodes[name]["fn"], values))
    log_priors = []
    for value in values:
        _, model_trace = batch.traces(1, conditioned={name: value})
        sites = [model_trace.nodes[latent] for latent in (name, *batch.enumerated_sites)]
        log_priors.append(marginal(batch.log_density(sites, 1)).expand(1, batch.num_data))
    return torch.cat(log_priors)


def _log_priors(batch: Batch, posterior: DataPosterior, name: str, rows: Tensor) -> list[Tensor]:
    """The prior's log density of each row for each datum, a second time if draws of other sites could change it."""
    traces = [batch.model_trace, *([batch.traces(1)[1]] if len(batch.latent_sites) > 1 else [])]
    return [_log_prior(batch, trace, posterior, name, posterior.at_each_datum(rows)) for trace in traces]


def _analytic_divergence(batch: Batch, posterior: DataPosterior, name: str) -> Tensor | None:
    """The divergence of each datum's posterior from the prior, of shape (N,), where there is a formula."""
    if batch.enumerated_sites:
        return None
    try:
        divergence = kl_divergence(posterior.fn, batch.site(batch.model_trace, name, "model")["fn"])
    except NotImplementedError:
        return None
    return posterior.by_datum(divergence.expand(posterior.fn.batch_shape).unsqueeze(0))[0]


def _columns(call: Call, site: str) -> dict[str, Any]:
    pairs = call.arguments.num_data**2
    num_samples = min(call.options["num_samples"], max(4, _MOST_PAIRS // pairs))
    result = call(mutual_information, site=site, num_samples=num_samples)
    _, _, reason = result.estimator.partition(", no KL: ")
    if reason:
        call.notes.append(f"aggregate_kl: {reason}")
    return {
        "mutual_information": result.mutual_information,
        "mutual_information_se": result.mutual_information_se,
        "aggregate_kl": result.aggregate_kl,
        "aggregate_kl_se": result.aggregate_kl_se,
        "mutual_information_limit": result.limit,
        "mutual_information_samples": float(num_samples),
    }


SUMMARY = OfSite(
    "mutual_information",
    _columns,
    missing=dict.fromkeys(
        (
            "mutual_information",
            "mutual_information_se",
            "aggregate_kl",
            "aggregate_kl_se",
            "mutual_information_limit",
            "mutual_information_samples",
        ),
        math.nan,
    ),
)
