"""Ready models: each is a PyroModule with the methods ``model`` and ``guide``."""

from pyro_ilvae import _keywords
from pyro_ilvae.models.mixture import MixtureVAE
from pyro_ilvae.models.sequential import SequentialVAE
from pyro_ilvae.models.vae import VAE

__all__ = ["VAE", "MixtureVAE", "SequentialVAE"]

_keywords.pass_on_all_keywords()  # for the argument context of model and guide
