"""The measures of collapse of one model and guide together, as a labeled data set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.diagnostics._engine.batches import batches, data_arguments
from pyro_ilvae.diagnostics._engine.summaries import Call, OfSite, OfWhole
from pyro_ilvae.diagnostics.active_units import SUMMARY as ACTIVE_UNITS
from pyro_ilvae.diagnostics.evidence import SUMMARY as EVIDENCE
from pyro_ilvae.diagnostics.fisher.fisher_bound import SUMMARY as POSTERIOR_FISHER
from pyro_ilvae.diagnostics.fisher.guide_fisher_divergence import SUMMARY as GUIDE_FISHER
from pyro_ilvae.diagnostics.fisher.mean_fisher_divergence import SUMMARY as MODEL_FISHER
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
    otherwise *weak*. A dimension that all data share is *collapsed* or *informed*. A number that cannot be computed for
    a site is NaN, and ``note`` says why. The verdict is *unknown* without the numbers that it needs.

    Args:
        model: the model.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        sites: the names of the latent sites; all of them if None.
        measures: what to compute, of "kl", "active_units", "mutual_information", "fisher", "evidence" and "decoder".
            The verdicts need "kl" and "active_units". "decoder" is for models with a decoder, such as
            :class:`~pyro_ilvae.VAE`: the Fisher divergence averaged over the model's own data, and its floor.
        epsilon: the divergence in nats below which a datum counts as collapsed.
        delta: the fraction of data that may lie above epsilon.
        threshold: the variance above which a unit counts as active.
        num_samples: the number of draws for each datum where there is no formula.
        batch_size: the number of data treated at a time; if None, all at once. Sites that data share need None.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        A data set with three kinds of variables.

        - For each unit (``unit`` is a dimension of a site, such as "z[0]"): ``kl`` (mean over the data, nats) and its
          standard error ``kl_se``, ``mean_variance`` with ``mean_variance_se``, ``collapsed_fraction``, ``verdict``.
        - For each ``site``: ``kl_total`` with ``kl_total_se``, ``active_units``, ``mutual_information`` and
          ``aggregate_kl`` (nats, with standard errors, and the largest value they can take), ``guide_fisher`` (per
          squared unit of z), ``note``.
        - For the whole: ``elbo`` and ``log_likelihood`` (means over the data, nats per datum, with standard errors);
          ``posterior_fisher`` with the worst Pareto k of its importance weights and, for a decoder with such a bound,
          ``fisher_bound`` and the smallest ``fisher_ratio`` over the data, which is at least 1 up to rounding; and
          ``model_fisher`` with ``model_fisher_floor``.

        Attributes hold the settings and, in ``notes``, what could not be computed. To keep the data set with the draws:
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
    import xarray as xr

    _checks.non_negative("epsilon", epsilon)
    _checks.non_negative("threshold", threshold)
    _checks.positive_int("num_samples", num_samples)
    _checks.fraction("delta", delta)
    if isinstance(measures, str) or not set(measures) <= set(MEASURES):
        raise ValueError(f"Expected measures among {list(MEASURES)}, got {measures!r}")
    arguments = data_arguments(model, guide, model_args, model_kwargs, plate, batch_size)
    with seeded(seed):
        first = next(batches(model, guide, arguments, batch_size, plate))
    latent = [*first.latent_sites, *first.enumerated_sites]
    if unknown := set(sites or ()) - set(latent):
        raise ValueError(f"Expected sites among the latent ones, {latent}, got {sorted(unknown)}")
    options = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed, "plate": plate}
    limits = {"epsilon": epsilon, "delta": delta, "threshold": threshold}
    call = Call(model, guide, arguments, options, limits, notes=[])
    names = list(sites or latent)
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
    return xr.Dataset(
        variables,
        coords={"unit": np.array(labels, dtype=str), "unit_site": ("unit", unit_sites), "site": names},
        attrs={"num_data": arguments.num_data, "num_samples": num_samples, **limits, "notes": "; ".join(call.notes)},
    )


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
            known = {*part.units, *part.missing, "collapsed", "active", "shared"} - found.keys()
            assert own.keys() <= known, f"Expected columns among {sorted(known)} from {part.label}, got {sorted(own)}"
            found |= own
    columns = [column for _, part in _OF_SITES for column in part.units]
    shape = next((tuple(found[column].shape) for column in columns if column in found), ())
    labels = [f"{name}{list(index)}" if index else name for index in np.ndindex(*shape)]
    units = {column: _array(found[column]) if column in found else np.full(len(labels), np.nan) for column in columns}
    totals = {column: found.get(column, value) for _, part in _OF_SITES for column, value in part.missing.items()}
    return (
        labels,
        units | {"verdict": _verdict(found, len(labels))},
        totals | {"note": "; ".join(dict.fromkeys(call.notes))},
    )


def _verdict(found: Mapping[str, Any], count: int) -> Any:
    """The verdict on each unit of a site, in words."""
    if "collapsed" not in found or not (found["shared"] or "active" in found):
        return np.full(count, "unknown")
    informed = "informed" if found["shared"] else np.where(_array(found["active"]), "active", "weak")
    return np.where(_array(found["collapsed"]), "collapsed", informed)


def _array(values: torch.Tensor) -> Any:
    values = values.reshape(-1)
    return (values.double() if values.is_floating_point() else values).numpy(force=True)
