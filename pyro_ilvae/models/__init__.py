"""Ready models: each is a PyroModule with the methods ``model`` and ``guide``."""

from pyro_ilvae.models.mixture import MixtureVAE
from pyro_ilvae.models.sequential import SequentialVAE
from pyro_ilvae.models.vae import VAE

__all__ = ["VAE", "MixtureVAE", "SequentialVAE"]
