"""Gradients of log p(x | z) with respect to the latent sites, at given values of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae._programs import sample_sites, site_log_prob
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.densities import check_numbers, log_density
from pyro_ilvae.diagnostics._engine.posteriors import TRANSFORMED, UnavailableError
from pyro_ilvae.diagnostics._engine.sites import local_dim, site_names
from pyro_ilvae.distributions import innermost, without_event

_WITH_ATOMS = dist.Empirical, dist.ZeroInflatedDistribution

# The root mean square of the direct gradient, relative to the gradient of the priors of sites in between, below which
# the site counts as one that reaches the data through these sites alone.
_NEGLIGIBLE = 0.01

_MOST_PAIRS = 20_000  # of a draw and a datum at a time: fewer than without gradients, whose networks keep no graph


def check_differentiable(site: Any) -> None:
    """Raise unless the density of a site has a gradient with respect to its value."""
    check_density_at_value(site)
    part = site["fn"]
    while not isinstance(part, _WITH_ATOMS) and hasattr(part, "base_dist"):
        part = part.base_dist
    if isinstance(part, _WITH_ATOMS):
        raise UnavailableError(
            f"Expected site '{site['name']}' to have a density, got a {type(part).__name__}, which has single values "
            "with probability"
        )
    support, kind = site["fn"].support, type(innermost(site["fn"])).__name__
    while isinstance(support, MixtureSameFamilyConstraint):
        support = support.base_constraint
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


def check_density_at_value(site: Any) -> None:
    """Raise unless the density of a site is a function of its value.

    A straight-through draw has another, relaxed draw attached, of which its log density is, and copies lose that.
    """
    fn = without_event(site["fn"])
    if type(fn) in TRANSFORMED:  # a flow may know its inverse at its own draws only
        return
    try:
        with seeded(0), torch.no_grad(), evaluation_mode(fn):
            value = fn.rsample() if fn.has_rsample else fn.sample()  # as Pyro draws
            log_probs = fn.log_prob(value), fn.log_prob(value.clone())
    except (NotImplementedError, ValueError):  # an improper prior has no draws, and NaN is told of elsewhere
        return
    if not torch.allclose(*log_probs, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UnavailableError(
            f"Expected site '{site['name']}' to have a density at its value, got a {type(fn).__name__}, whose value is "
            "rounded and whose density is of the value before"
        )


def differentiable_sites(batch: Batch, sites: Sequence[str] | None) -> list[str]:
    """The latent sites to differentiate by, checked; by default all continuous ones in the plate over the data."""
    nodes: dict[str, Any] = {name: batch.model_trace.nodes[name] for name in batch.latent_sites}
    if sites is None:
        names = [n for n, site in nodes.items() if batch.is_local(site) and not site["fn"].support.is_discrete]
    else:
        names = site_names(sites)
    for trace in (batch.guide_trace, batch.model_trace):
        for name in batch.latent_sites:
            check_density_at_value(trace.nodes[name])
    if not names:
        given = f"sites=[] of {list(nodes)}" if sites is not None else f"sites {list(nodes)}"
        raise ValueError(f"Expected a continuous latent site in the plate over the data, got {given}")
    for name in names:
        if name not in nodes:
            raise ValueError(
                f"Expected each site in sites to be a latent site that is drawn, among {list(nodes)}, got {name!r}"
            )
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
    call once with the value of the site ``names[0]``, the second gradient is with respect to the module's output; the
    data have to depend on the site through that output alone. Discrete sites without draws are summed over. Squared
    norms have shape (count, N). The density has shape (count, N), or (count, 1) if all data are taken ``together``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Clones, because values drawn in inference mode take no gradient.
        leaves = {name: value.detach().clone().requires_grad_(name in names) for name, value in draws.items()}
        with _cut(watched) as calls:
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
        whole, output = None, []
        if watched is not None:
            whole, cut = _only_call(calls, names[0], by[0])
            output = [cut]
        gradients = _gradients(log_likelihood, [*by, *output])
        others = [node for node in nodes if node["name"] in leaves and node["name"] not in names]
        for name, value, gradient in zip(names, by, gradients, strict=False):
            _check_none_between(name, [value, *output], gradient, others, watched is not None)
        if whole is not None:
            # The summed-over sites' share of the prior cancels up to rounding only.
            scale = _gradients(log_prior, by)[0].abs().max() if batch.enumerated_sites else 0.0
            _check_one_path(names[0], gradients[0], 10 * torch.finfo(whole.dtype).eps ** 0.5 * scale)
            gradients[0] = _gradients(whole, by, gradients[-1])[0]
    sites: list[Any] = [trace.nodes[name] for name in names]
    event_dims = [site["fn"].event_dim for site in sites]
    parts = [_square(batch, *part, count) for part in zip(gradients, sites, event_dims, strict=False)]
    norms = [torch.stack(parts).sum(0)]
    if watched is not None:
        output_dim = event_dims[0] + gradients[-1].dim() - by[0].dim()
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


def _gradients(value: Tensor, by: list[Tensor], weights: Tensor | None = None) -> list[Tensor]:
    """The gradients of a sum, weighted if there are weights; 0 by what the sum does not depend on."""
    if not value.requires_grad:  # for example where nothing is observed
        return [torch.zeros_like(part) for part in by]
    # Data are independent given the latent sites: the gradient of the sum holds the gradient of each datum.
    total = value.sum() if weights is None else (value * weights).sum()
    return list(torch.autograd.grad(total, by, allow_unused=True, materialize_grads=True, retain_graph=True))


def _check_none_between(name: str, by: list[Tensor], gradient: Tensor, others: list[Any], bounded: bool) -> None:
    """Raise if the data depend on a site through other latent sites whose draws are given.

    Given them, the site's divergence leaves out what the data say about the site through them, which is all that they
    say where the gradient is 0, and nearly all where it is far below the gradient of their priors.
    """
    between, largest = {}, 0.0
    for node in others:
        through = _gradients(site_log_prob(node), by)
        if any(part.any() for part in through):
            between[node["name"]] = node["fn"].support.is_discrete
            largest = max(largest, _root_mean_square(through[0]))
    alone = _root_mean_square(gradient) <= _NEGLIGIBLE * largest
    if between and (bounded or alone or any(between.values())):
        raise UnavailableError(
            f"Expected site '{name}' to reach the data without other drawn sites in between, got {list(between)} with "
            "priors that depend on it: its divergence alone needs an integral over them; continuous ones can join it "
            "in sites=[...]"
        )


def _root_mean_square(gradient: Tensor) -> float:
    # A draw without density may have no gradient.
    return float(gradient.nan_to_num(0.0, 0.0, 0.0).double().square().mean().sqrt())


def _check_one_path(name: str, gradient: Tensor, rounding: Tensor | float) -> None:
    """Raise if data depend on a site by more than the decoder, whose output was held when the gradient was taken."""
    past = gradient.nan_to_num().abs().max()  # a draw without density may have no gradient
    if past > rounding:
        raise UnavailableError(
            f"Expected data that depend on site '{name}' through the decoder alone, got log p(x | {name}) with a "
            f"gradient of up to {float(past):.3g} with the decoder's output held: no bound holds for all of its paths"
        )


@contextmanager
def _cut(module: nn.Module | None) -> Iterator[list[tuple[Any, Any, Any]]]:
    """Collects the inputs and outputs of a module, and cuts the outputs that others see from the graph before them."""
    calls: list[tuple[Any, Any, Any]] = []

    def hook(_: nn.Module, inputs: Any, output: Any) -> Any:
        cut = output.detach().requires_grad_() if isinstance(output, Tensor) else output
        calls.append((inputs, output, cut))
        return cut

    if module is None:
        yield calls
        return
    handle = module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def _only_call(calls: list[tuple[Any, Any, Any]], name: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output of the only call of a module, which has to be with the value of a site, and the output cut off."""
    if len(calls) != 1:
        raise UnavailableError(f"Expected a model that calls its decoder once, got {len(calls)} calls")
    (inputs, output, cut), *_ = calls
    if not inputs or inputs[0].shape != value.shape or not torch.equal(inputs[0], value):
        raise UnavailableError(f"Expected a decoder that is called with the value of site '{name}', got another input")
    if not isinstance(output, Tensor):
        raise UnavailableError(f"Expected a decoder that returns a tensor, got a {type(output).__name__}")
    return output, cut
