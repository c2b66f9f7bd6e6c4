"""The measures of collapse of one model and guide together, as a labeled data set."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from pyro.poutine.messenger import unwrap
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import Arguments, ModelArgs, Program
from pyro_ilvae.diagnostics._engine.batches import batches
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics.active_units import active_units
from pyro_ilvae.diagnostics.collapsed_dimensions import collapsed_dimensions
from pyro_ilvae.diagnostics.evidence import evidence
from pyro_ilvae.diagnostics.fisher.fisher_bound import fisher_bound
from pyro_ilvae.diagnostics.fisher.guide_fisher_divergence import guide_fisher_divergence
from pyro_ilvae.diagnostics.fisher.mean_fisher_divergence import mean_fisher_divergence
from pyro_ilvae.diagnostics.fisher.posterior_fisher_divergence import posterior_fisher_divergence
from pyro_ilvae.diagnostics.kl_divergence import kl_divergence
from pyro_ilvae.diagnostics.kl_per_dimension import kl_per_dimension
from pyro_ilvae.diagnostics.mutual_information import mutual_information
from pyro_ilvae.sequences.decoder import SequenceDecoder

MEASURES = ("kl", "active_units", "mutual_information", "fisher", "evidence", "decoder")


def collapse_summary(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    measures: Collection[str] = MEASURES,
    epsilon: float = 0.01,
    delta: float = 0.01,
    threshold: float = 0.01,
    num_samples: int = 100,
    batch_size: int | None = None,
    seed: int | None = None,
    plate: str | None = None,
) -> xr.Dataset:
    r"""How collapsed the posterior is, site by site and dimension by dimension, with a verdict in words.

    A dimension is *collapsed* if it is (epsilon, delta)-collapsed, :math:`P_x(\mathrm{KL}_j(x) < \epsilon) \ge
    1 - \delta` [1]; otherwise *active* if the variance over the data of its posterior mean exceeds the threshold [2];
    otherwise *weak*. A dimension that all data share is *collapsed* or *informed*. What cannot be computed for a site
    is NaN, and ``note`` says why; its verdict is then *unknown*.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple, or a single tensor. Tensors whose first dimension is
            the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        sites: the names of the latent sites; all of them if None.
        measures: what to compute, of "kl", "active_units", "mutual_information", "fisher", "evidence" and "decoder".
            The verdicts need the first two. "decoder" is for models with a decoder, as
            :class:`~pyro_ilvae.VAE`: the divergence averaged over the model's own data, and its floor.
        epsilon: the divergence in nats below which a datum counts as collapsed.
        delta: the fraction of data that may lie above epsilon.
        threshold: the variance above which a unit counts as active.
        num_samples: the number of draws for each datum where there is no formula.
        batch_size: the number of data treated at a time; all at once if None. Not with sites that data share.
        seed: a seed for the draws, which then leave the global random state as it was.
        plate: the name of the plate over the data; if None, the one plate of their number.

    Returns:
        A data set with three kinds of variables.

        - For each unit (``unit`` is a dimension of a site, such as "z[0]"): ``kl`` (mean over the data, nats) and its
          standard error ``kl_se``, ``mean_variance`` with ``mean_variance_se``, ``collapsed_fraction``, ``verdict``.
        - For each ``site``: ``kl_total`` with ``kl_total_se``, ``active_units``, ``mutual_information`` and
          ``aggregate_kl`` (nats, with standard errors, and the largest value they can take), ``guide_fisher`` (per
          squared unit of z), ``note``.
        - For the whole: ``elbo`` and ``log_likelihood`` (means over the data, nats per datum, with standard errors),
          ``posterior_fisher`` with the worst Pareto k of its importance weights and, for a decoder that has one, its
          ``fisher_bound`` and the smallest ``fisher_ratio`` over the data, which is at least 1 up to rounding;
          ``model_fisher`` and ``model_fisher_floor``.

        Attributes name the settings and, in ``notes``, what could not be computed. To keep it with the draws:
        ``idata.add_groups(collapse=summary)`` in ArviZ 0.x, ``tree["collapse"] = xarray.DataTree(summary)`` in 1.x.

    Raises:
        ValueError: for an epsilon, delta or threshold out of range, unknown sites or measures.

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
        >>> summary = collapse_summary(model, guide, torch.randn(100, 2))
        >>> dict(zip(summary.unit.values.tolist(), summary.verdict.values.tolist()))
        {'z[0]': 'active', 'z[1]': 'collapsed'}
    """
    _checks.non_negative("epsilon", epsilon)
    _checks.non_negative("threshold", threshold)
    _checks.positive_int("num_samples", num_samples)
    _checks.fraction("delta", delta)
    if isinstance(measures, str) or not set(measures) <= set(MEASURES):
        raise ValueError(f"Expected measures among {list(MEASURES)}, got {measures!r}")
    with seeded(seed):
        arguments = Arguments.of(model_args, model_kwargs)
        first = next(batches(model, guide, arguments, batch_size, plate))
    latent = [*first.latent_sites, *first.enumerated_sites]
    if unknown := set(sites or ()) - set(latent):
        raise ValueError(f"Expected sites among the latent ones, {latent}, got {sorted(unknown)}")
    options = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed, "plate": plate}
    limits = {"epsilon": epsilon, "delta": delta, "threshold": threshold}
    rows = [_Site(name, model, guide, arguments, measures, limits, options) for name in sites or latent]
    whole, notes = _whole(model, guide, arguments, measures, options)
    return xr.Dataset(
        _columns("unit", [row.units for row in rows]) | _columns("site", [row.totals for row in rows]) | whole,
        coords={
            "unit": np.concatenate([row.labels for row in rows]) if rows else np.array([], dtype=str),
            "unit_site": ("unit", np.concatenate([[row.name] * len(row.labels) for row in rows]))
            if rows
            else ("unit", []),
            "site": [row.name for row in rows],
        },
        attrs={"num_data": arguments.num_data, "num_samples": num_samples, **limits, "notes": "; ".join(notes)},
    )


class _Site:
    """What is known of one latent site: for its units, in total, and why not more."""

    def __init__(
        self,
        name: str,
        model: Program,
        guide: Program,
        call: Arguments,
        measures: Collection[str],
        limits: dict[str, float],
        options: dict[str, Any],
    ) -> None:
        self.name = name
        self.notes: list[str] = []

        def attempt(measure: str, function: Any, **more: Any) -> Any:
            if measure not in measures:
                return None
            try:
                return function(model, guide, call.args, model_kwargs=call.kwargs, site=name, **(options | more))
            except ValueError as error:
                self.notes.append(f"{measure}: {error}")
                return None

        kl = attempt("kl", kl_per_dimension)
        total = attempt("kl", kl_divergence)
        units = attempt("active_units", active_units, threshold=limits["threshold"])
        information = attempt("mutual_information", mutual_information, num_samples=4)
        if information and ", no KL: " in information.estimator:
            self.notes.append(f"aggregate_kl: {information.estimator.split(', no KL: ')[1]}")
        fisher = attempt("fisher", guide_fisher_divergence)
        shape = tuple(kl.values.shape[1:]) if kl else tuple(units.variances.shape) if units else ()
        self.labels = [f"{name}{list(index)}" if index else name for index in np.ndindex(*shape)]
        shared = kl is not None and len(kl.values) == 1 and total is not None and len(total.values) == 1
        self.units = self._units(kl, units, limits, shared and call.num_data > 1)
        nan = float("nan")
        self.totals = {
            "kl_total": _mean(total.values) if total else nan,
            "kl_total_se": _mean_error(total.values, total.standard_errors) if total else nan,
            "kl_estimator": total.estimator if total else "none",
            "active_units": float(units.num_active) if units else nan,
            "mutual_information": float(information.mutual_information) if information else nan,
            "mutual_information_se": float(information.mutual_information_se) if information else nan,
            "aggregate_kl": float(information.aggregate_kl) if information else nan,
            "aggregate_kl_se": float(information.aggregate_kl_se) if information else nan,
            "mutual_information_limit": float(information.limit) if information else nan,
            "guide_fisher": _mean(fisher.values) if fisher else nan,
            "note": "; ".join(dict.fromkeys(self.notes)),
        }

    def _units(self, kl: Any, units: Any, limits: dict[str, float], shared: bool) -> dict[str, Any]:
        count = len(self.labels)
        nan = np.full(count, np.nan)
        values: dict[str, Any] = dict.fromkeys(
            ("kl", "kl_se", "mean_variance", "mean_variance_se", "collapsed_fraction"), nan
        )
        verdict = np.full(count, "unknown", dtype=object)
        if units is not None:
            values["mean_variance"] = _array(units.variances)
            values["mean_variance_se"] = _array(units.standard_errors)
        if kl is not None:
            flat, errors = (part.reshape(len(part), -1) for part in (kl.values, kl.standard_errors))
            values["kl"] = _array(flat.double().mean(0))
            values["kl_se"] = np.array([_mean_error(flat[:, j], errors[:, j]) for j in range(count)])
            values["collapsed_fraction"] = _array((flat < limits["epsilon"]).double().mean(0))
            collapsed = _array(collapsed_dimensions(flat, epsilon=limits["epsilon"], delta=limits["delta"]))
            if shared:
                verdict = np.where(collapsed, "collapsed", "informed")
            elif units is not None:
                active = _array(units.active)
                verdict = np.where(collapsed, "collapsed", np.where(active, "active", "weak"))
        return values | {"verdict": verdict.astype(str)}


def _whole(
    model: Program, guide: Program, call: Arguments, measures: Collection[str], options: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Variables about the model as a whole, and what could not be computed."""
    result: dict[str, Any] = {}
    notes: list[str] = []
    if "evidence" in measures:
        try:
            bounds = evidence(model, guide, call.args, model_kwargs=call.kwargs, **options)
            for name in ("elbo", "log_likelihood"):
                values, errors = getattr(bounds, name), getattr(bounds, f"{name}_standard_errors")
                result[name] = ((), _mean(values), {"units": "nats per datum" if len(values) > 1 else "nats"})
                result[f"{name}_se"] = ((), _mean_error(values, errors))
            result["effective_sample_size"] = ((), float(bounds.effective_sample_sizes.min()))
        except ValueError as error:
            notes.append(f"evidence: {error}")
    function: Any = unwrap(model)
    owner = getattr(function, "__self__", function)
    decoder, likelihood = getattr(owner, "decoder", None), getattr(owner, "likelihood", None)
    if "fisher" in measures:
        try:
            result |= _posterior_fisher(model, guide, call, decoder, options, notes)
        except ValueError as error:
            notes.append(f"posterior_fisher: {error}")
    if "decoder" in measures and isinstance(decoder, SequenceDecoder):
        notes.append("model_fisher: unavailable for a decoder that reads the data before each position")
    elif "decoder" in measures and decoder is not None and likelihood is not None:
        try:
            own = mean_fisher_divergence(
                decoder, likelihood, num_samples=options["num_samples"], batch_size=100, seed=options["seed"]
            )
            result["model_fisher"] = ((), float(own.total), {"units": "1 / units of z squared"})
            result["model_fisher_floor"] = ((), float("nan") if own.floor is None else float(own.floor))
        except ValueError as error:
            notes.append(f"model_fisher: {error}")
    return result, notes


