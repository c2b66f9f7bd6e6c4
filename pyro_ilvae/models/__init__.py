"""Ready models, each with its guide in one PyroModule."""

from pyro_ilvae.models.mixture import MixtureVAE
from pyro_ilvae.models.sequential import SequentialVAE
from pyro_ilvae.models.vae import VAE

__all__ = ["VAE", "MixtureVAE", "SequentialVAE"]
