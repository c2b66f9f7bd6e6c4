"""The evidence of each datum: its ELBO and its importance-weighted log likelihood."""

import math
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._traces import (
    Data,
    Stochastic,
    check_local,
    data_batches,
    guide_and_model_trace,
)

_MOST_PAIRS = 100_000


class Evidence(NamedTuple):
    """Two lower bounds on log p(x) for each datum in nats, of shape (N,)."""

    elbo: Tensor
    log_likelihood: Tensor


def evidence(
    model: Stochastic,
    guide: Stochastic,
    data: Data,
    *,
    num_samples: int = 100,
    batch_size: int | None = None,
    samples_per_pass: int | None = None,
) -> Evidence:
    r"""Lower bounds on the log likelihood of each datum from the same importance weights, in nats.

    .. math:: w_s = \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q(z \mid x), \qquad
        \text{elbo} = \tfrac{1}{S} \sum_s \log w_s, \qquad
        \text{log\_likelihood} = \log \tfrac{1}{S} \sum_s w_s.

    Both are unbiased for their bounds, which satisfy elbo <= E[log_likelihood] <= log p(x); the second approaches the
    last as S grows, from below. Scales of plates and annealing do not enter: this is about one datum.

    Args:
        model: the model, called with the data.
        guide: its guide.
        data: a tensor, or a tuple of tensors that are the arguments of model and guide, with data along dimension 0.
        num_samples: the number :math:`S` of draws for each datum.
        batch_size: the number of data treated at a time; all at once if None.
        samples_per_pass: the number of draws treated at a time, which bounds the memory and changes nothing else; if
            None, as many as make at most 100,000 pairs of a draw and a datum.

    Returns:
        The two bounds, each of shape (N,).

    Raises:
        ValueError: if a site is not local to the data, or a latent site is missing from the guide.

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
    if samples_per_pass is not None:
        _checks.positive_int("samples_per_pass", samples_per_pass)
    elbos, log_likelihoods = [], []
    for args in data_batches(data, batch_size):
        total, log_total = [], []
        step = samples_per_pass or max(1, _MOST_PAIRS // len(args[0]))
        for start in range(0, num_samples, step):
            count = min(step, num_samples - start)
            log_weights = _log_weights(*guide_and_model_trace(model, guide, args, count), count, len(args[0]))
            total.append(log_weights.sum(0))
            log_total.append(log_weights.logsumexp(0))
        elbos.append(torch.stack(total).sum(0) / num_samples)
        log_likelihoods.append(torch.stack(log_total).logsumexp(0) - math.log(num_samples))
    return Evidence(torch.cat(elbos), torch.cat(log_likelihoods))


def _log_weights(guide_trace: Trace, model_trace: Trace, num_particles: int, num_data: int) -> Tensor:
    """log p(x, z) - log q(z | x), of shape (num_particles, num_data)."""
    total: Tensor | float = 0.0
    for sign, source, trace in ((-1.0, "guide", guide_trace), (1.0, "model", model_trace)):
        for name, node in trace.nodes.items():
            site: Any = node
            if site["type"] != "sample":
                continue
            check_local(site, num_data, source)
            if source == "model" and not site["is_observed"] and name not in guide_trace:
                raise ValueError(f"Expected every latent site of the model in the guide, got none for '{name}'")
            log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
            total = total + sign * log_prob
    return torch.as_tensor(total).expand(num_particles, num_data)
