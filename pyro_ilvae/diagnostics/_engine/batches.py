"""A model and its guide on the data, a batch at a time, from what they are called with."""

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import pyro.distributions as dist

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import Arguments, ArgumentsInBatches, ModelArgs, Program, Runs, are_batches
from pyro_ilvae.diagnostics._engine.batch import Batch, without_deterministic
from pyro_ilvae.diagnostics._engine.calls import check_programs, naming_arguments
from pyro_ilvae.diagnostics._engine.data_plate import plate_over_data


def data_arguments(
    model: Program,
    guide: Program,
    model_args: ModelArgs,
    model_kwargs: Mapping[str, Any] | None,
    plate: str | None,
    batch_size: int | None = None,
    *,
    try_out: bool = True,
) -> Arguments | ArgumentsInBatches:
    """Return what model and guide are called with, and the number of data, checked; for an iterable, of each batch.

    The number is the size of :func:`plate_over_data`, or without such a plate the first dimension of the first tensor.
    If all tensors agree on their first dimension and model and guide are not to be tried out, it is that dimension, and
    a ``Batch`` finds out where it is not right.
    """
    check_programs(model, guide)
    if plate is not None and not isinstance(plate, str):
        raise TypeError(f"Expected plate to be the name of a plate, got {plate!r}")
    if are_batches(model_args):
        return ArgumentsInBatches(
            cast(Iterable[Any], model_args),
            model_kwargs,
            lambda args, kwargs: _of_call(model, guide, Arguments.of(args, kwargs), plate, batch_size, False),
        )
    return _of_call(model, guide, Arguments.of(model_args, model_kwargs), plate, batch_size, try_out)


def _of_call(
    model: Program, guide: Program, arguments: Arguments, plate: str | None, batch_size: int | None, try_out: bool
) -> Arguments:
    if len(arguments.sizes) == 1 and not try_out:
        return arguments
    part = next(arguments.batches(batch_size)) if len(arguments.sizes) == 1 else arguments
    if not arguments.sizes:
        arguments.check_others(None)
    # With a seed, so that no draw of the caller's is used up, and without the checks of densities, which come later.
    with seeded(0), dist.validation_enabled(False), naming_arguments(any_error=not arguments.sizes):
        runs = Runs(model, guide, part)
    traces = without_deterministic(runs.guide_trace, runs.model_trace)
    found = plate_over_data(*traces, part, plate, whole=part is arguments)
    return arguments if found is None or [found[1]] == part.sizes else arguments._replace(size=found[1])


def data_batches(
    model: Program,
    guide: Program,
    model_args: ModelArgs,
    model_kwargs: Mapping[str, Any] | None,
    batch_size: int | None,
    plate: str | None,
) -> Iterator[Batch]:
    """Yield model and guide on the data, ``batch_size`` at a time, from what they are called with."""
    arguments = data_arguments(model, guide, model_args, model_kwargs, plate, batch_size, try_out=False)
    yield from batches(model, guide, arguments, batch_size, plate)


def batches(
    model: Program,
    guide: Program,
    arguments: Arguments | ArgumentsInBatches,
    batch_size: int | None,
    plate: str | None = None,
) -> Iterator[Batch]:
    """Yield model and guide on ``batch_size`` data at a time."""
    if batch_size is not None:
        _checks.positive_int("batch_size", batch_size)
    known: dict[int, tuple[bool | None, dict[int, int]]] = {}
    free_plates: dict[tuple[int, ...], set[str]] = {}  # by the sizes of the tensors
    compared: dict[int, int] = {}  # batches by their number of data
    before: list[Any] = []
    for part in arguments.batches(batch_size):
        with naming_arguments():
            free = free_plates.setdefault(tuple(part.sizes), set())
            batch = Batch(model, guide, part, plate, whole=part is arguments, free_plates=free)
        batch.from_loader = isinstance(arguments, ArgumentsInBatches)
        # The first batch decides: the last batch can be as small as another plate.
        plate = batch.data_plate
        batch.runs.known_to_vectorize, batch.bytes_by_draws = known.get(batch.num_data, (None, {}))
        now = [site["value"] for site in batch.observed]
        if before and len(now) == len(before) and all(map(operator.is_, now, before)):
            raise ValueError(
                "Expected the data in model_args, of which batch_size takes a part, got the same each time"
            )
        before = now
        number = compared.get(batch.num_data, 0)
        compared[batch.num_data] = number + 1
        if number & (number - 1):  # The batches 1, 2, 3, 5, 9 ... are compared: other data can take other branches.
            batch.trust()
        yield batch
        known[batch.num_data] = batch.runs.known_to_vectorize, batch.bytes_by_draws
