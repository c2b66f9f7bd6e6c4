"""The relative Fisher divergence of a posterior from the prior: that of the guide, and the true one by its draws."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal

from pyro_ilvae import _checks
from pyro_ilvae._random import seeded
from pyro_ilvae.diagnostics._batches import Batch, Data, Stochastic, batches, sample_sites
from pyro_ilvae.diagnostics._densities import check_numbers, log_density, shared_sites
from pyro_ilvae.diagnostics._importance import Weights, smoothed_weights, weighted_mean
from pyro_ilvae.diagnostics._moments import Moments
from pyro_ilvae.diagnostics._posteriors import UnavailableError, correlated, site_posterior
from pyro_ilvae.diagnostics._scores import (
    check_differentiable,
    differentiable_sites,
    passes,
    placeholders,
    squared_gradients,
)
from pyro_ilvae.distributions import innermost, without_event


class GuideFisherDivergence(NamedTuple):
    """Relative Fisher divergences of shape (N,), the estimator, Monte Carlo errors, and the parts by coordinate."""

    values: Tensor
    estimator: str
    standard_errors: Tensor
    per_dimension: Tensor
    per_dimension_standard_errors: Tensor


class PosteriorFisherDivergence(NamedTuple):
    """Relative Fisher divergences, their Monte Carlo errors, effective sample sizes and Pareto k-hat, each (N,)."""

    values: Tensor
    standard_errors: Tensor
    effective_sample_sizes: Tensor
    pareto_k: Tensor


def guide_fisher_divergence(
    model: Stochastic,
    guide: Stochastic,
    data: Data,
    *,
    site: str = "z",
    batch_size: int | None = None,
    num_samples: int = 100,
    seed: int | None = None,
    plate: str | None = None,
) -> GuideFisherDivergence:
    r"""The relative Fisher divergence from a site's posterior in the guide to its prior, for each datum.

    .. math:: F(q \,\|\, p) = E_{q(z \mid x)} \|\nabla_z \log q(z \mid x) - \nabla_z \log p(z)\|^2
        = \sum_j E_{q(z \mid x)} (\partial_j \log q(z \mid x) - \partial_j \log p(z))^2.

    Its unit is one over that of z squared; it knows no nats and, unlike the KL divergence, changes when z is rescaled.
    Analytic for two Normals, :math:`(\mu - m)^2 / t^4 + (s / t^2 - 1 / s)^2` for each coordinate of
    :math:`N(\mu, s^2)` and :math:`N(m, t^2)`, and for multivariate ones; otherwise the mean over draws of the guide.
    With other latent sites it is the mean, over the guide's draws of those before it, of the divergence given them;
    discrete ones that the guide does not sample are summed out of the prior.

    Args:
        model: the model, called with the data.
        guide: its guide.
        data: a tensor, or a tuple of tensors that are the arguments of model and guide, with data along dimension 0.
        site: the name of a continuous latent site.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws where there is no formula, or where there are other latent sites.
        seed: a seed for the draws, which then leave the global random state as it was.
        plate: the name of the plate over the data; if None, the one plate of their number.

    Returns:
        The divergences, of shape (N,); the estimator, "analytic" or "sampled"; their Monte Carlo standard errors, 0
        where nothing was drawn and NaN for one draw; the coordinates' parts of the sum, of shape (N, \*other plates,
        \*event shape), and their standard errors. A global site has N = 1.

    Raises:
        ValueError: if the site is not a latent site of both, for a batch size with a global site, or for densities
            that are not numbers.
        UnavailableError: if the site is discrete, has a support without interior such as the simplex, is a point in
            the guide, if the guide's density has no formula or joins correlated sites, or if the prior sums over a
            discrete site and depends on another.

    References:
        Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder network,
        https://arxiv.org/abs/2304.12770

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x * torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0])).to_event(1))
        >>> divergence = guide_fisher_divergence(model, guide, torch.full((1, 2), 3.0))
        >>> divergence.values, divergence.per_dimension  # 3^2 + (0.5 - 1 / 0.5)^2, and a collapsed dimension
        (tensor([11.2500]), tensor([[11.2500,  0.0000]]))
    """
    _checks.positive_int("num_samples", num_samples)
    parts, estimators = [], set()
    with seeded(seed), torch.no_grad():
        for batch in batches(model, guide, data, batch_size, plate):
            if batch_size is not None and not batch.is_local(batch.site(batch.guide_trace, site, "guide")):
                raise ValueError(f"Expected batch_size=None for site '{site}', which all data share, got {batch_size}")
            *part, estimator = _expected_squares(batch, site, num_samples)
            parts.append(part)
            estimators.add(estimator)
    values, errors, per_dimension, dimension_errors = (torch.cat(part) for part in zip(*parts, strict=True))
    if values.isnan().any():
        raise ValueError(
            f"Expected densities of site '{site}' that are numbers, got NaN for {values.isnan().sum()} data"
        )
    estimator = "sampled" if "sampled" in estimators else "analytic"
    return GuideFisherDivergence(values, estimator, errors, per_dimension, dimension_errors)


def posterior_fisher_divergence(
    model: Stochastic,
    guide: Stochastic,
    data: Data,
    *,
    sites: Sequence[str] | None = None,
    num_samples: int = 1000,
    batch_size: int | None = None,
    samples_per_pass: int | None = None,
    seed: int | None = None,
    plate: str | None = None,
) -> PosteriorFisherDivergence:
    r"""The relative Fisher divergence from the *true* posterior to the prior, for each datum.

    .. math:: F(p(z \mid x) \,\|\, p(z)) = E_{p(z \mid x)} \|\nabla_z \log p(z \mid x) - \nabla_z \log p(z)\|^2
        = E_{p(z \mid x)} \|\nabla_z \log p(x \mid z)\|^2,

    in one over the unit of z squared; no normaliser is needed. The estimator is self-normalised importance sampling
    from the guide with Pareto-smoothed weights [1],

    .. math:: \sum_s \bar w_s \|\nabla_z \log p(x \mid z_s)\|^2, \qquad
        \bar w_s \propto \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q(z \mid x).

    Do not trust it, nor its standard error, where k-hat exceeds 0.7: the guide then misses a part of the posterior that
    matters, and more draws do not help. Observed sites are those that make :math:`p(x \mid z)`, ``pyro.factor``
    statements among them. With other latent sites :math:`y` it is the divergence of the joint posterior in the
    direction of :math:`z`, which is the mean over :math:`p(y \mid x)` of that given :math:`y`; discrete sites that the
    guide does not sample are summed over instead, so that :math:`p(x \mid z) = \sum_y p(x, y, z) / \sum_y p(y, z)`.
    Where data share a latent or observed site, the weights are those of all data together, whose effective sample size
    falls quickly with their number. For a standard normal prior, KL(p(z|x) || p(z)) <= F/2 in nats, and
    F >= \|E[z|x]\|^2.

    Args:
        model: the model, called with the data.
        guide: its guide.
        data: a tensor, or a tuple of tensors that are the arguments of model and guide, with data along dimension 0.
        sites: the names of the latent sites :math:`z`; if None, all continuous ones in the plate over the data.
        num_samples: the number of draws for each datum; below 30 there is neither smoothing nor k-hat.
        batch_size: the number of data treated at a time; all at once if None.
        samples_per_pass: the number of draws treated at a time, which bounds the memory and changes nothing else; if
            None, as many as make at most 20,000 pairs of a draw and a datum.
        seed: a seed for the draws, which then leave the global random state as it was.
        plate: the name of the plate over the data; if None, the one plate of their number.

    Returns:
        The divergences; their standard errors, by the delta method (NaN for one draw); the effective sample sizes
        :math:`1 / \sum_s \bar w_s^2`; and k-hat, which is -inf for equal weights, infinite where few draws carry all
        weight, and NaN for fewer than 30 draws. Each is of shape (N,).

    Raises:
        ValueError: for a site that is not latent, not in the guide or not in the plate over the data, for densities
            that are not numbers, and for a batch size where data share a site.
        UnavailableError: for a discrete site or one whose support has no interior, and for a guide that is a point.

    References:
        [1] Vehtari et al. 2024, Pareto smoothed importance sampling, https://arxiv.org/abs/1507.02646

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> x = torch.tensor([0.0, 2.0])
        >>> divergence = posterior_fisher_divergence(model, guide, x, seed=0)
        >>> exact = x**2 / 4 + 0.5  # E (x - z)^2 for z ~ N(x / 2, 1 / 2)
        >>> bool(((divergence.values - exact).abs() < 5 * divergence.standard_errors).all())
        True
    """
    _checks.positive_int("num_samples", num_samples)
    parts = []
    with seeded(seed):
        for batch in batches(model, guide, data, batch_size, plate):
            names = differentiable_sites(batch, sites)
            weights, (squares,) = weighted_squares(
                batch, names, num_samples, samples_per_pass=samples_per_pass, batch_size=batch_size
            )
            parts.append(weighted_divergence(weights, squares))
    return PosteriorFisherDivergence(*(torch.cat(part) for part in zip(*parts, strict=True)))


def weighted_squares(
    batch: Batch,
    names: list[str],
    num_samples: int,
    *,
    samples_per_pass: int | None,
    batch_size: int | None,
    watched: nn.Module | None = None,
) -> tuple[Weights, list[Tensor]]:
    """Weights of draws of the guide, and the squared gradients at them that :func:`squared_gradients` gives."""
    shared = shared_sites(batch, [*sample_sites(batch.guide_trace), *sample_sites(batch.model_trace)], batch_size)
    if points := batch.points():
        raise UnavailableError(
            f"Expected a guide that draws its sites from distributions, got a point for each of {points}, which no "
            "weights make the posterior"
        )
    log_weights, squares = [], []
    for count in passes(batch, num_samples, samples_per_pass):
        with torch.no_grad():
            guide_trace, _ = batch.traces(count)
            own = sample_sites(guide_trace)
            log_guide = log_density(batch, own, count, bool(shared))
            check_numbers(log_guide, own)
        draws: dict[str, Any] = {name: guide_trace.nodes[name]["value"] for name in batch.latent_sites}
        log_joint, norms = squared_gradients(batch, draws, count, names, together=bool(shared), watched=watched)
        log_weights.append(log_joint - log_guide)
        squares.append(norms)
    weights = smoothed_weights(_checked(torch.cat(log_weights)))
    return weights, [torch.cat(parts) for parts in zip(*squares, strict=True)]


def weighted_divergence(weights: Weights, squares: Tensor) -> PosteriorFisherDivergence:
    """The divergence that squared gradients at weighted draws make."""
    values, errors = weighted_mean(weights.values, squares)
    # Data that share a site share their weights.
    ess, pareto_k = (part.expand_as(values) for part in (weights.effective_sample_sizes, weights.pareto_k))
    return PosteriorFisherDivergence(values, errors, ess, pareto_k)


def _checked(log_weights: Tensor) -> Tensor:
    unbounded = (log_weights == math.inf).any(0)
    if unbounded.any():
        raise ValueError(f"Expected finite log densities, got infinite weights for {int(unbounded.sum())} data")
    impossible = (log_weights == -math.inf).all(0)
    if impossible.any():
        raise ValueError(f"Expected draws that the model allows, got none for {int(impossible.sum())} data")
    return log_weights


def _expected_squares(batch: Batch, name: str, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """Means and errors, of the sum over coordinates and of each, over the draws of a guide."""
    _check_alone(batch, name)
    if len(batch.latent_sites) == 1 and not batch.enumerated_sites:
        squares, analytic = _squares(batch, name, (batch.guide_trace, batch.model_trace), 1)
        if analytic:
            per_dimension = squares[0]
            values = per_dimension.reshape(len(per_dimension), -1).sum(-1)
            return values, torch.zeros_like(values), per_dimension, torch.zeros_like(per_dimension), "analytic"
    total, coordinates = Moments(), Moments()
    for count in batch.passes(num_samples):
        squares, analytic = _squares(batch, name, batch.traces(count), count)
        total.add(squares.reshape(*squares.shape[:2], -1).sum(-1))
        coordinates.add(squares)
    estimator = "analytic" if analytic else "sampled"
    values, _, errors = total.mean_and_error(estimator)
    per_dimension, _, dimension_errors = coordinates.mean_and_error(estimator)
    return values, errors, per_dimension, dimension_errors, estimator


def _check_alone(batch: Batch, name: str) -> None:
    """Raise unless the guide has a distribution of the site given what the site's prior is given."""
    site = batch.site(batch.model_trace, name, "model")
    batch.site(batch.guide_trace, name, "guide")
    check_differentiable(site)
    inner = [frame.name for frame in site["cond_indep_stack"] if frame.name != batch.data_plate]
    if correlated(batch, name) and (inner or len(batch.latent_sites) > 1):
        raise UnavailableError(
            f"Expected a guide that draws site '{name}' by itself, got a joint draw of correlated ones"
        )
    if not batch.in_model_order(name):
        before = batch.latent_sites[: batch.latent_sites.index(name)]
        raise UnavailableError(
            f"Expected a guide that draws {before} before site '{name}', as the model does, got the order "
            f"{batch.drawn_sites}"
        )


