"""The distribution that a guide gives a latent site, also where the site itself is a transformed auxiliary draw."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from torch.distributions import biject_to
from torch.distributions.transforms import identity_transform

from pyro_ilvae.diagnostics._batches import Batch
from pyro_ilvae.distributions import innermost


class UnavailableError(ValueError):
    """Something that cannot be computed for a site; its message says why."""


Unavailable = UnavailableError


def site_posterior(batch: Batch, guide_trace: Trace, model_trace: Trace, name: str) -> Any:
    """The guide's distribution of a site, with the site's own event and batch shape.

    Raises:
        Unavailable: for a point estimate, and for joint auxiliary draws that are not Gaussian.
    """
    site = batch.site(guide_trace, name, "guide")
    fn = site["fn"]
    if not isinstance(innermost(fn), dist.Delta):
        return fn
    support = batch.site(model_trace, name, "model")["fn"].support
    auxiliary: Any = guide_trace.nodes.get(f"{name}_unconstrained")  # AutoNormal and its kind
    if auxiliary is not None and auxiliary["infer"].get("is_auxiliary"):
        return _transformed(auxiliary["fn"], support, fn.event_dim)
    guide = unwrap(batch.guide)
    if isinstance(guide, AutoContinuous):
        joint: Any = guide_trace.nodes[f"_{type(guide).__name__}_latent"]["fn"]
        if not _gaussian(joint):
            raise Unavailable(
                f"Expected a guide that has a distribution of site '{name}' alone, got {type(guide).__name__}, whose "
                "joint draw is not Gaussian"
            )
        locs, scales = (
            {site["name"]: part for site, part in guide._unpack_latent(moment)} for moment in (joint.mean, joint.stddev)
        )
        base = dist.Normal(locs[name], scales[name]).to_event(fn.event_dim)
        return _transformed(base, support, fn.event_dim)
    raise Unavailable(
        f"Expected a guide that draws site '{name}' from a distribution, got a Delta, as of AutoDelta: the divergence "
        "of a point is infinite"
    )


def factors(fn: Any, name: str) -> Any:
    """A site's distribution with its dimensions as batch dimensions.

    A multivariate Normal gives its marginals.

    Raises:
        Unavailable: if the distribution of a single dimension has no formula.
    """
    shape = fn.batch_shape + fn.event_shape
    base = _without_event(fn)
    if isinstance(base, torch.distributions.TransformedDistribution):
        transforms = [_entrywise(transform) for transform in base.transforms]
        if all(transform.domain.event_dim == 0 for transform in transforms):
            base = factors(base.base_dist, name)
            transforms = [transform for transform in transforms if transform != identity_transform]
            if transforms:
                base = dist.TransformedDistribution(base, transforms)
    if isinstance(base, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        base = dist.Normal(base.mean, base.stddev)
    if base.event_shape:
        raise Unavailable(
            f"Expected site '{name}' to factorise over its dimensions, got a {type(base).__name__} with event shape "
            f"{tuple(base.event_shape)}"
        )
    return base.expand(shape)


def depends_on_draws(batch: Batch, name: str, posterior: Any) -> bool:
    """Whether the guide's distribution of a site changes with its draws of other sites."""
    if len(batch.latent_sites) < 2:
        return False
    value = posterior.sample()
    before = posterior.log_prob(value)
    for _ in range(2):
        guide_trace, model_trace = batch.traces(1)
        after = site_posterior(batch, guide_trace, model_trace, name).log_prob(value)
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-4):
            return True
    return False


def _transformed(base: Any, support: Any, event_dim: int) -> Any:
    transform = biject_to(support)
    entrywise = _entrywise(transform)
    if entrywise == identity_transform:
        return base
    if entrywise.domain.event_dim == 0:
        return dist.TransformedDistribution(_without_event(base), [entrywise]).to_event(event_dim)
    return dist.TransformedDistribution(base, [transform])


def _without_event(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _entrywise(transform: Any) -> Any:
    """A transform without the dimensions that it only counts as its event."""
    while isinstance(transform, torch.distributions.transforms.IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, torch.distributions.transforms.ComposeTransform) and not transform.parts:
        return identity_transform
    return transform


def _gaussian(fn: Any) -> bool:
    normals = (
        torch.distributions.Normal,
        torch.distributions.MultivariateNormal,
        torch.distributions.LowRankMultivariateNormal,
    )
    return isinstance(_without_event(fn), normals)
