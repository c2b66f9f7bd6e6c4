"""Common remedies of posterior collapse, as pieces that can be put together, for any model."""

from pyro_ilvae.infer.remedies.free_bits import FreeBitsELBO

__all__ = ["FreeBitsELBO"]
