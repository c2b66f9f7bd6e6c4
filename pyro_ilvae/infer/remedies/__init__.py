"""Common remedies of posterior collapse, as pieces that can be put together, for any model."""

from pyro_ilvae.infer.remedies.aggressive import AggressiveInference
from pyro_ilvae.infer.remedies.batch_norm import BatchNormEncoder
from pyro_ilvae.infer.remedies.free_bits import FreeBitsELBO
from pyro_ilvae.infer.remedies.latent_reconstruction import LatentReconstruction
from pyro_ilvae.infer.remedies.linear_path import LinearPath
from pyro_ilvae.infer.remedies.minimum_kl import MinimumKLEncoder

__all__ = [
    "AggressiveInference",
    "BatchNormEncoder",
    "FreeBitsELBO",
    "LatentReconstruction",
    "LinearPath",
    "MinimumKLEncoder",
]
