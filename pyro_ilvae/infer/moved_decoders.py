"""Decoders whose constant, or its nats, a schedule or a controller moves."""

from typing import Any

__all__ = ["decoder_with", "largest_of", "set_first"]

# Gradients in float32 hold squares of L, which overflow above; see Nats for the nats.
_LARGEST = {"inverse_lipschitz": 1e18, "nats": 40.0}


def decoder_with(name: str, decoder: Any) -> Any:
    """Return a decoder that has an attribute which may be moved, or raise."""
    if isinstance(decoder, type):
        raise TypeError(f"Expected decoder to be a decoder, got the class {decoder.__name__}: pass an object of it")
    if not hasattr(decoder, name):
        hint = ", whose decoder may have one" if hasattr(decoder, "decoder") else ""
        raise ValueError(f"Expected a decoder with an attribute {name} to set, got {type(decoder).__name__}{hint}")
    if getattr(decoder, "minimum_inverse_lipschitz", None) is not None:
        raise ValueError(f"Expected decoder whose constant is not learned, got a {type(decoder).__name__} with one")
    return decoder


def largest_of(decoder: Any, name: str) -> float:
    """The largest value that the attribute may have."""
    lipschitz = getattr(decoder, "lipschitz", None) if name == "inverse_lipschitz" else None
    return _LARGEST[name] if lipschitz is None else min(_LARGEST[name], float(lipschitz))


def set_first(decoder: Any, name: str, value: float) -> None:
    """Set the attribute, or raise where it cannot be set."""
    try:
        setattr(decoder, name, value)
    except AttributeError as error:
        raise ValueError(
            f"Expected a decoder with an attribute {name} to set, got {type(decoder).__name__}, whose {name} "
            f"cannot be set: {error}"
        ) from error
