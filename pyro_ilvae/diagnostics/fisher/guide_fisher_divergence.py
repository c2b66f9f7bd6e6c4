"""The relative Fisher divergence of the guide's posterior from the prior."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae._programs import ModelArgs, Program, sample_sites
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.batches import data_batches
from pyro_ilvae.diagnostics._engine.densities import log_density, shared_sites
from pyro_ilvae.diagnostics._engine.moments import Moments
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError, correlated, site_posterior
from pyro_ilvae.diagnostics._engine.scores import check_density_at_value, check_differentiable, placeholders
from pyro_ilvae.diagnostics._engine.sites import check_not_flat, only_site
from pyro_ilvae.diagnostics._engine.summaries import Call, OfSite
from pyro_ilvae.distributions import innermost, without_event

__all__ = ["GuideFisherDivergence", "guide_fisher_divergence"]


class GuideFisherDivergence(NamedTuple):
    """Relative Fisher divergences from the guide's posterior to the prior, in one over squared units of z."""

    values: Tensor  #: the divergence of each datum, of shape (N,)
    estimator: str  #: "analytic" if every value has a formula, otherwise "sampled"
    standard_errors: Tensor  #: the Monte Carlo standard errors of the values, of shape (N,); 0 without draws
    per_dimension: Tensor  #: the part of each coordinate, of shape (N, \*other plates, \*event shape)
    per_dimension_standard_errors: Tensor  #: the Monte Carlo standard errors of the parts, of their shape

    def __repr__(self) -> str:
        over = printing.sizes(self.values.shape)
        return printing.described(
            self, f"{printing.mean(self.values, self.standard_errors)} over {over}", self.estimator
        )


def guide_fisher_divergence(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    site: str | None = None,
    batch_size: int | None = None,
    num_samples: int = 100,
    seed: int | None = None,
    plate: str | None = None,
) -> GuideFisherDivergence:
    r"""The relative Fisher divergence from a site's posterior in the guide to its prior, for each datum.

    .. math:: F(q \,\|\, p) = E_{q(z \mid x)} \|\nabla_z \log q(z \mid x) - \nabla_z \log p(z)\|^2
        = \sum_j E_{q(z \mid x)} (\partial_j \log q(z \mid x) - \partial_j \log p(z))^2.

    The divergence is in one over squared units of z and not in nats. Unlike the KL divergence, it changes when z is
    rescaled. It is analytic for two Normals, with :math:`(\mu - m)^2 / t^4 + (s / t^2 - 1 / s)^2` for each coordinate
    of :math:`N(\mu, s^2)` and :math:`N(m, t^2)`, and for two multivariate Normals; otherwise it is the mean over draws
    of the guide. If the guide draws other latent sites before, it is the mean over their draws of the divergence given
    them. Discrete sites that the guide does not sample are summed out of the prior.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        site: the name of a continuous latent site; if None, the only one that the guide samples.
        batch_size: the number of data treated at a time; all at once if None.
        num_samples: the number of draws where there is no formula, or where there are other latent sites.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        The divergences, of shape (N,); the estimator, "analytic" or "sampled"; the Monte Carlo standard errors, 0
        where nothing was drawn and NaN for one draw; the part of each coordinate in the sum, of shape
        (N, \*other plates, \*event shape), and the standard errors of the parts. A site that data share has N = 1.

    Raises:
        ValueError: if the site is not a latent site of model and guide, if ``site`` is None and there are several, for
            a batch size with a site that data share, and for densities that are not numbers.
        UnavailableError: if the site is discrete, has single values with probability, has a support without interior
            such as the simplex, is straight-through or is a point in the guide, if the guide's density has no formula
            or joins correlated sites, and if the prior sums over a discrete site and depends on another site.

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
        for batch in data_batches(model, guide, model_args, model_kwargs, batch_size, plate):
            name = only_site(batch, site, continuous=True)
            shared_sites(batch, [batch.site(batch.guide_trace, name, "guide")], batch_size)
            *part, estimator = _expected_squares(batch, name, num_samples)
            parts.append(part)
            estimators.add(estimator)
    values, errors, per_dimension, dimension_errors = (torch.cat(part) for part in zip(*parts, strict=True))
    if values.isnan().any():
        raise ValueError(
            f"Expected densities of site '{name}' that are numbers, got NaN for {values.isnan().sum()} data"
        )
    estimator = "sampled" if "sampled" in estimators else "analytic"
    return GuideFisherDivergence(values, estimator, errors, per_dimension, dimension_errors)


def _expected_squares(batch: Batch, name: str, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """Mean and error over the guide's draws of the sum over coordinates, the same of each coordinate, the estimator."""
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
    """Raise unless the guide has a distribution of the site given all sites on which the site's prior depends."""
    site = batch.site(batch.model_trace, name, "model")
    check_density_at_value(batch.site(batch.guide_trace, name, "guide"))
    check_differentiable(site)
    check_not_flat(batch, [name])
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
        squares = torch.where(mask.reshape(mask.shape + (1,) * q.event_dim), squares, torch.zeros_like(squares))
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
    with torch.enable_grad(), evaluation_mode(q, log_prior):
        z = value.detach().requires_grad_()  # also hides the draw from the caches of transforms
        try:
            # Data are independent, so that the gradient of the sum is the gradient of each datum.
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


def _columns(call: Call, site: str) -> dict[str, Any]:
    return {"guide_fisher": float(call(guide_fisher_divergence, site=site).values.double().mean())}


SUMMARY = OfSite("fisher", _columns, missing={"guide_fisher": float("nan")})
