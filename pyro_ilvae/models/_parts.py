"""Whether the parts of a model fit together."""

from typing import Any

import torch
from torch import nn

from pyro_ilvae import _checks


def check_roles(decoder: Any, encoder: Any, likelihood: Any) -> None:
    """Raise unless the parts can be called, and none of them is known to be a part of another kind."""
    given = {"decoder": (decoder, "MLPDecoder(...)"), "encoder": (encoder, "MLPEncoder(...)")}
    for name, (part, example) in {**given, "likelihood": (likelihood, "likelihoods.Normal()")}.items():
        _checks.function(name, part, f"a module or a function, such as {example}")
        if isinstance(part, torch.distributions.Distribution):
            raise TypeError(f"Expected {name} to be a function that returns a distribution, got a distribution")
        kind = getattr(part, "_kind", name)  # Modules of users need not say what they are.
        if kind != name:
            raise TypeError(f"Expected {name} to be such as {example}, got a {type(part).__name__}, which is a {kind}")


def check_nats(decoder: Any, likelihood: Any, name: str = "likelihood") -> None:
    """Raise where a constant in nats is relative to the noise of another likelihood than ``name``, that of the data."""
    nats = getattr(decoder, "_nats", None)
    if nats is None or nats.likelihood is likelihood or not isinstance(likelihood, nn.Module):
        return
    expected, parts = type(nats.likelihood), list(likelihood.modules())
    if nats.is_reference:  # the unit is a number, so that only the kind of noise matters
        if issubclass(expected, nn.Module) and not any(isinstance(part, expected) for part in parts):
            raise ValueError(
                f"Expected {name} to be a {expected.__name__}, as in the decoder's inverse_lipschitz, Nats(kappa, "
                f"likelihood), got a {type(likelihood).__name__}"
            )
    elif not any(part is nats.likelihood for part in parts):
        raise ValueError(
            f"Expected {name} to be the one of the decoder's inverse_lipschitz, Nats(kappa, {name}), whose "
            f"noise L follows, got another {type(likelihood).__name__}"
        )


def check_bound(encoder: Any, prior: Any, name: str = "encoder") -> None:
    """Raise for an encoder with a bound on its divergence to another prior: a prior, or words for one of another kind.

    A remedy of collapse says so by its method ``_check_prior``.
    """
    check = getattr(encoder, "_check_prior", None)
    if check is None:
        return
    if not isinstance(prior, str):
        check(prior)
        return
    raise ValueError(
        f"Expected {name} without a bound on its divergence to a fixed Normal prior, got a {type(encoder).__name__}, "
        f"for {prior}"
    )


def agreed(name: str, values: dict[str, Any]) -> Any:
    """The value that all sources which are not None agree on."""
    named = {source: value for source, value in values.items() if value is not None}
    if not named:
        raise ValueError(f"Expected {name} as an argument, got None and no part with this attribute")
    first, *others = named.values()
    if any(other != first for other in others):
        raise ValueError(
            f"Expected one {name}, got " + ", ".join(f"{source} = {value}" for source, value in named.items())
        )
    return first