def _squares(batch: Batch, name: str, traces: tuple[Trace, Trace], count: int) -> tuple[Tensor, bool]:
    """Expected squares given each of ``count`` draws of the other sites, or squares where there is no formula.

    The shape is (count, N, *other plates, *event).
    """
    guide_trace, model_trace = traces
    site = batch.site(guide_trace, name, "guide")
    q, p = site_posterior(batch, guide_trace, model_trace, name), batch.site(model_trace, name, "model")["fn"]
    summed = len(p.batch_shape) > batch.nesting + 1  # over the values of discrete sites that the guide does not sample
    squares = None if summed else _gaussian_squares(q, p)
    analytic = squares is not None
    if squares is None:
        log_prior = (lambda z: _summed_log_prior(batch, name, z, count)) if summed else p.log_prob
        squares = _sampled_squares(q, log_prior, site["value"], f"site '{name}' in {_type(q)} and {_type(p)}")
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"], device=squares.device)
        squares = torch.where(mask.reshape(*mask.shape, *(1,) * q.event_dim), squares, torch.zeros_like(squares))
    squares = batch.data_first(squares, site, q.event_dim)
    return squares.expand(count, *squares.shape[1:]), analytic


def _summed_log_prior(batch: Batch, name: str, z: Tensor, count: int) -> Tensor:
    if batch.latent_sites != [name]:
        raise UnavailableError(
            f"Expected a prior of site '{name}' that sums over {batch.enumerated_sites} and no drawn site but its own, "
            f"got {batch.latent_sites}"
        )
    _, trace = batch.traces(count, conditioned={name: z}, guide=placeholders([name]))
    return log_density(batch, [node for node in sample_sites(trace) if not node["is_observed"]], count, False)


