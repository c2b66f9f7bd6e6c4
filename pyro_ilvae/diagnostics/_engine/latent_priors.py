"""Priors of the latent variable: how much they spread, in closed form where that is known, and draws by component."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta, MaskedDistribution, Normal
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.decoded_sites import part_of
from pyro_ilvae.diagnostics._engine.densities import log_density
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.scores import placeholders
from pyro_ilvae.distributions import innermost, without_event

_MOST_NUMBERS = 10_000_000  # drawn at a time for all components, of which each draw is of one
_MOST_ASSIGNMENTS = 1000  # of discrete sites that are summed out to compare a prior


class Spread(NamedTuple):
    """Logarithms of entropy powers, exp(2 h / K) / (2 pi e), which is the variance for a Normal in one dimension."""

    weights: Tensor  #: the weights of the components of a mixture, of shape (C,), without those that are 0
    numbers: Tensor  #: the numbers of these components, of shape (C,)
    log_powers: Tensor | None  #: of each component, of shape (C,); None where the entropy has no formula
    #: of each coordinate given the others in each component, of shape (C, K); None where there is no formula
    log_powers_of_coordinates: Tensor | None


def check_prior(prior: Any, latent_dim: int | None) -> None:
    """Raise for what is no distribution of vectors of ``latent_dim`` numbers, or has no density on R^K."""
    _checks.instance("prior", prior, torch.distributions.Distribution, "a distribution")
    fits = prior.batch_shape == () and len(prior.event_shape) == 1
    if not fits or prior.event_shape[0] != (latent_dim or prior.event_shape[0]):
        raise ValueError(
            f"Expected prior with batch shape () and event shape ({latent_dim or 'K'},), got {tuple(prior.batch_shape)}"
            f" and {tuple(prior.event_shape)}; .to_event(1) makes an event of the last dimension"
        )
    kind = _kind(prior)
    part = prior
    while part is not None:
        if isinstance(part, MaskedDistribution):
            raise UnavailableError("Expected a prior with a density, got one with a mask")
        part = getattr(part, "component_distribution", getattr(part, "base_dist", None))
    try:
        support = prior.support
    except NotImplementedError:  # of a transform that does not say
        return
    # A simplex or a sphere is a surface in R^K.
    inner = support
    while hasattr(inner, "base_constraint"):
        inner = inner.base_constraint
    if isinstance(kind, Delta) or support.is_discrete or inner.event_dim > 0:
        raise UnavailableError(f"Expected a prior with a density on R^K, got {type(kind).__name__}")


def own_prior(model: Any) -> Any:
    """The attribute ``prior`` of a model, if that is a distribution; None otherwise."""
    prior = part_of(model, "prior")
    return prior if isinstance(prior, torch.distributions.Distribution) else None


def prior_of_site(batch: Batch, site: str, trace: Trace) -> Any:
    """The prior of a site: its Normal one that all data share, or the model's own, if the site is drawn from that."""
    shared = _shared_prior(batch, site, trace)
    if shared is not None:
        return shared
    prior = own_prior(batch.model)
    if prior is None:
        raise UnavailableError("Expected a prior that is Normal and the same for all data, or a model with a prior")
    node: Any = trace.nodes[site]
    if node["fn"].event_dim == 1:
        check_prior(prior, node["value"].shape[-1])
    if not _is_drawn_from(batch, site, node, prior):
        raise UnavailableError(
            f"Expected site '{site}' to be drawn from the attribute prior of the model, whatever data and other sites "
            "are, got another density"
        )
    return prior


