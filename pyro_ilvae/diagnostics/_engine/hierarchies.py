"""What a model with layers guarantees about each of its latent sites."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.channels import noise_scale
from pyro_ilvae.diagnostics._engine.decoded_sites import check_likelihood_of_model, decoded_site, part_of
from pyro_ilvae.diagnostics._engine.decoding import at_any_context, parameters_of, state_of
from pyro_ilvae.diagnostics._engine.densities import log_density
from pyro_ilvae.diagnostics._engine.information_bounds import (
    LOG_UNIT,
    Bounds,
    Entropy,
    bounds_for_entropy,
    bounds_for_prior,
)
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.scores import placeholders

_NOTHING = Bounds(0.0, 0.0, 0.0, 0.0, 0.0, None, math.nan, math.nan)


class Hierarchy(NamedTuple):
    """The channels of a model with layers, from the data up: the decoder and noise below each latent site."""

    sites: tuple[str, ...]
    channels: tuple[tuple[Any, Any], ...]


def hierarchy_of(model: Any) -> Hierarchy | None:
    """The channels of a model with the attributes ``layers`` and ``latent_sites``; None for any other."""
    layers, sites = part_of(model, "layers"), part_of(model, "latent_sites")
    if layers is None or not isinstance(sites, tuple) or len(layers) + 1 != len(sites):
        return None
    first = (at_any_context(part_of(model, "decoder")), part_of(model, "likelihood"))
    return Hierarchy(sites, (first, *((layer.decoder, layer.noise) for layer in layers)))


def bounds_in_hierarchy(
    hierarchy: Hierarchy, site: str, prior: Any, num_samples: int, samples_per_pass: int | None
) -> Bounds:
    """The bounds on the information between a site and what is below it, for ``prior`` of the top site.

    A layer above that guarantees nothing still adds its noise, so that the layers below keep a guarantee.
    """
    number, top = hierarchy.sites.index(site), len(hierarchy.sites) - 1
    entropy, drawn = None, None
    for t in range(top, number - 1, -1):
        decoder, noise = hierarchy.channels[t]
        try:
            if entropy is None or drawn is None:
                bounds = bounds_for_prior(decoder, noise, prior, num_samples, samples_per_pass)
            else:
                bounds = bounds_for_entropy(decoder, noise, entropy, drawn, samples_per_pass)
        except UnavailableError:
            if t == number:
                raise
            bounds = _NOTHING
        if t > number:
            # Of each site its own draws, so that standard errors of the layers are independent.
            drawn = draws_of_site(hierarchy, t - 1, prior, num_samples)
            entropy = _entropy_below(decoder, noise, bounds, draws_of_site(hierarchy, t, prior, 2))
    return bounds


def draws_of_site(hierarchy: Hierarchy, number: int, prior: Any, num_samples: int) -> Tensor:
    """Draws of the site with this number, from 0 at the bottom, of shape (num_samples, K)."""
    try:
        z: Tensor = prior.sample((num_samples,))
    except NotImplementedError as error:
        raise UnavailableError(f"Expected a prior that can be drawn from, got {type(prior).__name__}") from error
    like = state_of(hierarchy.channels[-1][0])
    z = z if like is None else z.to(like)
    for decoder, noise in reversed(hierarchy.channels[number + 1 :]):
        z = noise(decoder(z)).sample()
    return z


def _entropy_below(decoder: Any, noise: Any, bounds: Bounds, z: Tensor) -> Entropy:
    """The entropy of the site below, h(z_t) = h(z_t | z_t+1) + I(z_t; z_t+1): that of the noise and the information."""
    log_scale = noise_scale(noise, parameters_of(decoder, z)).flatten().log()
    of_noise = float(log_scale.sum()) + len(log_scale) / 2 * LOG_UNIT
    return Entropy(
        of_noise + bounds.floor,
        bounds.floor_se,
        of_noise + bounds.by_jacobian,
        bounds.by_jacobian_se,
        # Given all others and the site above, what is left is noise.
        2 * log_scale,
    )


def check_hierarchy_of_model(batch: Batch, hierarchy: Hierarchy, prior: Any) -> None:
    """Raise unless the model's densities are those of its prior, its layers and its likelihood."""
    found = decoded_site(batch)
    if found is None or found.site != hierarchy.sites[0]:
        raise UnavailableError(f"Expected a model whose decoder takes site '{hierarchy.sites[0]}', got another one")
    check_likelihood_of_model(batch, found)
    draws: Any = {name: batch.guide_trace.nodes[name]["value"] for name in batch.latent_sites}
    with seeded(0), torch.no_grad(), evaluation_mode(batch.model):
        _, trace = batch.traces(1, conditioned=draws, guide=placeholders(draws))
        nodes: Any = [trace.nodes[name] for name in hierarchy.sites]
        values = [batch.data_first(node["value"], node, 1)[0] for node in nodes]
        for t, name in enumerate(hierarchy.sites):
            if t + 1 < len(values):
                decoder, noise = hierarchy.channels[t + 1]
                own = noise(decoder(values[t + 1])).log_prob(values[t]).sum(-1)
            else:
                own = prior.log_prob(values[t])
            density = log_density(batch, [nodes[t]], 1, False)[0]
            if not torch.allclose(own.to(density).expand_as(density), density, rtol=1e-4, atol=1e-4):
                raise UnavailableError(f"Expected site '{name}' to have the density of the model's layers, got another")
