"""From draws to ArviZ's containers: ``InferenceData`` of ArviZ 0.x or ``xarray.DataTree`` of ArviZ 1.x."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import Arguments, ModelArgs, Program, Values
from pyro_ilvae.io_pyro import _names
from pyro_ilvae.io_pyro._integrated import with_spread
from pyro_ilvae.io_pyro._notes import of_log_densities
from pyro_ilvae.io_pyro._sampler import LOG_LIKELIHOODS, Arrays, MixedDrawsError, Sampler, as_numpy, finite


def convert(
    model: Program,
    guide: Program,
    model_args: ModelArgs,
    model_kwargs: Mapping[str, Any] | None,
    *,
    given: Values,
    source: str,
    shape: tuple[int, int],
    samples_per_pass: int | None,
    seed: int | None,
    coords: Mapping[str, Any] | None,
    dims: Mapping[str, Sequence[str]] | None,
    constant_data: Mapping[str, Any] | None,
    sample_stats: Arrays | None = None,
    stats_attrs: Mapping[str, Any] | None = None,
    attrs: dict[str, Any],
    prior: bool,
    posterior_predictive: bool,
    log_likelihood: bool | str,
    num_importance_samples: int,
    plate: str | None,
) -> Any:
    """Return all groups of (chain, draw) = ``shape`` posterior draws; see ``Sampler`` for ``given`` and ``source``."""
    arguments = Arguments.of(model_args, model_kwargs)
    _names.check_call(model, arguments)
    constants = _names.constants_of(constant_data)
    groups: dict[str, Any] = {
        "prior": _checks.boolean("prior", prior),
        "posterior_predictive": _checks.boolean("posterior_predictive", posterior_predictive),
        "log_likelihood": _checked_log_likelihood(log_likelihood),
        "num_importance_samples": _checks.positive_int("num_importance_samples", num_importance_samples),
        "plate": plate,
    }
    with torch.no_grad(), seeded(seed):
        sampler = Sampler(model, guide, arguments, given=given, source=source, **groups)
        covariates, their_dims = _names.covariates(model, arguments, sampler, constants)
        constants |= covariates
        names = their_dims | _names.dims(sampler, constants, dims)
        _names.check_coords(sampler, constants, names, coords, shape)
        notes = sampler.notes(strict=log_likelihood == "integrated")
        try:
            result = _collect(sampler, shape, samples_per_pass)
        except MixedDrawsError:
            sampler.restart()
            result = _collect(sampler, shape, samples_per_pass)
    weights = {}
    if groups["log_likelihood"] == "integrated":
        weights = sampler.integrated.diagnostics()
        for unit in sampler.integrated.units:
            _, pareto_k = weights.get(f"{unit.name}_pareto_k", ((), np.array(-np.inf)))
            result["log_likelihood"][unit.name] = with_spread(result["log_likelihood"][unit.name], pareto_k)
            names.setdefault(unit.name, list(unit.sizes))
    if sampler.observed:
        result["observed_data"] = sampler.observed
    if sample_stats:
        result["sample_stats"] = sample_stats
    if constants:
        result["constant_data"] = constants
    attrs = {"inference_library": "pyro", "inference_library_version": pyro.__version__, **attrs}
    of_stats = dict(stats_attrs or {}) if given else of_log_densities(sampler.log_densities)
    own = {"sample_stats": of_stats, "log_likelihood": notes.attrs}
    group_attrs = {group: attrs | own.get(group, {}) for group in result}
    for message in notes.warnings:
        warnings.warn(message, UserWarning, stacklevel=3)  # at the line that calls from_pyro_...
    coordinates = {
        name: as_numpy(value) if isinstance(value, torch.Tensor) else value for name, value in (coords or {}).items()
    }
    return _to_arviz(result, {**sampler.coords, **coordinates}, names, attrs, group_attrs, weights)


def _collect(sampler: Sampler, shape: tuple[int, int], samples_per_pass: int | None) -> dict[str, Arrays]:
    chunks: dict[str, dict[str, list[np.ndarray]]] = {}
    start = 0
    for size in sampler.passes(shape[0] * shape[1], samples_per_pass):
        for group, arrays in sampler.draw(start, size):
            for name, array in arrays.items():
                chunks.setdefault(group, {}).setdefault(name, []).append(finite(array, name, group))
        start += size
    result: dict[str, Arrays] = {}
    for group, parts in chunks.items():
        # Popped, so that no more than one variable is in memory twice.
        whole = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
        result[group] = {name: array.reshape(*shape, *array.shape[1:]) for name, array in whole.items()}
    return result


def _to_arviz(
    groups: dict[str, Arrays],
    coords: dict[str, Any],
    dims: dict[str, list[str]],
    attrs: dict[str, Any],
    group_attrs: dict[str, dict[str, Any]],
    weights: dict[str, tuple[tuple[str, ...], Any]],
) -> Any:
    import arviz  # here, because it takes seconds and nothing else in the package needs it
    import xarray

    from_dict: Any = arviz.from_dict
    own = {name: coords[name] for names, _ in weights.values() for name in names if name in coords}
    extra = xarray.Dataset(weights, coords=own, attrs=attrs)
    if arviz.__version__.startswith("0."):
        by_argument = {f"{group}_attrs": own for group, own in group_attrs.items()}
        fit = from_dict(**groups, coords=coords, dims=dims, attrs=attrs, **by_argument)
        if weights:
            fit.add_groups({"importance_sampling": extra}, warn_on_custom_groups=False)
        return fit
    fit = from_dict(groups, coords=coords, dims=dims, attrs={"/": attrs, **group_attrs})
    if weights:
        fit["importance_sampling"] = xarray.DataTree(extra)
    return fit


def _checked_log_likelihood(value: bool | str) -> str | None:
    if isinstance(value, str):
        return _checks.choice("log_likelihood", value, LOG_LIKELIHOODS)
    return "integrated" if _checks.boolean("log_likelihood", value) else None
