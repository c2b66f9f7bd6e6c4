"""The sites of a trace: their kinds, their shapes and their log densities."""

import math
from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae.distributions import innermost


def sample_sites(trace: Trace) -> list[Any]:
    """Return the sites of a trace, without parameters and the indices of plates."""
    return [site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]


def drawn(trace: Trace) -> dict[str, Tensor]:
    """Return the values of the sites that are not observed."""
    return {site["name"]: site["value"] for site in sample_sites(trace) if not site["is_observed"]}


def is_delta(site: Any) -> bool:
    """Whether the site has one possible value, which follows from other sites."""
    return isinstance(innermost(site["fn"]), dist.Delta)


def is_deterministic(site: Any) -> bool:
    """Whether the site is a deterministic statement, which has no density."""
    return bool(site["infer"].get("_deterministic"))


def is_data(site: Any) -> bool:
    """Whether the site is observed, and neither deterministic nor a reparametrization."""
    # poutine.reparam observes a site at the value that it computes, under a Delta distribution, as a deterministic
    # statement does, but leaves no mark.
    return bool(site["is_observed"]) and not is_delta(site)


def is_variable(site: Any) -> bool:
    """Whether a node of a trace is a site with a value: neither a parameter nor a plate nor a factor statement."""
    # A factor statement is an observed site whose value is empty.
    return site["type"] == "sample" and not (site_is_subsample(site) or isinstance(site["fn"], dist.Unit))


def split_mask(site: Any) -> tuple[Any, Any]:
    """Return the distribution of a site without masks, and its mask; None if it has none.

    A mask of some entries of events stays in the distribution.
    """
    fn, own = _split(site["fn"])
    if own is None or site["mask"] is None:
        return fn, site["mask"] if own is None else own
    return fn, torch.as_tensor(site["mask"], device=getattr(own, "device", None)) & torch.as_tensor(own)


def _split(fn: Any) -> tuple[Any, Any]:
    if isinstance(fn, dist.MaskedDistribution):
        base, inner = _split(fn.base_dist)
        return base, fn._mask if inner is None else torch.as_tensor(inner) & torch.as_tensor(fn._mask)
    if isinstance(fn, torch.distributions.Independent):
        base, inner = _split(fn.base_dist)
        size = fn.reinterpreted_batch_ndims
        if isinstance(inner, Tensor) and inner.dim() and size:
            entries = inner.expand(base.batch_shape).flatten(-size)
            if not torch.equal(entries.all(-1), entries.any(-1)):
                return fn, None
            inner = entries.all(-1)
        return (fn, None) if inner is None else (base.to_event(size), inner)
    return fn, None


def site_log_prob(site: Any) -> Tensor:
    """Return the log density of a site's value, without scales, of the site's batch shape; 0 where it is masked."""
    if is_deterministic(site):  # which has none; Pyro's Delta would compare all draws of the value with each other
        return torch.zeros((), device=torch.as_tensor(site["value"]).device)
    fn, mask = split_mask(site)
    try:
        with evaluation_mode(fn):  # of the modules in the transforms of a flow
            log_prob = fn.log_prob(site["value"])
    except ValueError as error:
        raise ValueError(f"Expected a value in the support at site '{site['name']}', got another: {error}") from error
    except RuntimeError as error:
        if isinstance(error, NotImplementedError | torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"Expected a value of shape {tuple(site['fn'].shape())} at site '{site['name']}', got shape "
            f"{tuple(site['value'].shape)}: {error}"
        ) from error
    masked: Tensor = scale_and_mask(log_prob, mask=mask)
    if mask is not None and "_enumerate_dim" in site["infer"]:
        # Where it is masked, the probabilities of all its values have to add up to one.
        size = len(fn.enumerate_support(expand=False))
        return masked - math.log(size) * ~torch.as_tensor(mask, device=masked.device)
    return masked


def same_draws(together: Tensor, alone: Tensor) -> bool:
    """Whether values with draws along the first dimension are equal up to rounding; one value may stand for all."""
    return len(together) in (1, len(alone)) and same_values(together, alone)


def same_values(value: Tensor, other: Tensor) -> bool:
    """Whether values of the same draws, computed in different company, are equal up to rounding."""
    if not value.is_floating_point():
        return torch.equal(*torch.broadcast_tensors(value, other))
    return torch.allclose(value, other, rtol=1e-3, atol=1e-3, equal_nan=True)


def site_numbers(site: Any) -> int:
    """Return the size of the largest tensor of a site: its value, or a parameter such as logits."""
    return max(part.numel() for part in _tensors(site))


def site_bytes(site: Any) -> int:
    """Return the bytes of the largest tensor of a site, see :func:`site_numbers`."""
    return max(part.numel() * part.element_size() for part in _tensors(site))


def _tensors(site: Any) -> list[Tensor]:
    parts = [site["value"], *vars(innermost(site["fn"])).values()]
    return [part for part in parts if isinstance(part, Tensor)]


class SiteShape(NamedTuple):
    """The shape of a site in a run of one draw without enumeration."""

    batch: tuple[int, ...]
    plates: tuple[str | None, ...]  # of each batch dimension; None outside plates
    event: tuple[int, ...]

    @property
    def kept(self) -> list[tuple[str | None, int]]:
        """Plate and size of the batch dimensions that are more than padding."""
        pairs = zip(self.plates, self.batch, strict=True)
        return [(plate, size) for plate, size in pairs if plate is not None or size > 1]


def site_shape(site: Any) -> SiteShape:
    """Return the shape of a site of a trace of one draw without enumeration."""
    shape = torch.as_tensor(site["value"]).shape
    frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    depth = max((-dim for dim in frames), default=0)

    def batch_shape(event_dim: int) -> tuple[int, ...]:
        lead = tuple(shape[: len(shape) - event_dim])
        return (1,) * (depth - len(lead)) + lead

    event_dim = site["fn"].event_dim
    if is_deterministic(site) and event_dim == len(shape):
        # By default pyro.deterministic takes every dimension for a part of the event, plates included.
        rest = max(0, len(shape) - depth)
        if all(batch_shape(rest)[dim] in (1, frame.size) for dim, frame in frames.items()):
            event_dim = rest
    lead, own = batch_shape(event_dim), tuple(site["fn"].batch_shape)
    if own != lead:
        try:
            lead = tuple(torch.broadcast_shapes(lead, own))
        except RuntimeError:
            raise ValueError(
                f"Expected values of batch shape {own} at site '{site['name']}', as its distribution has, got {lead}"
            ) from None
    dims = range(-len(lead), 0)
    batch = tuple(max(lead[dim], frames[dim].size) if dim in frames else lead[dim] for dim in dims)
    return SiteShape(
        batch,
        tuple(frames[dim].name if dim in frames else None for dim in dims),
        tuple(shape[len(shape) - event_dim :]),
    )
