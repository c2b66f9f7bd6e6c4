"""The mutual information of data and latent site under a guide, and the divergence of the aggregate posterior."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from pyro_ilvae import _checks
from pyro_ilvae._modes import evaluation_mode
from pyro_ilvae._random import seeded
from pyro_ilvae.diagnostics._batches import Batch, Data, Stochastic, batches, data_batches
from pyro_ilvae.diagnostics._densities import marginal
from pyro_ilvae.diagnostics._posteriors import UnavailableError, correlated, depends_on_draws, site_posterior
from pyro_ilvae.distributions import innermost, without_event

_MOST_NUMBERS = 300_000  # in the pairs of a draw and a posterior at a time: what a cache holds
_MOST_VALUES = 256  # of a discrete site that are enumerated


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
    model: Stochastic,
    guide: Stochastic,
    data: Data,
    *,
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
        model: the model, called with the data.
        guide: its guide.
        data: a tensor, or a tuple of tensors that are the arguments of model and guide, with data along dimension 0.
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
    size = sum(len(args[0]) for args in data_batches(data, batch_size))
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
        posteriors: list[_Posterior] = []
        parts: list[_Draws] = []
        log_priors: list[Tensor] = []
        values: Tensor | None = None
        for batch in batches(model, guide, data, batch_size, plate):
            posterior = _posterior(batch, site)
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
            subsample = tuple(x[chosen.to(x.device)] for x in (data if isinstance(data, tuple) else (data,)))
            posteriors = [_posterior(batch, site) for batch in batches(model, guide, subsample, batch_size, plate)]
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


class _Posterior(NamedTuple):
    """A batch's posteriors of the site, and the dimension of the data in their batch shape, from the right.

    Rows are values with the batch shape's other dimensions, which belong to one datum, and the event behind.
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
        return log_prob.reshape(*log_prob.shape[:2], -1).sum(-1)

    def log_prob(self, rows: Tensor) -> Tensor:
        """The log density of each row under each datum's posterior: (R, N)."""
        try:
            return self.by_datum(_log_density(self.fn, self.at_each_datum(rows)))
        except (NotImplementedError, KeyError) as error:  # the latter from transforms that only know their own draws
            raise UnavailableError(
                "Expected a guide with densities at draws of other data's posteriors, got a "
                f"{type(self.fn).__name__} that has none: {error}"
            ) from error

    def passes(self, rows: Tensor, rows_per_pass: int | None) -> Iterator[slice]:
        """Parts of the rows whose pairs with the posteriors fit in the memory."""
        step = rows_per_pass or max(1, _MOST_NUMBERS // self.at_each_datum(rows[:1]).numel())
        for start in range(0, len(rows), step):
            yield slice(start, start + step)

    def all_values(self) -> Tensor | None:
        """All values of a datum as rows, if there are few."""
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


def _posterior(batch: Batch, name: str) -> _Posterior:
    guide_site = batch.site(batch.guide_trace, name, "guide")
    model_site = batch.site(batch.model_trace, name, "model")
    dim = batch.data_dim(guide_site)
    if dim is None:
        raise ValueError(f"Expected site '{name}' in a plate over the {batch.num_data} data, got a global site")
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
    return _Posterior(fn, dim)


def _draws(batch: Batch, posterior: _Posterior, name: str, num_samples: int) -> _Draws:
    sample = posterior.fn.sample(torch.Size([num_samples]))
    log_q = posterior.by_datum(posterior.fn.log_prob(sample))
    log_p = _log_prior(batch, batch.model_trace, posterior, name, sample)
    return _Draws(posterior.rows(sample), log_q, log_p, _analytic_divergence(batch, posterior, name))


def _log_prior(batch: Batch, model_trace: Trace, posterior: _Posterior, name: str, values: Tensor) -> Tensor:
    """The prior's log density of values (R, *batch, *event), as (R, N)."""
    if not batch.enumerated_sites:
        return posterior.by_datum(_log_density(model_trace.nodes[name]["fn"], values))
    log_priors = []
    for value in values:
        _, model_trace = batch.traces(1, conditioned={name: value})
        sites = [model_trace.nodes[latent] for latent in (name, *batch.enumerated_sites)]
        log_priors.append(marginal(batch.log_density(sites, 1)).expand(1, batch.num_data))
    return torch.cat(log_priors)


def _log_priors(batch: Batch, posterior: _Posterior, name: str, rows: Tensor) -> list[Tensor]:
    """The prior's log density of each row for each datum, once more where draws of other sites could change it."""
    traces = [batch.model_trace, *([batch.traces(1)[1]] if len(batch.latent_sites) > 1 else [])]
    return [_log_prior(batch, trace, posterior, name, posterior.at_each_datum(rows)) for trace in traces]


def _log_density(fn: Any, values: Tensor) -> Tensor:
    """The log density, also outside of the support, for validation that is off."""
    log_prob: Tensor = fn.log_prob(values)
    if innermost(fn).support is constraints.real:
        return log_prob
    return torch.where(_in_support(fn, values), log_prob, -math.inf)


def _in_support(fn: Any, values: Tensor) -> Tensor:
    if isinstance(fn, torch.distributions.Independent):
        return _in_support(fn.base_dist, values).flatten(-fn.reinterpreted_batch_ndims).all(-1)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        # The support that it names itself is that of the transforms alone.
        for transform in reversed(fn.transforms):
            values = transform.inv(values)
        return _in_support(fn.base_dist, values)
    return fn.support.check(values)


def _analytic_divergence(batch: Batch, posterior: _Posterior, name: str) -> Tensor | None:
    """The divergence of each datum's posterior from the prior, of shape (N,), where there is a formula."""
    if batch.enumerated_sites:
        return None
    try:
        divergence = kl_divergence(posterior.fn, batch.site(batch.model_trace, name, "model")["fn"])
    except NotImplementedError:
        return None
    return posterior.by_datum(divergence.expand(posterior.fn.batch_shape).unsqueeze(0))[0]


def _exact(
    posteriors: list[_Posterior], values: Tensor, log_prior: Tensor, values_per_pass: int | None
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
    posteriors: list[_Posterior], draws: Tensor, log_own: Tensor, own: Tensor, draws_per_pass: int | None
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
