"""From draws to ArviZ's containers: ``InferenceData`` of ArviZ 0.x or ``xarray.DataTree`` of ArviZ 1.x."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch

from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import Arguments, ModelArgs, Program, Values
from pyro_ilvae.io_pyro._sampler import Arrays, MixedDrawsError, Sampler, finite


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
    **groups: bool,
) -> Any:
    """Return all groups of (chain, draw) = ``shape`` posterior draws; see ``Sampler`` for ``given`` and ``source``."""
    arguments = Arguments.of(model_args, model_kwargs)
    constants = {
        name: value.numpy(force=True).copy() if isinstance(value, torch.Tensor) else np.array(value)
        for name, value in (constant_data or {}).items()
    }
    with torch.no_grad(), seeded(seed):
        sampler = Sampler(model, guide, arguments, given=given, source=source, **groups)
        names = _dims(sampler, constants, dims or {})
        try:
            result = _collect(sampler, shape, samples_per_pass)
        except MixedDrawsError:
            sampler.runs.known_to_vectorize = False
            result = _collect(sampler, shape, samples_per_pass)
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
    if both := constants.keys() & sampler.shapes.keys():
        raise ValueError(f"Expected names in constant_data that no site of the model has, got {sorted(both)}")
    if unknown := given.keys() - sampler.shapes.keys() - constants.keys():
        raise ValueError(f"Expected dims for sites among {[*sampler.shapes, *constants]}, got {list(unknown)}")
    for name in given.keys() & constants.keys():
        if isinstance(given[name], str) or len(given[name]) != constants[name].ndim:
            raise ValueError(
                f"Expected dims of constant {name!r} to be {constants[name].ndim} names, got {given[name]!r}"
            )
    own = {name: list(given[name]) for name in constants if name in given}
    return sampler.dims({name: names for name, names in given.items() if name not in constants}) | own


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
) -> Any:
    import arviz  # here, because it takes seconds and nothing else in the package needs it

    from_dict: Any = arviz.from_dict
    if arviz.__version__.startswith("0."):
        by_argument = {f"{group}_attrs": own for group, own in group_attrs.items()}
        return from_dict(**groups, coords=coords, dims=dims, attrs=attrs, **by_argument)
    return from_dict(groups, coords=coords, dims=dims, attrs={"/": attrs, **group_attrs})
