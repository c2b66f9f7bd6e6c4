"""The evidence of each datum: its ELBO and its importance-weighted log likelihood."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import ModelArgs, Program, sample_sites
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.batches import data_batches
from pyro_ilvae.diagnostics._engine.densities import check_numbers, log_density, shared_sites
from pyro_ilvae.diagnostics._engine.moments import mean_over_data
from pyro_ilvae.diagnostics._engine.sites import check_no_points
from pyro_ilvae.diagnostics._engine.summaries import Call, OfWhole

__all__ = ["Evidence", "evidence"]


class Evidence(NamedTuple):
    """Two lower bounds on log p(x) for each datum, with their Monte Carlo errors.

    Where data share a latent site all data together have one evidence, and N = 1.
    """

    elbo: Tensor  #: the mean log weight in nats, of shape (N,)
    log_likelihood: Tensor  #: the log of the mean weight in nats, of shape (N,)
    elbo_standard_errors: Tensor  #: the Monte Carlo standard errors of ``elbo`` in nats, of shape (N,)
    log_likelihood_standard_errors: Tensor  #: the errors of ``log_likelihood`` by the delta method, of shape (N,)
    effective_sample_sizes: Tensor  #: the number of equal weights that would be as good, of shape (N,)

    def __repr__(self) -> str:
        return printing.described(
            self,
            f"elbo {printing.mean(self.elbo, self.elbo_standard_errors)}",
            f"log_likelihood {printing.mean(self.log_likelihood, self.log_likelihood_standard_errors)} nats over "
            f"{printing.sizes(self.elbo.shape)}",
            f"smallest effective sample size {printing.number(self.effective_sample_sizes.min())}",
        )


def evidence(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 100,
    batch_size: int | None = None,
    samples_per_pass: int | None = None,
    seed: int | None = None,
    plate: str | None = None,
) -> Evidence:
    r"""Lower bounds on the log likelihood of each datum from the same importance weights, in nats.

    .. math:: w_s = \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q(z \mid x), \qquad
        \text{elbo} = \tfrac{1}{S} \sum_s \log w_s, \qquad
        \text{log\_likelihood} = \log \tfrac{1}{S} \sum_s w_s.

    Both are unbiased for their bounds, which satisfy elbo <= E[log_likelihood] <= log p(x). As S grows, log_likelihood
    approaches log p(x) from below. Scales of plates and annealing do not enter, because the evidence is about one
    datum. Discrete sites that the guide does not sample are summed over; sites that the guide samples are drawn. Where
    data share a latent site, all data together have one evidence.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        num_samples: the number :math:`S` of draws for each datum.
        batch_size: the number of data treated at a time; all at once if None.
        samples_per_pass: the number of draws treated at a time, which bounds the memory and changes nothing else; if
            None, as many as fit in bounded memory, and at least one draw of ``batch_size`` data.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        The two bounds, their standard errors over the draws, and the effective sample size
        :math:`(\sum w)^2 / \sum w^2`, each of shape (N,), or (1,) for all data together. The standard error of
        log_likelihood comes from the delta method, which is unreliable for an effective sample size of a few.

    Raises:
        ValueError: if a latent site is missing from the guide and cannot be summed over, for a batch size where data
            share a latent site, and for log densities that are NaN.
        UnavailableError: for a guide that puts a site at a point, as ``AutoDelta`` does: its weights bound nothing.

    References:
        Burda, Grosse & Salakhutdinov 2016, Importance weighted autoencoders, https://arxiv.org/abs/1509.00519

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def exact_posterior(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([0.0, 1.0])
        >>> bounds = evidence(model, exact_posterior, x)
        >>> log_marginal = dist.Normal(0.0, 2**0.5).log_prob(x)
        >>> bool(torch.allclose(bounds.log_likelihood, log_marginal, atol=1e-5))
        True
    """
    _checks.positive_int("num_samples", num_samples)
    parts = []
    with seeded(seed), torch.no_grad():
        for batch in data_batches(model, guide, model_args, model_kwargs, batch_size, plate):
            check_no_points(batch, "the weights of a point bound nothing")
            log_weights = torch.cat(
                [_log_weights(batch, count, batch_size) for count in batch.passes(num_samples, samples_per_pass)]
            )
            parts.append(_bounds(log_weights))
    return Evidence(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _log_weights(batch: Batch, count: int, batch_size: int | None) -> Tensor:
    """log p(x, z) - log q(z | x), of shape (count, N), or (count, 1) where data share a latent site."""
    guide_trace, model_trace = batch.traces(count)
    own, joint = sample_sites(guide_trace), sample_sites(model_trace)
    together = bool(shared_sites(batch, own + joint, batch_size))
    log_weights = log_density(batch, joint, count, together) - log_density(batch, own, count, together)
    check_numbers(log_weights, own + joint)
    return log_weights


def _bounds(log_weights: Tensor) -> tuple[Tensor, ...]:
    size = len(log_weights)
    log_sum = log_weights.logsumexp(0)
    effective = torch.exp(2 * log_sum - (2 * log_weights).logsumexp(0))
    effective = effective.masked_fill(log_sum == -math.inf, 0.0)
    if size > 1:
        elbo_error = log_weights.std(0) / math.sqrt(size)
        log_likelihood_error = ((size / effective - 1).clamp(min=0) / (size - 1)).sqrt()
        log_likelihood_error = log_likelihood_error.masked_fill(effective == 0, float("nan"))
    else:
        elbo_error = log_likelihood_error = torch.full_like(log_sum, float("nan"))
    return log_weights.mean(0), log_sum - math.log(size), elbo_error, log_likelihood_error, effective


def _variables(call: Call) -> dict[str, Any]:
    bounds = call(evidence)
    result: dict[str, Any] = {}
    for name in ("elbo", "log_likelihood"):
        values = getattr(bounds, name)
        mean, error = mean_over_data(values, getattr(bounds, f"{name}_standard_errors"))
        result[name] = (float(mean), {"units": "nats per datum" if len(values) > 1 else "nats"})
        result[f"{name}_se"] = float(error)
    result["effective_sample_size"] = float(bounds.effective_sample_sizes.min())
    return result


SUMMARY = OfWhole("evidence", _variables)
