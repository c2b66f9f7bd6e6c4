"""The distribution that a guide gives a latent site, also where the site itself is a transformed auxiliary draw."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from torch import nn
from torch.distributions import biject_to

from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.distributions import innermost, without_event

_GAUSSIAN = (
    torch.distributions.Normal,
    torch.distributions.MultivariateNormal,
    torch.distributions.LowRankMultivariateNormal,
)


TRANSFORMED = (torch.distributions.TransformedDistribution, dist.TransformedDistribution)


class UnavailableError(ValueError):
    """Something that cannot be computed for a site; its message says why."""


def site_posterior(batch: Batch, guide_trace: Trace, model_trace: Trace, name: str) -> Any:
    """Return the guide's distribution of a site, with the event and batch shape of the site.

    Raises:
        UnavailableError: for a point estimate, and for auxiliary draws that are neither Gaussian nor the site's own.
    """
    site = batch.site(guide_trace, name, "guide")
    fn = site["fn"]
    if not isinstance(innermost(fn), dist.Delta):
        return _transformed(fn.base_dist, fn.transforms, fn.event_dim) if type(fn) in TRANSFORMED else fn
    support = batch.site(model_trace, name, "model")["fn"].support
    auxiliary: Any = guide_trace.nodes.get(f"{name}_unconstrained")  # AutoNormal and its kind
    if auxiliary is not None and auxiliary["infer"].get("is_auxiliary"):
        return _transformed(auxiliary["fn"], [biject_to(support)], fn.event_dim)
    part = _joint_guide(batch, name)
    if part is not None:
        return _transformed(_marginal(part, batch, guide_trace, name), [biject_to(support)], fn.event_dim)
    if name in batch.points():
        raise UnavailableError(
            f"Expected a guide that draws site '{name}' from a distribution, got a Delta, as of AutoDelta: the "
            "divergence of a point is infinite"
        )
    raise UnavailableError(
        f"Expected a guide that has a distribution of site '{name}' alone, got {_kind(batch)}, which transforms draws "
        "of auxiliary sites in a way that is not known here"
    )


def correlated(batch: Batch, name: str) -> bool:
    """Whether the guide draws a site jointly with other sites, or jointly for several data."""
    part = _joint_guide(batch, name)
    return part is not None and not isinstance(
        without_event(_joint_draw(part, batch.guide_trace)), torch.distributions.Normal
    )


def factors(fn: Any, name: str, within: int = 0) -> Any:
    """Return a site's distribution with its event dimensions as batch dimensions, but for the last ``within``.

    A multivariate Normal gives its marginals, and so does a mixture.

    Raises:
        UnavailableError: if the distribution of a single dimension has no formula.
    """
    shape = fn.batch_shape + fn.event_shape
    base = without_event(fn)
    if within:
        return _variables(base, name, within).expand(shape[:-within])
    # Subclasses such as HalfCauchy stay as they are: they know their density better than their transform does.
    if type(base) in TRANSFORMED:
        transforms = [part for transform in base.transforms for part in _parts(transform)]
        if all(transform.domain.event_dim == 0 for transform in transforms):
            base = factors(base.base_dist, name)
            if transforms:
                base = dist.TransformedDistribution(base, transforms)
    if isinstance(base, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        base = dist.Normal(base.mean, base.stddev)
    if isinstance(base, torch.distributions.MixtureSameFamily):
        base = _MarginalsOfMixture(base, name)
    if base.event_shape:
        raise UnavailableError(
            f"Expected site '{name}' to factorize over its dimensions, got a {type(base).__name__} with event shape "
            f"{tuple(base.event_shape)}"
        )
    return base.expand(shape)


def _variables(base: Any, name: str, within: int) -> Any:
    """Return a distribution over vectors or matrices whose entries are one variable, with ``within`` dimensions."""
    if type(base) in TRANSFORMED and base.event_dim > within:
        parts = [part for transform in base.transforms for part in _parts(transform)]
        base = dist.TransformedDistribution(without_event(base.base_dist), parts)
    if base.event_dim != within:
        raise UnavailableError(
            f"Expected site '{name}' to factorize over its first dimensions, got a {type(base).__name__} with event "
            f"shape {tuple(base.event_shape)}"
        )
    return base


class _MarginalsOfMixture(dist.TorchDistribution):
    """The marginal of each dimension under a mixture, which is the mixture of the components' marginals."""

    arg_constraints = {}  # noqa: RUF012 - PyTorch's name and form

    def __init__(self, mixture: torch.distributions.MixtureSameFamily, name: str) -> None:
        self.components = factors(mixture.component_distribution, name)  # of batch shape (*batch, C, *event)
        self.event_size = len(mixture.event_shape)
        logits = mixture.mixture_distribution.logits
        self.log_weights = logits.reshape(*logits.shape, *(1,) * self.event_size)
        super().__init__(mixture.batch_shape + mixture.event_shape, validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        return self.components.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        new.components, new.event_size, new.log_weights = self.components, self.event_size, self.log_weights
        super(_MarginalsOfMixture, new).__init__(torch.Size(batch_shape), validate_args=False)
        return new

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        # Values of other draws than the distribution has broadcast.
        log_probs = self.components.log_prob(value.unsqueeze(-1 - self.event_size)) + self.log_weights
        return log_probs.logsumexp(-1 - self.event_size)


def depends_on_draws(batch: Batch, name: str, posterior: Any) -> bool:
    """Whether the guide's distribution of a site changes with its draws of other sites."""
    # Auxiliary draws count too. The auxiliary draw of an AutoGuide is all there is: ``posterior`` is its distribution.
    if sum(site["type"] == "sample" for site in batch.guide_trace.nodes.values()) < 2:
        return False
    value = posterior.sample()
    before = posterior.log_prob(value)
    for _ in range(2):
        guide_trace, model_trace = batch.traces(1)
        after = site_posterior(batch, guide_trace, model_trace, name).log_prob(value)
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-4):
            return True
    return False