def _is_drawn_from(batch: Batch, site: str, node: Any, prior: Any) -> bool:
    """Whether the density of a site in the model, with discrete sites summed out, is that of ``prior``."""
    fns: dict[str, Any] = {name: batch.model_trace.nodes[name]["fn"] for name in batch.latent_sites if name != site}
    discrete = [name for name, fn in fns.items() if fn.has_enumerate_support]
    nodes: Any = batch.guide_trace.nodes
    supports = [fns[name].enumerate_support(expand=False) for name in discrete]
    if math.prod(map(len, supports)) > _MOST_ASSIGNMENTS:
        return False
    try:
        own = prior.log_prob(batch.data_first(node["value"], node, node["fn"].event_dim)[0])
        densities = []
        with seeded(0), torch.no_grad():
            for values in itertools.product(*supports):
                # All other sites are drawn from the model, because the site may depend on them.
                given = {
                    name: value.expand_as(nodes[name]["value"]) for name, value in zip(discrete, values, strict=True)
                }
                given[site] = node["value"]
                _, joint = batch.traces(1, conditioned=given, guide=placeholders(given))
                summed = [joint.nodes[name] for name in (site, *discrete, *batch.enumerated_sites)]
                densities.append(log_density(batch, summed, 1, False)[0])
    except (RuntimeError, ValueError):  # of values that the model cannot take, or a prior of another shape
        return False
    return torch.allclose(torch.stack(densities).logsumexp(0), own.to(densities[0]), rtol=1e-4, atol=1e-4)


def _shared_prior(batch: Batch, site: str, trace: Trace) -> Any:
    """The prior of the only latent site, if it is Normal and the same for all data; None otherwise."""
    node: Any = trace.nodes[site]
    normal = without_event(node["fn"])
    latent = [*batch.latent_sites, *batch.enumerated_sites]
    if latent != [site] or node["fn"].event_dim != 1 or not isinstance(normal, Normal):
        return None
    loc, scale = (value.detach().reshape(-1, value.shape[-1]) for value in (normal.loc, normal.scale))
    same = torch.equal(loc, loc[:1].expand_as(loc)) and torch.equal(scale, scale[:1].expand_as(scale))
    return Normal(loc[0], scale[0]).to_event(1) if same else None


def spread_of(prior: Any) -> Spread:
    """The entropy powers of a prior, in double precision; one that is no mixture is a mixture of one component."""
    mixed = isinstance(prior, MixtureSameFamily)
    parts = prior.component_distribution if mixed else prior
    weights = prior.mixture_distribution.probs.detach().double() if mixed else torch.ones(1, dtype=torch.float64)
    numbers = weights.nonzero()[:, 0]
    latent_dim, two_pi_e = prior.event_shape[0], math.log(2 * math.pi * math.e)
    try:
        entropies = parts.entropy().detach().double().reshape(len(weights))
    except NotImplementedError:
        return Spread(weights[numbers], numbers, None, None)
    coordinates = None
    if hasattr(parts, "precision_matrix"):
        coordinates = -parts.precision_matrix.detach().double().diagonal(dim1=-2, dim2=-1).log()
    elif isinstance(parts, Independent) and parts.base_dist.event_shape == ():
        coordinates = 2 * parts.base_dist.entropy().detach().double() - two_pi_e
    return Spread(
        weights[numbers],
        numbers,
        2 / latent_dim * entropies[numbers] - two_pi_e,
        None if coordinates is None else coordinates.reshape(len(weights), latent_dim)[numbers],
    )


def draws_by_component(prior: Any, numbers: Tensor, counts: Sequence[int]) -> Tensor:
    """So many draws of each of these components, one component after the other, of shape (sum of counts, K)."""
    if not isinstance(prior, MixtureSameFamily):
        try:
            return prior.sample((sum(counts),))  # type: ignore[no-any-return]
        except NotImplementedError as error:
            raise UnavailableError(
                f"Expected a prior that can be drawn from, got {type(_kind(prior)).__name__}"
            ) from error
    parts = prior.component_distribution
    which = numbers.repeat_interleave(torch.tensor(counts, device=numbers.device))
    rows = max(1, _MOST_NUMBERS // (parts.batch_shape.numel() * parts.event_shape.numel()))
    drawn = []
    for part in which.split(rows):
        of_all = parts.sample((len(part),))
        drawn.append(of_all[torch.arange(len(part), device=part.device), part])
    return torch.cat(drawn)


def _kind(prior: Any) -> Any:
    """The distribution inside a mixture and all wrappers, by which a message names it."""
    return innermost(prior.component_distribution if isinstance(prior, MixtureSameFamily) else prior)
