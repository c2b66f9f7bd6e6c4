"""The measures of collapse of one model and guide together, as a labelled data set."""

import numpy as np
import xarray as xr

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._batches import Data, Stochastic
from pyro_ilvae.diagnostics.collapse import active_units
from pyro_ilvae.diagnostics.divergences import kl_per_dimension
from pyro_ilvae.diagnostics.evidence_bounds import evidence


def collapse_summary(
    model: Stochastic,
    guide: Stochastic,
    data: Data,
    *,
    site: str = "z",
    epsilon: float = 0.01,
    delta: float = 0.01,
    threshold: float = 0.01,
    num_samples: int = 100,
    batch_size: int | None = None,
) -> xr.Dataset:
    r"""How collapsed the posterior of a latent site is, dimension by dimension, with a verdict in words.

    A dimension is *collapsed* if it is (epsilon, delta)-collapsed, :math:`P_x(\mathrm{KL}_j(x) < \epsilon) \ge
    1 - \delta` [1]; otherwise *active* if the variance over the data of its posterior mean exceeds the threshold [2];
    otherwise *weak*.

    Args:
        model: the model, called with the data.
        guide: its guide, in which the site factorises over its dimensions.
        data: a tensor, or a tuple of tensors that are the arguments of model and guide, with data along dimension 0.
        site: the name of a latent site in a plate over the data, whose event is a vector or scalar.
        epsilon: the divergence in nats below which a datum counts as collapsed.
        delta: the fraction of data that may lie above epsilon.
        threshold: the variance above which a unit counts as active.
        num_samples: the number of draws for each datum for the evidence, and where there is no formula.
        batch_size: the number of data treated at a time; all at once if None.

    Returns:
        A data set with, for each dimension, ``kl`` (mean over the data, nats), ``kl_se`` (its standard error),
        ``mean_variance``, ``collapsed_fraction`` and ``verdict``, and the totals ``kl_total``, ``active_units``,
        ``elbo`` and ``log_likelihood`` (means over the data, nats per datum). Attributes name the estimators.

    Raises:
        ValueError: for an epsilon, delta or threshold out of range, and as :func:`kl_per_dimension`,
            :func:`active_units` and :func:`evidence`.

    References:
        | [1] Lucas et al. 2019, Don't blame the ELBO!, https://arxiv.org/abs/1911.02469
        | [2] Burda, Grosse & Salakhutdinov 2016, Importance weighted autoencoders, https://arxiv.org/abs/1509.00519

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x * torch.tensor([1.0, 0.0]), 1.0).to_event(1))
        >>> collapse_summary(model, guide, torch.randn(100, 2)).verdict.values.tolist()
        ['active', 'collapsed']
    """
    _checks.constant("epsilon", epsilon)
    if not 0 <= _checks.constant("delta", delta) <= 1:
        raise ValueError(f"Expected delta in [0, 1], got {delta!r}")
    options = {"site": site, "batch_size": batch_size, "num_samples": num_samples}
    kl = kl_per_dimension(model, guide, data, **options)  # type: ignore[arg-type]
    units = active_units(model, guide, data, threshold=threshold, **options)  # type: ignore[arg-type]
    bounds = evidence(model, guide, data, num_samples=num_samples, batch_size=batch_size)

    if kl.values.dim() > 2:
        raise ValueError(
            f"Expected site '{site}' to be a scalar or vector, got event shape {tuple(kl.values.shape[1:])}"
        )
    values = kl.values.reshape(len(kl.values), -1).double().numpy(force=True)
    collapsed_fraction = (values < epsilon).mean(0)
    active = units.active.reshape(-1).numpy(force=True)
    verdict = np.where(collapsed_fraction >= 1 - delta, "collapsed", np.where(active, "active", "weak"))
    dim = f"{site}_dim"
    elbo, log_likelihood = (float(bound.double().mean()) for bound in bounds[:2])
    summary = xr.Dataset(
        {
            "kl": (dim, values.mean(0), {"units": "nats", "estimator": kl.estimator}),
            "kl_se": (dim, values.std(0, ddof=1) / np.sqrt(len(values)), {"units": "nats"}),
            "mean_variance": (dim, units.variances.reshape(-1).double().numpy(force=True)),
            "collapsed_fraction": (dim, collapsed_fraction, {"epsilon": epsilon}),
            "verdict": (dim, verdict),
            "kl_total": ((), values.sum(1).mean(), {"units": "nats"}),
            "active_units": ((), units.num_active),
            "elbo": ((), elbo, {"units": "nats per datum"}),
            "log_likelihood": ((), log_likelihood, {"units": "nats per datum", "estimator": "importance weighted"}),
        },
        coords={dim: np.arange(values.shape[1])},
        attrs={
            "site": site,
            "num_data": len(values),
            "num_samples": num_samples,
            "epsilon": epsilon,
            "delta": delta,
            "active_threshold": units.threshold,
        },
    )
    return summary
