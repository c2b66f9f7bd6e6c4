"""Log densities of sites of a trace, with enumerated sites summed out and plates summed over."""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae._programs import Runs, is_deterministic, sample_sites, site_log_prob


def with_density(trace: Trace, observed_elsewhere: Collection[str] = ()) -> list[Any]:
    """Return the sites that add to the density of a trace; a guide may run the model with what that observes."""
    return [
        site
        for site in sample_sites(trace)
        if not is_deterministic(site) and not (site["is_observed"] and site["name"] in observed_elsewhere)
    ]


def log_density(
    runs: Runs, trace: Trace, sites: Iterable[Any], num_draws: int, kept: Mapping[str, int] | None = None
) -> Tensor:
    """Return the log density of sites of a run of ``num_draws`` draws, of shape (num_draws, *kept).

    Enumerated sites are summed out, and all plates are summed over but those ``kept``, which come with their sizes and
    have all of the sites in them. Scales do not enter; masked elements add nothing.
    """
    sites = list(sites)
    return _summed(runs, trace, [(site, _expanded(site, site_log_prob(site))) for site in sites], num_draws, kept or {})


def masked_out(runs: Runs, sites: Iterable[Any], kept: Mapping[str, int]) -> Tensor | None:
    """Return whether masks leave no observed site of a datum, of shape (*kept); None if some site has no mask."""
    observed = [site for site in sites if site["is_observed"]]
    if not observed or any(site["mask"] is None for site in observed):
        return None
    left = []
    for site in observed:
        mask = torch.as_tensor(site["mask"], dtype=torch.float64, device=torch.as_tensor(site["value"]).device)
        shape = torch.broadcast_shapes(mask.shape, site["fn"].batch_shape)
        left.append((site, _expanded(site, mask.expand(shape))))
    return _summed(runs, Trace(), left, 1, kept)[0] == 0


def _summed(
    runs: Runs, trace: Trace, terms: list[tuple[Any, Tensor]], num_draws: int, kept: Mapping[str, int]
) -> Tensor:
    if any(term.dim() > runs.nesting + 1 for _, term in terms):
        total = _contracted(trace, terms, list(kept))
    else:
        dims = {frame.name: frame.dim for site, _ in terms for frame in site["cond_indep_stack"] if frame.name in kept}
        others = [dim for dim in range(-runs.nesting, 0) if dim not in dims.values()]
        total = torch.zeros(())
        for _, term in terms:
            term = runs.padded(term, 0)
            total = total + (term.sum(others, keepdim=True) if others else term)
        if total.dim():
            total = total.permute(0, *(dims[name] for name in kept), *others).reshape(len(total), *kept.values())
    return total.expand(num_draws, *kept.values())


def _expanded(site: Any, term: Tensor) -> Tensor:
    """A term of the site's batch shape, with the full size of every plate."""
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    term = term.reshape((1,) * (max((-dim for dim in sizes), default=0) - term.dim()) + term.shape)
    return term.expand([sizes.get(dim, term.shape[dim]) for dim in range(-term.dim(), 0)])


def _contracted(trace: Trace, terms: list[tuple[Any, Tensor]], order: list[str]) -> Tensor:
    trace.symbolize_dims()
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    plates: dict[str, str] = {}
    sums = set()
    for site, term in terms:
        symbol_of = site["infer"]["_dim_to_symbol"]
        own = {frame.name: symbol_of[frame.dim] for frame in site["cond_indep_stack"] if frame.vectorized}
        plates |= own
        sums |= set(symbol_of.values()) - set(own.values())
        factors.setdefault(frozenset(own.values()), []).append(packed.pack(term, symbol_of))
    symbols = [plates.get(name, "") for name in ("_draws", *order)]  # a run of one draw has no plate of draws
    total = torch.zeros(())
    for results in contract_tensor_tree(factors, sums).values():
        for term in results:
            names: str = term._pyro_dims  # type: ignore[attr-defined]
            if others := [i for i, symbol in enumerate(names) if symbol not in symbols]:
                term = term.sum(others)
            left = [symbol for symbol in names if symbol in symbols]
            term = term.permute([left.index(symbol) for symbol in symbols if symbol in left])
            total = total + term[tuple(slice(None) if symbol in left else None for symbol in symbols)]
    return total
