"""Gradients of log p(x | z) with respect to the latent sites, at given values of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_ilvae.diagnostics._engine.batches import Batch, sample_sites
from pyro_ilvae.diagnostics._engine.densities import check_numbers, log_density
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.sites import local_dim, site_names
from pyro_ilvae.distributions import innermost

_MOST_PAIRS = 20_000  # of a draw and a datum at a time: fewer than without gradients, whose networks keep no graph


def check_differentiable(site: Any) -> None:
    """Raise unless the density of a site has a gradient with respect to its value."""
    support, kind = site["fn"].support, type(innermost(site["fn"])).__name__
    if support.is_discrete:
        raise UnavailableError(f"Expected site '{site['name']}' to be continuous, got a {kind}: it has no score")
    try:
        shape = site["value"].shape
        full = biject_to(support).inverse_shape(shape) == shape
    except NotImplementedError:
        full = False
    if not full:
        raise UnavailableError(
            f"Expected site '{site['name']}' to have a support with interior, got {support} of a {kind}, on which a "
            "gradient depends on how the density is written outside"
        )


def differentiable_sites(batch: Batch, sites: Sequence[str] | None) -> list[str]:
    """The latent sites to differentiate by, checked; by default all continuous ones in the plate over the data."""
    nodes: dict[str, Any] = {name: batch.model_trace.nodes[name] for name in batch.latent_sites}
    if sites is None:
        names = [n for n, site in nodes.items() if batch.is_local(site) and not site["fn"].support.is_discrete]
    else:
        names = site_names(sites)
    if not names:
        raise ValueError(f"Expected a continuous latent site in the plate over the data, got sites {list(nodes)}")
    for name in names:
        if name not in nodes:
            raise ValueError(f"Expected sites to be latent sites that are drawn, among {list(nodes)}, got {name!r}")
        local_dim(batch, nodes[name])
        check_differentiable(nodes[name])
    return names


def squared_gradients(
    batch: Batch,
    draws: dict[str, Tensor],
    count: int,
    names: list[str],
    *,
    together: bool,
    watched: nn.Module | None = None,
) -> tuple[Tensor, list[Tensor]]:
    r"""log p(x, z), and squared norms of gradients of log p(x | z), at ``count`` draws of all sites.

    The first gradient is with respect to the sites called ``names``. If a module is ``watched``, which the model has to
    call once with the value of the site ``names[0]``, the second gradient is with respect to the module's output.
    Discrete sites without draws are summed over. Squared norms have shape (count, N). The density has shape (count, N),
    or (count, 1) if all data are taken ``together``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Clones, because values drawn in inference mode take no gradient.
        leaves = {name: value.detach().clone().requires_grad_(name in names) for name, value in draws.items()}
        with _calls(watched) as calls:
            _, trace = batch.traces(count, conditioned=leaves, guide=placeholders(leaves))
        nodes = sample_sites(trace)
        log_prior = log_density(batch, [node for node in nodes if not node["is_observed"]], count, together)
        if batch.enumerated_sites:
            log_joint = log_density(batch, nodes, count, together)
            log_likelihood = log_joint - log_prior
        else:
            log_likelihood = log_density(batch, [node for node in nodes if node["is_observed"]], count, together)
            log_joint = log_likelihood + log_prior
        check_numbers(log_joint, nodes)
        by = [leaves[name] for name in names]
        if watched is not None:
            by.append(_only_output(calls, names[0], by[0]))
        gradients = [torch.zeros_like(value) for value in by]
        if log_likelihood.requires_grad:  # It does not where nothing is observed.
            # Data are independent given the latent sites: the gradient of the sum holds the gradient of each datum.
            found = torch.autograd.grad(log_likelihood.sum(), by, allow_unused=True)
            gradients = [zero if part is None else part for zero, part in zip(gradients, found, strict=True)]
    sites: list[Any] = [trace.nodes[name] for name in names]
    event_dims = [site["fn"].event_dim for site in sites]
    parts = [_square(batch, *part, count) for part in zip(gradients, sites, event_dims, strict=False)]
    norms = [torch.stack(parts).sum(0)]
    if watched is not None:
        output_dim = event_dims[0] + by[-1].dim() - by[0].dim()
        norms.append(_square(batch, gradients[-1], sites[0], output_dim, count))
    return log_joint.detach(), norms


def passes(batch: Batch, num_samples: int, samples_per_pass: int | None) -> list[int]:
    """Return how many draws to make in each pass."""
    return batch.passes(num_samples, samples_per_pass, _MOST_PAIRS)


def _square(batch: Batch, gradient: Tensor, site: Any, event_dim: int, count: int) -> Tensor:
    first = batch.data_first(gradient, site, event_dim)
    return first.reshape(*first.shape[:2], -1).square().sum(-1).expand(count, batch.num_data)


def placeholders(names: Iterable[str]) -> Callable[..., None]:
    """Return a guide for values that are given, which names their sites and draws nothing."""

    def guide(*_: Any, **__: Any) -> None:
        for name in names:
            pyro.sample(name, dist.Delta(torch.zeros(())))

    return guide


@contextmanager
def _calls(module: nn.Module | None) -> Iterator[list[tuple[Any, Any]]]:
    """Collects the inputs and outputs of a module."""
    calls: list[tuple[Any, Any]] = []
    if module is None:
        yield calls
        return
    handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    try:
        yield calls
    finally:
        handle.remove()


def _only_output(calls: list[tuple[Any, Any]], name: str, value: Tensor) -> Tensor:
    if len(calls) != 1:
        raise UnavailableError(f"Expected a model that calls its decoder once, got {len(calls)} calls")
    (inputs, output), *_ = calls
    if not inputs or inputs[0].shape != value.shape or not torch.equal(inputs[0], value):
        raise UnavailableError(f"Expected a decoder that is called with the value of site '{name}', got another input")
    return output  # type: ignore[no-any-return]
