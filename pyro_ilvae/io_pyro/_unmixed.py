"""Whether draws that are made together depend on each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import Runs, Values, is_variable, sample_sites, site_log_prob, site_shape
from pyro_ilvae._programs.sites import is_delta, same_values

_PARTS = 16  # of the draws that are made together, to compare with


def free_values(runs: Runs, traces: Sequence[Trace], num_draws: int) -> dict[str, Tensor]:
    """Return the values of latent sites that do not follow from others, each of shape (draws, *nesting, *event)."""
    return {
        site["name"]: rows(runs, site["name"], site["value"], num_draws)
        for trace in traces
        for site in sample_sites(trace)
        if not (site["is_observed"] or is_delta(site) or "_enumerate_dim" in site["infer"])
    }


def rows(runs: Runs, name: str, value: Tensor, num_draws: int) -> Tensor:
    """Return a site's value in a run of ``num_draws`` draws, of shape (draws, *nesting, *event)."""
    value = runs.padded(torch.as_tensor(value), _single(runs, name)["fn"].event_dim)
    return value.expand(num_draws, *value.shape[1:])


def for_a_run(runs: Runs, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return values as a run of so many draws takes them: of one draw in the shape that the programs are written in."""
    return {
        name: value if len(value) > 1 else value.reshape(_single(runs, name)["value"].shape)
        for name, value in values.items()
    }


def unmixed(
    runs: Runs,
    run: Callable[[int, Values], Sequence[Trace]],
    together: Sequence[Trace],
    values: Mapping[str, Tensor],
    num_draws: int,
) -> bool:
    """Whether draws made ``together`` have the same log densities in other company: alone, or among a few of them.

    What a draw has from the others, such as a mean over them or a rank among them, changes with its company. The first
    and the last draw are made alone, and every draw among one in sixteen: what only few draws show, because they alone
    take a branch or depend on each other, is found unless these few stay together. ``run(num_draws, given)`` makes the
    traces at ``values`` of so many draws.
    """
    alone = [torch.tensor([0]), torch.tensor([num_draws - 1])]
    parts = [torch.arange(first, num_draws, _PARTS) for first in range(min(_PARTS, num_draws))]
    try:
        with torch.no_grad(), seeded(0), pyro.validation_enabled(True):
            for index in alone + parts if num_draws > _PARTS else parts:
                part = {name: value[index.to(value.device)] for name, value in values.items()}
                traces = run(len(index), for_a_run(runs, part))
                if not all(_alike(runs, *pair, index, num_draws) for pair in zip(together, traces, strict=True)):
                    return False
    except Exception:  # of a program that is written for one draw
        return False
    return True


def _alike(runs: Runs, together: Trace, part: Trace, index: Tensor, num_draws: int) -> bool:
    sites = zip(sample_sites(together), sample_sites(part), strict=True)
    enumerates = any("_enumerate_dim" in site["infer"] for site in sample_sites(together))
    for one, other in sites:
        if one["name"] != other["name"]:
            return False
        both = [runs.padded(site_log_prob(site), 0).movedim(-runs.nesting - 1, 0) for site in (one, other)]
        if not _close(both[0], both[1], index, num_draws):
            return False
        if is_variable(one) and is_delta(one) and not enumerates:
            shape = site_shape(_single(runs, one["name"]))
            if not _close(
                runs.spread(one["value"], shape, num_draws),
                runs.spread(other["value"], shape, len(index)),
                index,
                num_draws,
            ):
                return False
    return True


def _close(together: Tensor, part: Tensor, index: Tensor, num_draws: int) -> bool:
    if len(together) not in (1, num_draws) or len(part) not in (1, len(index)):
        return False
    if len(together) == num_draws:
        together = together[index.to(together.device)]
    return same_values(together, part)


def _single(runs: Runs, name: str) -> Any:
    """The site in a run of one draw."""
    return (runs.guide_trace if name in runs.guide_trace.nodes else runs.model_trace).nodes[name]
