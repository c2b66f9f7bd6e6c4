"""Guides that hold a value for each datum: whether a run takes the values of the data that it is about."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae._contexts import seeded
from pyro_ilvae._evaluation import modules_of
from pyro_ilvae._programs.arguments import Arguments
from pyro_ilvae._programs.sites import drawn, is_data, is_delta, sample_sites, site_log_prob

_RunAt = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Trace]  # from indices of plates, and values of sites


def check_own_values(
    guide: Callable[..., Any],
    traces: tuple[Trace, Trace],
    arguments: Arguments,
    *,
    indices: Mapping[str, Any],
    chosen: set[str],
    free: set[str],
    run_guide: _RunAt,
    run_model: _RunAt,
) -> None:
    """Raise for a guide whose values are picked by the indices of a plate, where nothing says the indices of the data.

    A plate over a part of its members is held at some ``indices``. They are the indices of the data if the model takes
    its data by them, or if the arguments hold them. Otherwise the first members of the plate stand for any batch.

    Args:
        guide: the guide.
        traces: traces of guide and model of one draw.
        arguments: what both are called with.
        indices: the indices that each plate is held at.
        chosen: the names of the plates for which a program has chosen the indices.
        free: the names of plates by whose indices the guide is known to pick no values; others are added here.
        run_guide: runs the guide at other indices, given values of its sites.
        run_model: runs the model likewise.
    """
    plates = _partial_plates(traces)
    _check_joint_guides(guide, plates)
    for name, full_size in plates.items():
        held = torch.as_tensor(indices[name])
        if (
            name in free
            or (name in chosen and not torch.equal(held, torch.arange(len(held), device=held.device)))
            or any(_is_index(value, held) for value in [*arguments.args, *arguments.kwargs.values()])
        ):
            continue
        others = {name: (held + len(held)) % full_size}
        site = _changed(run_guide, {name: held}, others, traces[0])
        if site is None:
            free.add(name)
        elif not _follows(run_model, {name: held}, others, drawn(traces[1])):
            raise ValueError(
                f"Expected the indices of the data in model_args, as model(x, index=...) passes them on to plate "
                f"'{name}', because the guide holds a value of site '{site}' for each of its {full_size} members, got "
                f"none: the first {len(held)} would stand for any batch, as of batch_size or of held-out data"
            )


def _partial_plates(traces: tuple[Trace, Trace]) -> dict[str, int]:
    """The full sizes of the plates in which a run has a part of the members."""
    return {
        frame.name: int(frame.full_size)
        for trace in traces
        for site in sample_sites(trace)
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.full_size is not None and frame.size < frame.full_size
    }


def _check_joint_guides(guide: Callable[..., Any], plates: Mapping[str, int]) -> None:
    for part in modules_of((guide,)) if plates else ():
        if isinstance(part, AutoContinuous) and part.prototype_trace is not None:
            for site in sample_sites(part.prototype_trace):
                held = [frame for frame in site["cond_indep_stack"] if frame.name in plates]
                if held:
                    raise ValueError(
                        f"Expected all members of plate '{held[0].name}', for which {type(part).__name__} draws site "
                        f"'{site['name']}' jointly, got {held[0].size} of {plates[held[0].name]}: its values are of no "
                        "members in particular"
                    )


def _is_index(value: Any, held: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.shape == held.shape and torch.equal(value.to(held), held)


def _changed(run: _RunAt, held: Mapping[str, Tensor], others: Mapping[str, Tensor], guide_trace: Trace) -> str | None:
    """The first site whose distribution in the guide is another at other indices; None if there is none."""
    deltas = {site["name"] for site in sample_sites(guide_trace) if is_delta(site)}
    values = {name: value for name, value in drawn(guide_trace).items() if name not in deltas}
    before, after = (_at(run, indices, values) for indices in (held, others))
    for name in [] if before is None or after is None else drawn(before):
        site, other = before.nodes[name], after.nodes.get(name)
        if other is None or not _same(site_log_prob(site), site_log_prob(other)):
            return name.removesuffix("_unconstrained")  # the auxiliary site of AutoNormal
        if not _same(site["value"], other["value"]):
            return name
    return None


def _follows(
    run: _RunAt, held: Mapping[str, Tensor], others: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> bool:
    """Whether the model observes other data at other indices."""
    before, after = (_at(run, indices, values) for indices in (held, others))
    if before is None or after is None:  # The data have no members with these indices.
        return True
    data = [site for site in sample_sites(before) if is_data(site)]
    return any(not _same(site["value"], after.nodes[site["name"]]["value"]) for site in data)


def _at(run: _RunAt, indices: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Any:
    try:
        with torch.no_grad(), seeded(0):
            return run(indices, values)
    except (RuntimeError, IndexError, ValueError):
        return None


def _same(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and torch.equal(value.nan_to_num(), other.nan_to_num())
