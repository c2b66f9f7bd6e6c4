"""Which part of a model decodes which latent site, found by what a run of the model calls."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pyro_ilvae._contexts import evaluation_mode, seeded, uncompiled
from pyro_ilvae._programs import sample_sites, within_event
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.densities import log_density
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.scores import placeholders

_WAY = "mean_fisher_divergence(decoder, likelihood) and fisher_bound(..., decoder=...) take them by hand"


def part_of(model: Callable[..., Any], name: str) -> Any:
    """The attribute of the object whose method the model is, such as its decoder; None without one."""
    function: Any = unwrap(model)
    while isinstance(function, functools.partial):
        function = unwrap(function.func)
    return getattr(getattr(function, "__self__", function), name, None)


class Decoded(NamedTuple):
    """The decoder of a model, what is decoded, and what the model makes of it."""

    decoder: Any  #: a module, or a function that is an attribute of the model
    site: str | None  #: the latent site whose value the decoder is called with; None if it is called with no such value
    likelihood: Any  #: the likelihood of the decoder's output; None if none is found
    trace: Trace  #: a trace of the model
    beside: tuple[Any, ...] = ()  #: what the decoder is called with beside the value of the site, such as a context
    shift: Tensor | None = None  #: what is added to the decoder's output, the same for all values of the site


class _Call(NamedTuple):
    module: nn.Module
    inside: tuple[int, ...]  #: the positions of the calls that make this call
    argument: Any
    beside: tuple[Any, ...]
    output: Any


def decoded_site(batch: Batch) -> Decoded | None:
    """Return what decodes a latent site of the model; None if nothing does.

    It is the attribute ``decoder`` of a model that has one. Otherwise it is the module that the model calls with a
    site's value, or the one among several that carries a constant or sizes, as a decoder of the package does.
    """
    named = part_of(batch.model, "decoder")
    draws: Any = {name: batch.guide_trace.nodes[name]["value"] for name in batch.latent_sites}
    calls, trace = _run(batch, draws, named)
    nodes: Any = trace.nodes
    values = {name: nodes[name]["value"] for name in batch.latent_sites if not nodes[name]["fn"].support.is_discrete}
    sites = [_site_of(call.argument, values) for call in calls]
    decoding = _outermost(
        calls, [site is not None and isinstance(call.output, Tensor) for call, site in zip(calls, sites, strict=True)]
    )
    carrying = _outermost(calls, [_carries(call.module) for call in calls])
    own = [i for i, call in enumerate(calls) if call.module is named]
    # A decoder whose ``forward`` is called by itself is not seen, but its parts are.
    parts = {id(part) for part in named.modules()} if isinstance(named, nn.Module) else set()
    carrying = [i for i in carrying if id(calls[i].module) not in parts]
    both = [i for i in decoding if i in carrying]
    for found in (own, both, carrying, decoding if named is None else []):
        modules = {id(calls[i].module) for i in found}
        if len(modules) > 1:
            kinds = sorted(type(calls[i].module).__name__ for i in found)
            raise UnavailableError(f"Expected one module that decodes a latent site, got calls of {kinds}; {_WAY}")
        if found:
            first = calls[found[0]]
            likelihood = _likelihood(batch, calls, first.output)
            decoded = Decoded(first.module, sites[found[0]], likelihood, trace, first.beside)
            shift = _shift(calls, first.module, likelihood)
            if shift is not None:
                # A shift that depends on the site is a second path from it to the data.
                with seeded(1), torch.no_grad():
                    again, _ = batch.traces(1)
                others: Any = {name: again.nodes[name]["value"] for name in batch.latent_sites}
                calls, _ = _run(batch, others, named)
                known = _same_shift(shift, _shift(calls, first.module, likelihood), first.output)
                decoded = decoded._replace(shift=shift) if known else decoded
            return decoded
    if named is None:
        return None
    only = list(values) if len(values) == 1 else [None]
    return Decoded(named, only[0], part_of(batch.model, "likelihood"), trace)


def _run(batch: Batch, draws: dict[str, Tensor], named: Any) -> tuple[list[_Call], Trace]:
    """The calls of modules in a run of the model alone at these draws, because an encoder has sizes too."""
    with seeded(0), torch.no_grad(), _watched(named) as calls:
        _, trace = batch.traces(1, conditioned=draws, guide=placeholders(draws))
    return calls, trace


def check_likelihood_of_model(batch: Batch, found: Decoded) -> None:
    """Raise unless the data's density given all latent sites is the likelihood's at the decoder's output."""
    if found.likelihood is None:
        raise UnavailableError(
            f"Expected a likelihood that the model calls with its decoder's output, got none; {_WAY}"
        )
    if found.site is None:
        raise UnavailableError("Expected a decoder that is called with the value of a latent site, got another input")
    masks = [within_event(node["fn"]) for node in sample_sites(found.trace) if node["is_observed"]]
    if not all(mask is None or bool(mask.all()) for mask in masks):
        raise UnavailableError(
            "Expected data without missing entries, got some: of a decoder it is known what complete data tell about "
            "z; call guaranteed_information or mean_fisher_divergence with decoder and likelihood themselves"
        )
    try:
        same = _densities_agree(batch, found)
    except Exception:  # of a decoder or a likelihood that is called in another way than the model calls it
        same = False
    if not same:
        raise UnavailableError(
            f"Expected data that depend on site '{found.site}' through decoder and likelihood alone, got log densities "
            f"that are not those of {type(found.likelihood).__name__} at the output of {type(found.decoder).__name__}"
        )


