"""The mutual information of data and latent site under a guide, and the divergence of the aggregate posterior."""

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
from pyro_ilvae._programs import Arguments, ModelArgs, Program
from pyro_ilvae.diagnostics._engine.batches import Batch, batches
from pyro_ilvae.diagnostics._engine.data_posteriors import DataPosterior, data_posterior, log_density_anywhere
from pyro_ilvae.diagnostics._engine.densities import marginal


class MutualInformation(NamedTuple):
    """Mutual information, its two parts in nats with Monte Carlo standard errors, and how they were obtained."""

    mutual_information: float
    mutual_information_se: float
    aggregate_kl: float
    aggregate_kl_se: float
    mean_kl: float
    mean_kl_se: float
    limit: float
    aggregate_size: int
    estimator: str


def mutual_information(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    site: str = "z",
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

    It is that of the empirical distribution of the data, so it lies between 0 and :math:`\log N`: a value near the
    ``limit`` says that the posteriors hardly overlap, and that more data would give a larger one. The estimate is the
    mean of :math:`\log q(z \mid x_n) - \log q(z)` over draws from each datum's posterior. Where PyTorch has a formula
    for the mean divergence, its sampled form, whose error is then known, serves as a control variate (with a slope in
    [0, 1], where 0 is this mean and 1 the analytic divergence less the mean of :math:`\log q(z) - \log p(z)`);
    otherwise all three come from the same draws. A discrete site of at most 256 values is enumerated: the results are
    exact.

    With ``aggregate_size`` M < N, each draw is compared with its own datum's posterior and those of M - 1 others of a
    random subsample, in place of all N. On average over subsamples S of M data this gives the mutual information of
    such a sample: an underestimate, and ``aggregate_kl`` an overestimate, by the same

    .. math:: I_q - I_M = E_S \mathrm{KL}(q_S(z) \,\|\, q(z)) \in [0, \log (N / M)], \qquad 0 \le I_M \le \log M.

    Without the datum's own posterior the estimate would be too large, and without bound. The standard errors are those
    of the draws, for the data and the subsample at hand; with ``num_samples=1`` they include the spread over the data
    and are too large if anything.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple, or a single tensor. Tensors whose first dimension is
            the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        site: the name of a latent site in a plate over the data, with the same prior for all of them; in further
            plates, all of its values for a datum count as one z.
        num_samples: the number of draws for each datum.
        batch_size: the number of data treated at a time; all at once if None.
        aggregate_size: the number M of posteriors that make up the aggregate posterior; all N if None.
        samples_per_pass: the number of draws compared with a batch of posteriors at a time, which bounds the memory
            and changes nothing else; if None, as many as make pairs of at most 300,000 numbers.
        seed: a seed for the draws and the subsample; the global random state if None.
        plate: the name of the plate over the data, where several are as long as a batch.

    Returns:
        The mutual information, ``aggregate_kl`` = KL(q(z) || p(z)) and ``mean_kl``, each with its standard error; the
        largest value ``limit`` that the first can take, the log of M or of a smaller number of discrete values;
        ``aggregate_size``; and the estimator. Where there is no p(z) for all data, because the prior differs between
        data or with other latent sites, both divergences are NaN and the estimator says why. Discrete sites that are
        summed out of the model are summed out of p(z) too.

    Raises:
        ValueError: if the site is not a latent site of both or not local to the data; also (as its subclass
            ``UnavailableError``) if it has no density q(z | x) of its own: for a point estimate, a site whose posterior
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
    arguments = Arguments.of(model_args, model_kwargs)
    size = arguments.num_data
    components = size if aggregate_size is None else _checks.positive_int("aggregate_size", aggregate_size)
    if components > size:
        raise ValueError(f"Expected aggregate_size to be at most the number {size} of data, got {components}")
    if samples_per_pass is not None:
        _checks.positive_int("samples_per_pass", samples_per_pass)
    # Validation would refuse a draw outside of the support of another datum's posterior, whose density there is 0.
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
            posterior = data_posterior(batch, site)
            if not posteriors:
                values = posterior.all_values()
            posteriors.append(posterior)
            if values is None:
                parts.append(_draws(batch, posterior, site, num_samples))
            log_priors += _log_priors(batch, posterior, site, parts[0].rows[:4, 0] if values is None else values)
        log_prior = log_priors[0][:, :1]
        shared = all(torch.allclose(other, log_prior, rtol=1e-4, atol=1e-4, equal_nan=True) for other in log_priors)
        no_kl = "" if shared else f", no KL: the prior of '{site}' differs between data or with other sites"

        if values is not None:
            exact, exact_kl = _exact(posteriors, values, log_prior[:, 0], samples_per_pass)
            exact_kl = exact_kl if shared else math.nan
            limit = math.log(min(size, len(values)))
            return MutualInformation(exact, 0.0, exact_kl, 0.0, exact + exact_kl, 0.0, limit, size, f"exact{no_kl}")

        own = torch.arange(size)
        if components < size:
            chosen = torch.randperm(size)[:components]
            # A datum outside of the subsample takes the place of its first member.
            own = torch.zeros_like(own).index_copy(0, chosen, torch.arange(components))
            subsample = arguments.select(chosen)
            posteriors = [data_posterior(batch, site) for batch in batches(model, guide, subsample, batch_size, plate)]
        log_q = torch.cat([part.log_q for part in parts], 1)
        log_sum = _log_sum(posteriors, torch.cat([part.rows for part in parts], 1), log_q, own, samples_per_pass)
    if not (log_q.isfinite().all() and log_sum.isfinite().all()):
        raise ValueError(f"Expected the guide to give draws of site '{site}' a finite density, got NaN or infinity")
    limit = math.log(components)
    information = limit + log_q.double() - log_sum.double()
    if not shared:
        mean, se = _mean(information)
        nan = math.nan
        return MutualInformation(min(mean, limit), se, nan, nan, nan, nan, limit, components, f"sampled{no_kl}")
    log_p = torch.cat([part.log_p for part in parts], 1)
    if log_p.isnan().any():
        raise ValueError(f"Expected the model to give draws of site '{site}' a prior density, got NaN")
    kl = log_q.double() - log_p.double()
    analytic = [part.kl for part in parts if part.kl is not None]
    if analytic:
        sampled, kl = kl, torch.cat(analytic).double().expand_as(kl)
        information = _controlled(information, sampled - kl)
    mean, se = _mean(information)
    estimator = "sampled, analytic mean KL" if analytic else "sampled"
    return MutualInformation(min(mean, limit), se, *_mean(kl - information), *_mean(kl), limit, components, estimator)


class _Draws(NamedTuple):
    """Draws for each datum of a batch (S, N, ...), their log densities (S, N), and the divergences (N,) if known."""

    rows: Tensor
    log_q: Tensor
    log_p: Tensor
    kl: Tensor | None


def _draws(batch: Batch, posterior: DataPosterior, name: str, num_samples: int) -> _Draws:
    sample = posterior.fn.sample(torch.Size([num_samples]))
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
    """The prior's log density of each row for each datum, once more where draws of other sites could change it."""
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


def _exact(
    posteriors: list[DataPosterior], values: Tensor, log_prior: Tensor, values_per_pass: int | None
) -> tuple[float, float]:
    """The mutual information as the gain in entropy, and the divergence of the aggregate posterior from the prior."""
    total = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    entropy, size = 0.0, 0
    for posterior in posteriors:
        passes = posterior.passes(values, values_per_pass)
        probs = torch.cat([posterior.log_prob(values[part]) for part in passes]).double().exp()
        total += probs.sum(1)
        entropy += float(torch.special.entr(probs).sum())
        size += probs.shape[1]
    aggregate = total / size
    information = max(0.0, float(torch.special.entr(aggregate).sum()) - entropy / size)
    terms = aggregate * (aggregate.log() - log_prior.double())
    return information, float(torch.where(aggregate > 0, terms, 0.0).sum())


def _log_sum(
    posteriors: list[DataPosterior], draws: Tensor, log_own: Tensor, own: Tensor, draws_per_pass: int | None
) -> Tensor:
    """The log of the summed densities of each draw, with ``log_own`` in place of the posterior of index ``own``."""
    rows, own = draws.flatten(0, 1), own.to(draws.device).repeat(len(draws))
    log_others = torch.full_like(log_own, -math.inf).flatten()
    start = 0
    for posterior in posteriors:
        for part in posterior.passes(rows, draws_per_pass):
            log_pairs = posterior.log_prob(rows[part])
            index = torch.arange(start, start + log_pairs.shape[1], device=own.device)
            log_pairs = log_pairs.masked_fill(index == own[part, None], -math.inf)
            log_others[part] = torch.logaddexp(log_others[part], log_pairs.logsumexp(1))
        start += log_pairs.shape[1]
    return torch.logaddexp(log_own, log_others.reshape(log_own.shape))


def _controlled(values: Tensor, errors: Tensor) -> Tensor:
    """Values of shape (S, N) without what errors, whose means are known to be 0, explain of their noise."""
    if not errors.isfinite().all():
        return values
    controlled, over = values.clone(), 0 if len(values) > 1 else 1
    halves = slice(0, None, 2), slice(1, None, 2)
    # The slope comes from the other half of the data, or it would be correlated with the errors and bring a bias.
    for half, other in (halves, halves[::-1]):
        noise, error = (x[:, other] - x[:, other].mean(over, keepdim=True) for x in (values, errors))
        slope = (noise * error).sum() / error.square().sum().clamp(min=torch.finfo(error.dtype).tiny)
        controlled[:, half] -= slope.clamp(0, 1) * errors[:, half]
    return controlled


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean of values of shape (S, N) and its standard error."""
    if values.numel() == 1:
        return float(values), math.nan
    spread = values.var(0).mean() if len(values) > 1 else values.var()
    return float(values.mean()), math.sqrt(spread / values.numel())
