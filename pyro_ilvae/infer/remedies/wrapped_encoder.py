"""An encoder around another one, which fits wherever the inner one does."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.networks import Module, unused

__all__ = ["WrappedEncoder", "location_and_scale_of"]

# What models ask an encoder for.
_ATTRIBUTES = ("event_shape", "latent_dim", "context_dim", "takes_mask", "vocab_size")


class WrappedEncoder(Module):
    """An encoder whose location and scale are a function of those that another encoder gives.

    Args:
        encoder: a module or function from data to location and scale, each of shape (..., K), which may take a context
            and a mask.
    """

    _kind = "encoder"

    def __init__(self, encoder: Callable[..., Any]) -> None:
        super().__init__()
        kind = "a module or a function, such as MLPEncoder(...)"
        _checks.function("encoder", encoder, kind)
        if getattr(encoder, "_kind", "encoder") != "encoder":
            raise TypeError(f"Expected encoder to be {kind}, got a {type(encoder).__name__}")
        if getattr(encoder, "num_components", None) is not None:
            raise ValueError(
                "Expected encoder with one location and scale for each datum, got one with num_components = "
                f"{encoder.num_components}"  # type: ignore[attr-defined]
            )
        for name in _ATTRIBUTES:
            if hasattr(encoder, name):
                setattr(self, name, getattr(encoder, name))
        # Without these attributes, models go by the arguments that an encoder has.
        for name, attribute, nothing in (("context", "context_dim", None), ("mask", "takes_mask", False)):
            if not hasattr(encoder, attribute) and name not in _arguments(encoder):
                setattr(self, attribute, nothing)
        self.encoder = unused(encoder)

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Location and scale, each of shape (..., K).

        Args:
            x: as for the inner encoder.
            context: as for the inner encoder.
            mask: as for the inner encoder.
        """
        beside = {name: value for name, value in (("context", context), ("mask", mask)) if value is not None}
        loc, scale = location_and_scale_of(self.encoder(x, **beside))
        if loc.shape != scale.shape or loc.dim() == 0:
            raise ValueError(
                f"Expected encoder to return location and scale of one shape, got {tuple(loc.shape)} and "
                f"{tuple(scale.shape)}"
            )
        return self._changed(loc, scale)

    def _changed(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale in place of the inner encoder's."""
        raise NotImplementedError


def location_and_scale_of(output: Any) -> tuple[Tensor, Tensor]:
    """What an encoder returned, checked to be a location and a scale."""
    if not isinstance(output, tuple | list) or len(output) != 2 or not all(isinstance(one, Tensor) for one in output):
        kinds = [type(one).__name__ for one in output] if isinstance(output, tuple | list) else type(output).__name__
        raise ValueError(f"Expected encoder to return a location and a scale, got {kinds}")
    loc, scale = output
    return loc, scale


def _arguments(encoder: Any) -> set[str]:
    try:
        return set(signature(getattr(encoder, "forward", encoder)).parameters)
    except (TypeError, ValueError):  # no signature is known
        return set()
