"""Checks of what a user passes to a conversion: the model's arguments, names of dimensions, coordinates, constants."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pyro_ilvae._programs import Arguments, Program
from pyro_ilvae.io_pyro._sampler import Arrays, Sampler

_COVARIATES = ("context", "offset")


def check_call(model: Program, arguments: Arguments) -> None:
    """Raise unless the model can be called with the arguments."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # of a callable that does not say what it takes
        return
    try:
        signature.bind(*arguments.args, **arguments.kwargs)
    except TypeError as error:
        raise TypeError(f"Expected model_args and model_kwargs that the model takes, got: {error}") from None


def constants_of(given: Mapping[str, Any] | None) -> Arrays:
    """Return copies of constant data as arrays."""
    result = {}
    for name, value in _mapping("constant_data", given).items():
        try:
            array = value.numpy(force=True).copy() if isinstance(value, torch.Tensor) else np.array(value)
        except ValueError as error:  # rows of different lengths
            raise TypeError(f"Expected constant_data[{name!r}] to be an array, got: {error}") from error
        if array.dtype == object and not all(isinstance(entry, str) for entry in array.flat):
            raise TypeError(
                f"Expected constant_data[{name!r}] to be an array of numbers or strings, got a {type(value).__name__}"
            )
        result[name] = array
    return result


def covariates(
    model: Program, arguments: Arguments, sampler: Sampler, constants: Arrays
) -> tuple[Arrays, dict[str, list[str]]]:
    """The arguments of the model that stand beside its data, and the names of their dimensions.

    These are a context and an offset of each datum, unless a constant or a site has that name.
    """
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
        bound = signature.bind(*arguments.args, **arguments.kwargs).arguments
    except (TypeError, ValueError):
        return {}, {}
    plates = {kept[0] for name in sampler.data if (kept := sampler.shapes[name].kept)}
    if len(plates) != 1:
        return {}, {}
    ((plate, size),) = plates
    found: Arrays = {}
    names: dict[str, list[str]] = {}
    for name in _COVARIATES:
        value = bound.get(name)
        shape = () if value is None else tuple(np.shape(value))
        if shape[:1] == (size,) and name not in constants and name not in sampler.shapes:
            found |= constants_of({name: value})
            names[name] = [str(plate), *(f"{name}_dim_{i}" for i in range(len(shape) - 1))]
    return found, names


def dims(sampler: Sampler, constants: Arrays, given: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
    """Return the names of the dimensions of all sites, and those that are given for constants."""
    given = _mapping("dims", given)
    if both := constants.keys() & sampler.shapes.keys():
        raise ValueError(f"Expected names in constant_data that no site of the model has, got {sorted(both)}")
    if unknown := given.keys() - sampler.shapes.keys() - constants.keys():
        raise ValueError(f"Expected dims for sites among {[*sampler.shapes, *constants]}, got {list(unknown)}")
    for name, own in given.items():
        if not _is_list(own) or not all(isinstance(entry, str) for entry in own) or len({*own}) != len(own):
            kind = f"dims of {'constant' if name in constants else 'site'} {name!r}"
            raise ValueError(f"Expected {kind} to be a list of different names, got {own!r}")
    for name in given.keys() & constants.keys():
        if len(given[name]) != constants[name].ndim:
            raise ValueError(
                f"Expected dims of constant {name!r} to be {constants[name].ndim} names, got {given[name]!r}"
            )
    own_names = {name: list(given[name]) for name in constants if name in given}
    return sampler.dims({name: names for name, names in given.items() if name not in constants}) | own_names


def check_coords(
    sampler: Sampler,
    constants: Arrays,
    names: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any] | None,
    shape: tuple[int, int],
) -> None:
    """Raise unless every dimension has one length, and coordinates are of dimensions that there are."""
    lengths = {"chain": shape[0], "draw": shape[1]}
    sizes = {name: [size for _, size in site.kept] + list(site.event) for name, site in sampler.shapes.items()}
    sizes |= {name: list(array.shape) for name, array in constants.items()}
    for name, own in sizes.items():
        for dim, size in zip(names.get(name, [f"{name}_dim_{i}" for i in range(len(own))]), own, strict=True):
            if lengths.setdefault(dim, size) != size:
                raise ValueError(
                    f"Expected dims of one length for each name, got {lengths[dim]} and {size} for {dim!r}"
                )
    for dim, values in _mapping("coords", coords).items():
        if dim not in lengths:
            raise ValueError(f"Expected coords for dimensions among {[*lengths]}, got {dim!r}")
        try:
            found = np.shape(values.numpy(force=True) if isinstance(values, torch.Tensor) else values)
        except ValueError:  # rows of different lengths
            found = None
        if isinstance(values, str) or found != (lengths[dim],):
            raise ValueError(f"Expected coords[{dim!r}] to be {lengths[dim]} values, got {values!r}")


def _mapping(argument: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected {argument} to be a mapping from names, got a {type(value).__name__}")
    if wrong := [name for name in value if not isinstance(name, str)]:
        raise TypeError(f"Expected {argument} to be a mapping from names, got the name {wrong[0]!r}")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
