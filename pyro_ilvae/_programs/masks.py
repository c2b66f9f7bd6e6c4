"""The masks of latent sites: a guide's terms count where the model has a prior, and nowhere else."""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine import Trace
from torch import Tensor

from pyro_ilvae._evaluation import modules_of
from pyro_ilvae._programs.joint_draws import Part
from pyro_ilvae._programs.sites import drawn, is_delta, split_mask

_AUXILIARY = "_unconstrained"  # after the name of a site, as AutoNormal names the draw that it transforms


def move_masks(traces: Iterable[Trace]) -> None:
    """Move the masks of distributions, as of ``fn.mask(...)``, to the latent sites, where ``poutine.mask`` has them."""
    for trace in traces:
        for name in drawn(trace):
            site: Any = trace.nodes[name]
            site["fn"], site["mask"] = split_mask(site)


def other_masks(guide_trace: Trace, model_trace: Trace) -> list[str]:
    """Return the latent sites that the model masks where the guide does not, whose masks have been moved.

    Raises:
        ValueError: for a site that the guide masks where the model does not, and for other masks within events.
    """
    others = []
    own, prior = (drawn(trace) for trace in (guide_trace, model_trace))
    for name in [name for name in prior if name in own]:
        sites: list[Any] = [trace.nodes[name] for trace in (guide_trace, model_trace)]
        within = [within_event(site["fn"]) for site in sites]
        if not _equal(*within):
            raise ValueError(
                f"Expected the same mask of entries of site '{name}' in model and guide, got another in the guide: "
                "mask whole events in the model, or the same entries in both"
            )
        masks = [torch.as_tensor(True if site["mask"] is None else site["mask"]).cpu() for site in sites]
        if (~masks[0] & masks[1]).any():
            raise ValueError(
                f"Expected the guide to mask site '{name}' only where the model does, got a mask of "
                f"{int((~masks[0] & masks[1]).sum())} others: its draws there have a prior and no density"
            )
        if (masks[0] & ~masks[1]).any():
            others.append(name)
    return others


def mask_guide(guide: Callable[..., Any], guide_trace: Trace, model_trace: Trace, names: list[str]) -> None:
    """Give sites of the guide the masks of the model: there is no prior of what is masked, and nothing to draw."""
    nodes: Any = guide_trace.nodes
    joint = []
    for name in [name for name in names if name in nodes]:
        mask = torch.as_tensor(model_trace.nodes[name]["mask"])
        nodes[name]["mask"] = mask
        if f"{name}{_AUXILIARY}" in nodes:
            nodes[f"{name}{_AUXILIARY}"]["mask"] = mask
        elif is_delta(nodes[name]):
            joint.append(name)
    if not joint:
        return
    for name, node in nodes.items():
        if node["type"] == "sample" and node["infer"].get("is_auxiliary") and not name.endswith(_AUXILIARY):
            positions = _positions(guide, name, {site: nodes[site]["mask"] for site in joint})
            node["fn"] = Part(node["fn"], positions, f"Expected a Gaussian where sites {joint} are masked")


def _positions(guide: Callable[..., Any], name: str, masks: dict[str, Tensor]) -> Tensor | None:
    """The positions in the joint draw of a guide that are not masked; None where they are not known."""
    for part in modules_of((guide,)):
        if not isinstance(part, AutoContinuous) or name != f"_{part._pyro_name}_latent":
            continue
        kept = []
        for site, index in part._unpack_latent(torch.arange(part.latent_dim)):
            if (mask := masks.get(site["name"])) is not None:
                event_dim = index.dim() - len(site["fn"].batch_shape)
                if mask.dim() > index.dim() - event_dim:  # with a dimension for the draws, which may have to agree
                    flat = mask.reshape(-1, *mask.shape[mask.dim() - index.dim() + event_dim :])
                    if not (flat == flat[:1]).all():
                        return None
                    mask = flat[0]
                index = index[mask.cpu().reshape(mask.shape + (1,) * event_dim).expand_as(index)]
            kept.append(index.flatten())
        return torch.cat(kept)
    return None


def within_event(fn: Any) -> Any:
    """The mask of entries of events, which a distribution holds inside its event dimensions; None without one."""
    masks = []
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append(torch.as_tensor(fn._mask).cpu())
        fn = fn.base_dist
    return functools.reduce(operator.and_, masks) if masks else None


def _equal(own: Any, prior: Any) -> bool:
    if own is None or prior is None:
        return own is prior
    try:
        return torch.equal(*torch.broadcast_tensors(own, prior))
    except RuntimeError:
        return False