def _sampled_squares(q: Any, log_prior: Callable[[Tensor], Tensor], value: Tensor, where: str) -> Tensor:
    with torch.enable_grad():
        z = value.detach().requires_grad_()  # also hides the draw from the caches of transforms
        try:
            # Data are independent, so that each has its own gradient in that of the sum.
            log_ratio = q.log_prob(z).sum() - log_prior(z).sum()
        except (NotImplementedError, KeyError) as error:
            raise UnavailableError(
                f"Expected densities of {where} at any point, got {type(error).__name__}; a flow may know its inverse "
                "at its own draws only"
            ) from error
        if not log_ratio.requires_grad:
            return torch.zeros_like(value)
        return torch.autograd.grad(log_ratio, z)[0].square()


def _type(fn: Any) -> str:
    transforms = [type(transform).__name__ for transform in getattr(fn, "transforms", ())]
    return " of ".join([*transforms[::-1], type(innermost(fn)).__name__])


def _gaussian_squares(q: Any, p: Any) -> Tensor | None:
    """Expected squares of the difference of two Normals' scores, of shape (*batch, *event); None for others."""
    q, p = without_event(q), without_event(p)
    if isinstance(q, Normal) and isinstance(p, Normal):
        return ((q.mean - p.mean) / p.variance).square() + (q.stddev / p.variance - 1 / q.stddev).square()
    multivariate = MultivariateNormal | LowRankMultivariateNormal
    if not (isinstance(q, Normal | multivariate) and isinstance(p, Normal | multivariate)):
        return None
    q_factor = q.stddev.diag_embed() if isinstance(q, Normal) else q.scale_tril
    q_precision = q.stddev.pow(-2).diag_embed() if isinstance(q, Normal) else q.precision_matrix
    p_precision = p.stddev.pow(-2).diag_embed() if isinstance(p, Normal) else p.precision_matrix
    # The difference of scores at z = mean + q_factor * noise is linear in the noise.
    shift = (p_precision @ (q.mean - p.mean).unsqueeze(-1)).squeeze(-1)
    return shift.square() + ((p_precision - q_precision) @ q_factor).square().sum(-1)
