"""From draws to ArviZ's containers: ``InferenceData`` of ArviZ 0.x or ``xarray.DataTree`` of ArviZ 1.x."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.io_pyro._sampler import Arrays, Function, Latents, Sampler
from pyro_ilvae.io_pyro._sites import finite


def convert(
    model: Function,
    latents: Latents,
    source: str,
    *,
    modules: Sequence[Function],
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
    shape: tuple[int, int],
    batch_size: int,
    seed: int | None,
    coords: Mapping[str, Any] | None,
    dims: Mapping[str, Sequence[str]] | None,
    constant_data: Mapping[str, Any] | None,
    sample_stats: Arrays | None = None,
    stats_attrs: Mapping[str, Any] | None = None,
    attrs: dict[str, Any],
    **groups: bool,
) -> Any:
    """Everything that the posterior draws of ``latents`` (see ``Sampler``) say, of shape (chain, draw) = ``shape``."""
    if not isinstance(model_args, tuple):
        raise TypeError(f"Expected model_args to be a tuple, got {type(model_args).__name__}")
    _checks.positive_int("batch_size", batch_size)
    constants = {
        name: value.numpy(force=True).copy() if isinstance(value, torch.Tensor) else np.array(value)
        for name, value in (constant_data or {}).items()
    }
    with torch.no_grad(), evaluation_mode(*modules), seeded(seed):
        sampler = Sampler(model, latents, source, model_args, dict(model_kwargs or {}))
        names = _dims(sampler, constants, dims or {})
        result = _collect(sampler, shape, batch_size, **groups)
    if sampler.observed:
        result["observed_data"] = sampler.observed
    if sample_stats:
        result["sample_stats"] = sample_stats
    if constants:
        result["constant_data"] = constants
    attrs = {"inference_library": "pyro", "inference_library_version": pyro.__version__, **attrs}
    group_attrs = {group: attrs | (dict(stats_attrs or {}) if group == "sample_stats" else {}) for group in result}
    return _to_arviz(result, {**sampler.coords, **(coords or {})}, names, attrs, group_attrs)


def _dims(sampler: Sampler, constants: Arrays, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    if both := constants.keys() & sampler.sites.keys():
        raise ValueError(f"Expected names in constant_data that no site of the model has, got {sorted(both)}")
    if unknown := given.keys() - sampler.sites.keys() - constants.keys():
        raise ValueError(f"Expected dims for sites among {[*sampler.sites, *constants]}, got {list(unknown)}")
    for name in given.keys() & constants.keys():
        if isinstance(given[name], str) or len(given[name]) != constants[name].ndim:
            raise ValueError(
                f"Expected dims of constant {name!r} to be {constants[name].ndim} names, got {given[name]!r}"
            )
    own = {name: list(given[name]) for name in constants if name in given}
    return sampler.dims({name: names for name, names in given.items() if name not in constants}) | own


def _collect(sampler: Sampler, shape: tuple[int, int], batch_size: int, **groups: bool) -> dict[str, Arrays]:
    total = shape[0] * shape[1]
    chunks: dict[str, dict[str, list[np.ndarray]]] = {}
    for start in range(0, total, batch_size):
        for group, arrays in sampler.draw(start, min(batch_size, total - start), **groups):
            for name, array in arrays.items():
                chunks.setdefault(group, {}).setdefault(name, []).append(finite(array, name, group))
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
) -> Any:
    import arviz  # here, because it takes seconds and nothing else in the package needs it

    from_dict: Any = arviz.from_dict
    if arviz.__version__.startswith("0."):
        by_argument = {f"{group}_attrs": own for group, own in group_attrs.items()}
        return from_dict(**groups, coords=coords, dims=dims, attrs=attrs, **by_argument)
    return from_dict(groups, coords=coords, dims=dims, attrs={"/": attrs, **group_attrs})
