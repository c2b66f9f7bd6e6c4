"""Whether a model and its guide agree on the sites that both draw."""

from typing import Any

import torch
from pyro.poutine import Trace

from pyro_ilvae._programs.sites import drawn, is_data, sample_sites


def check_match(guide_trace: Trace, model_trace: Trace) -> None:
    """Raise unless model and guide agree on the shapes of their common sites, as SVI does.

    Densities of other shapes broadcast, and their sums are then of no distribution.
    """
    nodes: dict[str, Any] = dict(guide_trace.nodes)
    latent = drawn(model_trace)
    for site in sample_sites(model_trace):
        name = site["name"]
        if name in latent and name in nodes:
            _check_shapes(name, nodes[name]["fn"], site["fn"])
        if is_data(site):
            _check_datum(site)


def _check_shapes(name: str, own: Any, prior: Any) -> None:
    if own.event_dim != prior.event_dim:
        raise ValueError(
            f"Expected model and guide to agree on the number of event dimensions of site '{name}', got "
            f"{prior.event_dim} in the model and {own.event_dim} in the guide: .to_event(...) declares them"
        )
    for part in ("event", "batch"):
        shapes = [_without_padding(getattr(fn, f"{part}_shape")) for fn in (prior, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Expected model and guide to agree on the {part} shape of site '{name}', got {shapes[0]} in the "
                f"model and {shapes[1]} in the guide"
            )


def _without_padding(shape: torch.Size) -> tuple[int, ...]:
    """A shape without its leading ones."""
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])


def _check_datum(site: Any) -> None:
    """Raise if a datum has another shape than its distribution: one number would stand for several."""
    shape, event = torch.as_tensor(site["value"]).shape, site["fn"].event_shape
    own = shape[max(0, len(shape) - len(event)) :]
    # Some distributions, such as those of time series, have a 1 in their event shape for any length.
    if len(own) < len(event) or any(size != expected != 1 for size, expected in zip(own, event, strict=True)):
        raise ValueError(f"Expected values of event shape {tuple(event)} at site '{site['name']}', got {tuple(shape)}")