def _posterior_fisher(
    model: Program, guide: Program, call: Arguments, decoder: Any, options: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The true posterior's divergence from the prior, and the decoder's floor under it where there is one."""
    bound = None
    if getattr(decoder, "inverse_lipschitz", None) is not None:
        try:
            bound = fisher_bound(model, guide, call.args, model_kwargs=call.kwargs, **options)
        except UnavailableError as error:
            notes.append(f"fisher_bound: {error}")
    fisher = (
        bound.divergence
        if bound
        else posterior_fisher_divergence(model, guide, call.args, model_kwargs=call.kwargs, **options)
    )
    result: dict[str, Any] = {
        "posterior_fisher": ((), _mean(fisher.values), {"units": "1 / units of z squared"}),
        "posterior_fisher_se": ((), _mean_error(fisher.values, fisher.standard_errors)),
        "pareto_k": ((), float(fisher.pareto_k.max()), {"largest over": "the data"}),
    }
    if bound is not None:
        result["fisher_bound"] = ((), _mean(bound.bound), {"units": "1 / units of z squared"})
        result["fisher_ratio"] = ((), float(bound.ratio.min()), {"smallest over": "the data"})
    return result


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _mean_error(values: Tensor, errors: Tensor) -> float:
    """The standard error of a mean over data, Monte Carlo errors included; for a single value, these alone."""
    if len(values) > 1:
        return float(values.double().std()) / len(values) ** 0.5
    return float(errors.reshape(-1)[0])


def _array(values: Tensor) -> Any:
    values = values.reshape(-1)
    return (values.double() if values.is_floating_point() else values).numpy(force=True)


def _columns(dim: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Variables along one dimension from one dictionary for each part of it."""
    return {
        name: (dim, np.concatenate([np.atleast_1d(row[name]) for row in rows])) for name in (rows[0] if rows else ())
    }
