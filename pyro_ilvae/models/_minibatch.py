"""The indices of a batch: checks of those that a caller gives, and of those at which a guide has drawn."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.poutine import Trace
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.distributions import innermost
from pyro_ilvae.models._held_values import are_held, are_selected, has_graph, parameters, seem_held

PLATE = "data"

_REMEDY = (
    "pass index=, the numbers of the data of this batch in the data set, to model and guide, and use them in the "
    "plate of the guide, as AutoNormal(vae.model, create_plates=vae.create_plates) does"
)


def checked_index(index: Any, x: Tensor | None, data_size: int | None) -> Tensor | None:
    """The numbers of the batch's data in the data set, int64 of shape (len(x),); None if they are not given."""
    if index is None:
        return None
    if x is None or data_size is None:
        missing = "x" if x is None else "data_size"
        raise ValueError(f"Expected index=None without {missing}, got index: it numbers the data of a data set")
    index = _checks.tensor("index", index)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"Expected index to hold ints, got {index.dtype}")
    if index.shape != (len(x),):
        raise ValueError(f"Expected index of shape ({len(x)},), one number for each datum, got {tuple(index.shape)}")
    index = index.to(x.device, torch.int64)
    ordered = index.sort().values
    if ordered[0] < 0 or ordered[-1] >= data_size:
        raise ValueError(
            f"Expected index from 0 to {data_size - 1}, below data_size, got {int(ordered[0])} to {int(ordered[-1])}"
        )
    if (ordered[1:] == ordered[:-1]).any():
        raise ValueError("Expected index without repetitions, got some number more than once")
    return index


def _in_order(index: Tensor | None) -> bool:
    return index is None or torch.equal(index, torch.arange(len(index), device=index.device))


def refuse_other_order(index: Tensor | None, size: int) -> None:
    """Raise if ``index`` holds all data in another order: Pyro gives a plate that is not subsampled its own order."""
    if index is not None and len(index) == size and not _in_order(index):
        raise ValueError(
            f"Expected index = 0 ... {size - 1} for a batch of all {size} data with a guide that holds values for each "
            "datum, got another order: Pyro's plates do not reorder these values"
        )


def check_replayed(model: nn.Module, num_data: int, size: int, index: Tensor | None) -> None:
    """Raise if a guide has drawn the z with which the model is replayed for other data than the model is given.

    Args:
        model: the model, whose own parameters hold no values of single data.
        num_data: the number of data in the batch.
        size: the number of data in the data set.
        index: the numbers of the batch's data, if they are known.
    """
    for handler in _PYRO_STACK:
        if isinstance(handler, AutoMessenger):  # It gives z its distribution while the model runs.
            if index is None and num_data < size:
                raise ValueError(
                    f"Expected index for {num_data} of {size} data at site 'x' and a guide with values for each datum, "
                    "got None: pass index=, the numbers of the data of this batch in the data set"
                )
            refuse_other_order(index, size)
        if isinstance(handler, ReplayMessenger) and handler.trace is not None:
            for site in getattr(model, "latent_sites", ("z",)):
                if site in handler.trace.nodes:
                    _check_trace(model, handler.trace, site, num_data, size, index)


def _check_trace(model: nn.Module, trace: Trace, site: str, num_data: int, size: int, index: Tensor | None) -> None:
    frames = [frame for frame in trace.nodes[site]["cond_indep_stack"] if frame.vectorized]
    by_name = {frame.name: frame for frame in frames}
    frame = by_name.get(PLATE) or next((frame for frame in frames if frame.full_size != frame.size), None)
    if frame is None:
        if num_data < size:
            raise ValueError(
                f"Expected a guide that draws {site} in a plate '{PLATE}' of size {size}, as the model, got one that "
                f"draws it outside a plate, for a batch of {num_data} data: {_REMEDY}"
            )
        refuse_other_order(index, size)
        return
    drawn_for, of = frame.size, frame.full_size or frame.size
    if (drawn_for, of) != (num_data, size):
        raise ValueError(
            f"Expected a guide that draws {site} for {num_data} of {size} data in the plate '{PLATE}', as the model, "
            f"got one that draws it for {drawn_for} of {of}: {_REMEDY}"
        )
    if frame.name not in trace.nodes:
        return
    drawn_at = torch.as_tensor(trace.nodes[frame.name]["value"])
    own = index if index is not None else torch.arange(num_data, device=drawn_at.device)
    agree = drawn_at is own or torch.equal(drawn_at.to(own.device), own)
    if num_data == size and agree:
        if not _in_order(index) and _may_hold_values(model, trace, site, frame, size, drawn_at):
            refuse_other_order(index, size)
        return
    # A guide that computes z from the data may draw any indices, because it does not use them.
    if not agree:
        wrong = _may_hold_values(model, trace, site, frame, size, drawn_at)
    else:
        wrong = index is None and (
            _holds_values(trace, frame, size) or (has_graph(trace, site) and are_held(trace, site, frame))
        )
    if wrong:
        own_data = "whose numbers it was not told" if index is None else f"numbers {own[:3].tolist()} ..."
        raise ValueError(
            f"Expected a guide that draws {site} for the data at site 'x', {own_data}, got one that draws it for "
            f"numbers {drawn_at[:3].tolist()} ... of the data set: {_REMEDY}"
        )
    if _holds_values_of_positions(trace, site, frame, size) or (
        has_graph(trace, site) and are_held(trace, site, frame, unselected=True)
    ):
        raise ValueError(
            f"Expected a guide with values for each of {size} data at site '{site}', got one with values for the "
            f"{num_data} positions of a batch: use AutoNormal or AutoDelta, or batches of all data"
        )


def _holds_values(trace: Trace, frame: Any, size: int) -> bool:
    """Whether a parameter of the guide is indexed by the plate."""
    for site, value in parameters(trace):
        event_dim = site["kwargs"].get("event_dim")
        if event_dim is not None and any(other.name == frame.name for other in site["cond_indep_stack"]):
            dim = frame.dim - event_dim
            if value.dim() >= -dim and value.shape[dim] == size:
                return True
    return False


def _may_hold_values(model: nn.Module, trace: Trace, site: str, frame: Any, size: int, drawn_at: Tensor) -> bool:
    """Whether a guide has values for each datum of the data set, as far as can be seen, or is an AutoGuide of Pyro."""
    if _auxiliary(trace) or _holds_values(trace, frame, size):
        return True
    if not has_graph(trace, site):
        return seem_held(trace, site, frame, size, model)
    return are_held(trace, site, frame) or are_selected(trace, site, drawn_at, size)


def _holds_values_of_positions(trace: Trace, site: str, frame: Any, size: int) -> bool:
    """Whether an AutoGuide takes z from a site outside of the plate, as large as the first batch."""
    outside = [site for site in _auxiliary(trace) if all(f.name != frame.name for f in site["cond_indep_stack"])]
    if not outside or not isinstance(innermost(trace.nodes[site]["fn"]), dist.Delta):
        return False
    return len(outside) == len(_auxiliary(trace)) and not any(size in value.shape for _, value in parameters(trace))


def _auxiliary(trace: Trace) -> list[Any]:
    return [node for node in trace.nodes.values() if (node.get("infer") or {}).get("is_auxiliary")]
