"""The measures of collapse of one model and guide together, as a labeled data set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.diagnostics._engine import verdicts
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.batches import batches, data_arguments
from pyro_ilvae.diagnostics._engine.sites import dims_of_unit, site_names
from pyro_ilvae.diagnostics._engine.summaries import Call, OfSite, OfWhole
from pyro_ilvae.diagnostics.active_units import SUMMARY as ACTIVE_UNITS
from pyro_ilvae.diagnostics.evidence import SUMMARY as EVIDENCE
from pyro_ilvae.diagnostics.fisher.fisher_bound import SUMMARY as POSTERIOR_FISHER
from pyro_ilvae.diagnostics.fisher.guide_fisher_divergence import SUMMARY as GUIDE_FISHER
from pyro_ilvae.diagnostics.fisher.mean_fisher_divergence import SUMMARY as MODEL_FISHER
from pyro_ilvae.diagnostics.guaranteed_information import SUMMARY as GUARANTEED_INFORMATION
from pyro_ilvae.diagnostics.kl_divergence import SUMMARY as KL
from pyro_ilvae.diagnostics.kl_per_dimension import SUMMARY as KL_PER_DIMENSION
from pyro_ilvae.diagnostics.mutual_information import SUMMARY as MUTUAL_INFORMATION

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["collapse_summary"]

# A new measure is a line in one of these tables and a SUMMARY in its own file.
_OF_SITES: tuple[tuple[str, OfSite], ...] = (
    ("kl", KL_PER_DIMENSION),
    ("kl", KL),
    ("active_units", ACTIVE_UNITS),
    ("mutual_information", MUTUAL_INFORMATION),
    ("guaranteed_information", GUARANTEED_INFORMATION),
    ("fisher", GUIDE_FISHER),
)
_OF_WHOLE: tuple[tuple[str, OfWhole], ...] = (
    ("evidence", EVIDENCE),
    ("fisher", POSTERIOR_FISHER),
    ("decoder", MODEL_FISHER),
)

#: the measures that :func:`~pyro_ilvae.diagnostics.collapse_summary` knows
MEASURES = tuple(dict.fromkeys(measure for measure, _ in (*_OF_SITES, *_OF_WHOLE)))


def collapse_summary(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    measures: Collection[str] = MEASURES,
    collapsed_below: float = 0.01,
    active_from: float = 0.1,
    epsilon: float = 0.01,
    delta: float = 0.01,
    threshold: float = 0.01,
    num_samples: int = 100,
    batch_size: int | None = None,
    seed: int | None = None,
    plate: str | None = None,
) -> xr.Dataset:
    r"""How collapsed the posterior is, site by site and dimension by dimension, with verdicts in words.

    The verdict on a unit, which is a dimension of a latent site, follows from its divergence from the prior in nats,
    :math:`\overline{\mathrm{KL}}_j = \tfrac1N \sum_n \mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j))`:

    - *collapsed* below ``collapsed_below`` = 0.01 nats, *weak* up to ``active_from`` = 0.1 nats, *active* from there.
      For jointly Gaussian x and z the data explain :math:`1 - e^{-2 \overline{\mathrm{KL}}}` of a unit's variance: less
      than 2 % of a collapsed unit, and 18 % or more of an active one;
    - *off scale* from 1,000 nats: no posterior tells so much of one number, and training has diverged or z is in units
      that are far from the prior's;
    - *unknown* where the unit has no divergence; the ``note`` of its site says why.

    A vector or matrix whose entries are one variable is one unit: a one-hot vector, a point of the simplex, a
    covariance. Any other site whose dimensions have no divergences of their own is judged by its ``kl_total`` over its
    dimensions. The attribute ``verdict`` is a sentence about the model. With an active unit it is *active*, or *partly
    collapsed* if there are collapsed units too. Without one it is *collapsed* if its mean unit is and all units hold
    less than 1 nat together, and otherwise *weak*. Sites that all data share have verdicts too, and count in the
    sentence only where there are no others. Nats that are the same for all data say nothing about them, which
    ``mutual_information`` and a note show. The (epsilon, delta)-collapse [1] and the active units [2] of the literature
    are measures beside the verdicts.

    A number that cannot be computed is NaN or left out, and ``note`` or the attribute ``notes`` says why.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        sites: the names of the latent sites; all of them if None.
        measures: what to compute, of "kl", "active_units", "mutual_information", "guaranteed_information", "fisher",
            "evidence" and "decoder". The verdicts need "kl". "guaranteed_information" and "decoder" are for models that
            call a decoder and a likelihood, such as :class:`~pyro_ilvae.VAE`, and are about the model's own data, with
            z from the model's own prior: the information that the decoder guarantees under Normal noise, and the mean
            Fisher divergence with its floor.
        collapsed_below: the mean KL in nats below which a unit is collapsed.
        active_from: the mean KL in nats from which on a unit is active.
        epsilon: the divergence in nats below which a datum counts as collapsed in a dimension.
        delta: the fraction of data that may lie above epsilon in a dimension that is (epsilon, delta)-collapsed.
        threshold: the variance, in squared units of z, above which ``active_units`` counts a unit.
        num_samples: the number of draws for each datum where there is no formula, and in all of the model's own prior.
        batch_size: the number of data treated at a time; if None, all at once. Sites that data share need None.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        A data set with three kinds of variables.

        - For each unit (``unit`` is a dimension of a site, such as "z[0]"): ``kl`` (mean over the data, nats) and its
          standard error ``kl_se``, ``collapsed_fraction`` (of the data with a KL below epsilon),
          ``epsilon_delta_collapsed`` (1 or 0), ``mean_variance`` with ``mean_variance_se``, ``verdict``.
        - For each ``site``: ``kl_total`` with ``kl_total_se``, ``active_units``, ``mutual_information`` and
          ``aggregate_kl`` (nats, with standard errors, the largest value they can take, and the number of draws for
          each datum, which is below ``num_samples`` where all pairs of data would take too long), ``guaranteed_nats``
          with its standard error (by the Jacobian) and ``guaranteed_floor`` (by L, noise and prior alone), of all
          dimensions together, see :func:`~pyro_ilvae.diagnostics.guaranteed_information`, NaN without a guarantee (with
          layers, about the site below), ``guide_fisher`` (per squared unit of z), ``note``.
        - For the whole: ``elbo`` and ``log_likelihood`` (means over the data, nats per datum, with standard errors);
          ``posterior_fisher`` with the worst Pareto k of its importance weights and, for a decoder with such a bound,
          ``fisher_bound`` and the smallest ``fisher_ratio`` over the data, which is at least 1 up to rounding; and
          ``model_fisher`` with its standard error and ``model_fisher_floor``.

        Attributes hold the ``verdict`` on the model, the settings and, in ``notes``, what could not be computed. To
        keep the data set with the draws: ``idata.add_groups(collapse=summary)`` in ArviZ 0.x,
        ``tree["collapse"] = xarray.DataTree(summary)`` in 1.x.

    Raises:
        ValueError: for limits out of range, and for sites or measures that are unknown or none.

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
        >>> summary = collapse_summary(model, guide, torch.ones(100, 2), measures=["kl"])
        >>> dict(zip(summary.unit.values.tolist(), summary.verdict.values.tolist()))
        {'z[0]': 'active', 'z[1]': 'collapsed'}
        >>> summary.attrs["verdict"]
        'partly collapsed: 1 of 2 units hold less than 0.01 nats, 1 active; 0.5 nats in all'
    """
    import xarray as xr

    limits = {
        "collapsed_below": _checks.non_negative("collapsed_below", collapsed_below),
        "active_from": _checks.non_negative("active_from", active_from),
        "epsilon": _checks.non_negative("epsilon", epsilon),
        "delta": _checks.fraction("delta", delta),
        "threshold": _checks.non_negative("threshold", threshold),
    }
    if active_from < collapsed_below:
        raise ValueError(f"Expected active_from >= collapsed_below = {collapsed_below}, got {active_from}")
    _checks.positive_int("num_samples", num_samples)
    measures = _checked_measures(measures)
    arguments = data_arguments(model, guide, model_args, model_kwargs, plate, batch_size)
    with seeded(seed):
        first = next(batches(model, guide, arguments, batch_size, plate))
    latent = [*first.latent_sites, *first.enumerated_sites]
    names = latent if sites is None else site_names(sites)
    unknown = [name for name in names if name not in latent]
    if unknown or not (names or sites is None):
        raise ValueError(f"Expected sites among the latent ones, {latent}, got {unknown or 'none'}")
    options = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed, "plate": plate}
    call = Call(model, guide, arguments, first, options, limits, notes=[])
    rows = [_of_site(call._replace(notes=[]), name, measures) for name in names]
    labels = [label for labels, _, _ in rows for label in labels]
    unit_sites = [name for name, (labels, _, _) in zip(names, rows, strict=True) for _ in labels]
    variables: dict[str, Any] = {}
    for dim, columns in (("unit", [units for _, units, _ in rows]), ("site", [totals for _, _, totals in rows])):
        for name in columns[0] if columns else ():
            variables[name] = (dim, np.concatenate([np.atleast_1d(column[name]) for column in columns]))
    for measure, part in _OF_WHOLE:
        found = _attempt(call, part.label, part.compute) if measure in measures else {}
        for name, value in found.items():
            variables[name] = ((), *value) if isinstance(value, tuple) else ((), value)
    attributes = {"verdict": _verdict_on_model(first, names, rows, limits), "num_data": arguments.num_data}
    return xr.Dataset(
        variables,
        coords={"unit": np.array(labels, dtype=str), "unit_site": ("unit", unit_sites), "site": names},
        attrs={**attributes, "num_samples": num_samples, **limits, "notes": "; ".join(dict.fromkeys(call.notes))},
    )


def _checked_measures(measures: Collection[str]) -> list[str]:
    names = [measures] if isinstance(measures, str) or not isinstance(measures, Collection) else list(measures)
    if isinstance(measures, str) or not names or any(name not in MEASURES for name in names):
        raise ValueError(f"Expected measures among {list(MEASURES)}, at least one, got {measures!r}")
    return names


def _attempt(call: Call, label: str, compute: Callable[..., dict[str, Any]], *site: str) -> dict[str, Any]:
    """What a measure says, or a note why it says nothing."""
    try:
        return compute(call, *site)
    except ValueError as error:
        call.notes.append(f"{label}: {error}")
        return {}


def _of_site(call: Call, name: str, measures: Collection[str]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """The labels of the units of a site, the columns of the units, and the columns of the site."""
    found: dict[str, Any] = {}
    for measure, part in _OF_SITES:
        if measure in measures:
            own = _attempt(call, part.label, part.compute, name)
            # A misspelled column would be NaN without a reason, and a column of another measure would replace it.
            known = {*part.units, *part.missing, "is_least", "is_most"} - found.keys()
            assert own.keys() <= known, f"Expected columns among {sorted(known)} from {part.label}, got {sorted(own)}"
            found |= own
    columns = [column for _, part in _OF_SITES for column in part.units]
    shape = next((tuple(found[column].shape) for column in columns if column in found), ())
    labels = [f"{name}{list(index)}" if index else name for index in np.ndindex(*shape)]
    units = {column: _array(found[column]) if column in found else np.full(len(labels), np.nan) for column in columns}
    totals = {column: found.get(column, value) for _, part in _OF_SITES for column, value in part.missing.items()}
    node: Any = call.batch.model_trace.nodes[name]
    kl = units["kl"]
    if "kl" not in found:
        event_dim, within = node["fn"].event_dim, dims_of_unit(node)
        value = call.batch.data_first(node["value"], node, event_dim)[0, 0]
        num_units = value.shape[: value.dim() - within].numel()
        kl = np.full(len(labels), totals["kl_total"] / num_units)
    words = verdicts.of_units(kl, call.limits)
    # A bound of a divergence says which side of a limit it is on, or nothing.
    for bound, certain in (("is_least", ["active", "off scale"]), ("is_most", ["collapsed"])):
        if found.get(bound):
            words = np.where(np.isin(words, certain), words, "unknown")
    if still := _still_units(units, words, labels):
        call.notes.append(f"kl: the same for all data, about which it says nothing, for {', '.join(still)}")
    return labels, units | {"verdict": words}, totals | {"note": "; ".join(dict.fromkeys(call.notes))}


def _still_units(units: Mapping[str, Any], words: Any, labels: list[str]) -> list[str]:
    """The units that are away from the prior but whose posterior is one for all data."""
    same = (units["kl_se"] <= 1e-4 * units["kl"]) & (units["mean_variance"] <= 1e-10) & (words != "collapsed")
    return [label for label, is_same in zip(labels, same, strict=True) if is_same]


def _verdict_on_model(batch: Batch, names: list[str], rows: list[Any], limits: Mapping[str, float]) -> str:
    """The sentence about the model, from the sites that each datum has, or from all if there are none."""
    nodes: Any = batch.model_trace.nodes
    own = [row for name, row in zip(names, rows, strict=True) if batch.is_local(nodes[name])] or rows
    words = [word for _, units, _ in own for word in units["verdict"]]
    totals = [np.nansum(units["kl"]) if np.isnan(site["kl_total"]) else site["kl_total"] for _, units, site in own]
    near = sum(verdicts.near_a_limit(units["kl"], units["kl_se"], limits).sum() for _, units, _ in own)
    sentence = verdicts.of_model(words, float(np.sum(totals)), limits)
    return f"{sentence} ({near} within two standard errors of a limit)" if near else sentence


def _array(values: torch.Tensor) -> Any:
    values = values.reshape(-1)
    return (values.double() if values.is_floating_point() else values).numpy(force=True)