def _densities_agree(batch: Batch, found: Decoded) -> bool:
    observed = [node for node in sample_sites(found.trace) if node["is_observed"]]
    if len(observed) != 1:
        return False
    node: Any = found.trace.nodes[str(found.site)]
    x = observed[0]["value"]
    with torch.no_grad(), evaluation_mode(found.decoder, found.likelihood):
        z = batch.data_first(node["value"], node, node["fn"].event_dim)[0]
        eta = found.decoder(z, *found.beside)
        fn = found.likelihood(eta if found.shift is None else eta + found.shift.reshape(eta.shape))
        if fn.batch_shape + fn.event_shape != x.shape or len(x) != batch.num_data:
            return False
        own = fn.log_prob(x).reshape(len(x), -1).sum(1)
        density = log_density(batch, observed, 1, False)[0]
    return torch.allclose(own.expand_as(density), density, rtol=1e-4, atol=1e-4)


def _likelihood(batch: Batch, calls: list[_Call], eta: Any) -> Any:
    """The only module that makes a distribution of the output, or the attribute ``likelihood`` of the model."""
    makers = {
        id(call.module): call.module
        for call in calls
        if isinstance(call.output, torch.distributions.Distribution) and call.argument is eta
    }
    return next(iter(makers.values())) if len(makers) == 1 else part_of(batch.model, "likelihood")


def _shift(calls: list[_Call], module: nn.Module, likelihood: Any) -> Tensor | None:
    """What the likelihood's argument has beyond the output of a module; None for nothing."""
    output = next((call.output for call in calls if call.module is module), None)
    for call in calls:
        eta = call.argument
        if call.module is likelihood and isinstance(eta, Tensor) and isinstance(output, Tensor) and eta is not output:
            return eta - output if eta.shape == output.shape else None
    return None


def _same_shift(shift: Tensor, other: Tensor | None, output: Tensor) -> bool:
    """Whether a shift of an output is the same at other values of the sites."""
    if other is None or other.shape != shift.shape:
        return False
    rounding = 10 * torch.finfo(shift.dtype).eps ** 0.5
    return torch.allclose(shift, other, rtol=rounding, atol=rounding * float(output.abs().max()))


def _carries(module: nn.Module) -> bool:
    """Whether a module says of itself what a decoder says, see :class:`~pyro_ilvae.protocols.Decoder`."""
    constant = any(getattr(module, name, None) is not None for name in ("inverse_lipschitz", "bounded_part"))
    return constant or (hasattr(module, "latent_dim") and hasattr(module, "event_shape"))


def _site_of(argument: Any, values: dict[str, Tensor]) -> str | None:
    if not isinstance(argument, Tensor):
        return None
    # Points of a guide can be equal at several sites.
    same = [name for name, value in values.items() if argument is value]
    equal = [name for name, value in values.items() if argument.shape == value.shape and torch.equal(argument, value)]
    return next(iter(same + equal), None)


def _outermost(calls: list[_Call], chosen: list[bool]) -> list[int]:
    """The positions of the chosen calls that no other chosen call makes."""
    return [i for i, call in enumerate(calls) if chosen[i] and not any(chosen[j] for j in call.inside)]


@contextmanager
def _watched(named: Any) -> Iterator[list[_Call]]:
    """Collects the calls of modules, in the order in which they begin."""
    calls: list[Any] = []
    inside: list[int] = []

    def before(module: nn.Module, inputs: Any) -> None:
        calls.append(_Call(module, tuple(inside), inputs[0] if inputs else None, tuple(inputs[1:]), None))
        inside.append(len(calls) - 1)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        i = inside.pop()
        calls[i] = calls[i]._replace(output=output)

    with ExitStack() as stack:
        if isinstance(named, nn.Module):
            stack.enter_context(uncompiled(named))
        stack.callback(register_module_forward_pre_hook(before).remove)
        stack.callback(register_module_forward_hook(after).remove)
        yield calls