def _joint_guide(batch: Batch, name: str) -> AutoContinuous | None:
    """The guide, or the part of it, that draws a site with others as one vector."""
    guide: Any = unwrap(batch.guide)
    guide = getattr(guide, "__self__", guide)
    parts = guide.modules() if isinstance(guide, nn.Module) else []
    for part in parts:
        if isinstance(part, AutoContinuous) and part.prototype_trace is not None and name in part.prototype_trace:
            return part
    return None


def _joint_draw(part: AutoContinuous, guide_trace: Trace) -> Any:
    fn = guide_trace.nodes[f"_{part._pyro_name}_latent"]["fn"]
    return getattr(fn, "whole", fn)  # where the model masks entries


def _marginal(part: AutoContinuous, batch: Batch, guide_trace: Trace, name: str) -> Any:
    """The Gaussian of a site's unconstrained value."""
    joint = without_event(_joint_draw(part, guide_trace))
    if not isinstance(joint, _GAUSSIAN):
        raise UnavailableError(
            f"Expected a guide that has a distribution of site '{name}' alone, got {_kind(batch)}, whose joint draw is "
            "not Gaussian"
        )
    site: Any = batch.guide_trace.nodes[name]
    positions = torch.arange(joint.mean.shape[-1], device=joint.mean.device)
    index = next(own for other, own in part._unpack_latent(positions) if other["name"] == name)
    event_dim = site["fn"].event_dim + index.dim() - site["value"].dim()
    # Every draw has the same distribution.
    lead = (0,) * (joint.mean.dim() - 1)
    loc, scale = joint.mean[lead][index], joint.stddev[lead][index]
    if event_dim == 0 or isinstance(joint, torch.distributions.Normal):
        return dist.Normal(loc, scale).to_event(event_dim)
    loc, index = loc.flatten(-event_dim), index.flatten(-event_dim)
    if isinstance(joint, torch.distributions.MultivariateNormal):
        factor = joint.scale_tril[lead][index]
        covariance = factor @ factor.mT
    else:
        factor = joint.cov_factor[lead][index]
        covariance = factor @ factor.mT + joint.cov_diag[lead][index].diag_embed()
    block = dist.MultivariateNormal(loc, covariance)
    if event_dim > 1:
        shape = block.event_shape, scale.shape[-event_dim:]
        block = dist.TransformedDistribution(block, [torch.distributions.transforms.ReshapeTransform(*shape)])
    return block


def _kind(batch: Batch) -> str:
    return type(unwrap(batch.guide)).__name__


def _transformed(base: Any, transforms: list[Any], event_dim: int) -> Any:
    """Return the distribution of a transformed draw, written as priors are written if possible, which formulas know."""
    parts = [part for transform in transforms for part in _parts(transform)]
    if any(part.domain.event_dim > 0 for part in parts):
        return dist.TransformedDistribution(base, transforms)
    if parts:
        base = dist.TransformedDistribution(without_event(base), parts)
    return base.to_event(event_dim - base.event_dim)


def _parts(transform: Any) -> list[Any]:
    """Return the parts of a transform that do something, without wrappers that only declare event dimensions."""
    while isinstance(transform, torch.distributions.transforms.IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, torch.distributions.transforms.ComposeTransform):
        return [part for whole in transform.parts for part in _parts(whole)]
    if isinstance(transform, torch.distributions.AffineTransform):
        if isinstance(transform.loc, float | int) and (transform.loc, transform.scale) == (0, 1):
            return []
        return [torch.distributions.AffineTransform(transform.loc, transform.scale)]
    return [transform]
