"""Traces of a guide and of the model it proposes for, over batches of data that stand in one plate."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._modes import evaluation_mode

Data: TypeAlias = Tensor | tuple[Tensor, ...]
Stochastic: TypeAlias = Callable[..., Any]


def data_batches(data: Data, batch_size: int | None) -> Iterator[tuple[Tensor, ...]]:
    """The arguments of model and guide, ``batch_size`` data at a time."""
    tensors = data if isinstance(data, tuple) else (data,)
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in tensors):
        raise ValueError(f"Expected data as a tensor or a tuple of tensors, got {type(data).__name__}")
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"Expected data tensors of one length >= 1, got lengths {[len(tensor) for tensor in tensors]}")
    size = _checks.positive_int("batch_size", batch_size) if batch_size is not None else len(tensors[0])
    yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)


def guide_and_model_trace(
    model: Stochastic, guide: Stochastic, args: tuple[Tensor, ...], num_particles: int = 1
) -> tuple[Trace, Trace]:
    """One trace of the guide and the model replayed against it, with ``num_particles`` draws along dimension -2."""

    def run(fn: Stochastic) -> Stochastic:
        if num_particles == 1:
            return fn
        particles = pyro.plate("_num_particles_diagnostics", num_particles, dim=-2)
        return particles(fn)  # type: ignore[no-any-return]

    # Blocked, so that nothing around the call (a trace, a scale, an annealing) sees or changes the sites.
    with torch.no_grad(), poutine.block(), evaluation_mode(model, guide):
        guide_trace = poutine.trace(run(guide)).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(run(model), trace=guide_trace)).get_trace(*args)
    return prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)


def local_site(trace: Trace, name: str, num_data: int, source: str) -> Any:
    """The site ``name`` of a trace, checked to hold one value for each datum."""
    latent = [node for node, site in trace.nodes.items() if site["type"] == "sample" and not site["is_observed"]]
    if name not in latent:
        raise ValueError(f"Expected site to be a latent site of the {source}, one of {latent}, got {name!r}")
    site: Any = trace.nodes[name]
    check_local(site, num_data, source)
    return site


def check_local(site: Any, num_data: int, source: str) -> None:
    """Raise unless the site stands in a plate of the data, as dimension -1 of its batch shape."""
    if not any(frame.dim == -1 and frame.size == num_data for frame in site["cond_indep_stack"]):
        raise ValueError(
            f"Expected site '{site['name']}' of the {source} in a plate over the {num_data} data as its rightmost one, "
            f"got plates {[(frame.name, frame.size) for frame in site['cond_indep_stack']]}"
        )
