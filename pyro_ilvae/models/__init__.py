"""Ready models: each is a PyroModule with the methods ``model`` and ``guide``."""

from pyro_ilvae import _keywords
from pyro_ilvae.models.hierarchical import HierarchicalVAE
from pyro_ilvae.models.layer import Layer
from pyro_ilvae.models.mixture import MixtureVAE
from pyro_ilvae.models.sequential import SequentialVAE
from pyro_ilvae.models.vae import VAE

__all__ = ["VAE", "HierarchicalVAE", "Layer", "MixtureVAE", "SequentialVAE"]

_keywords.pass_on_all_keywords()  # for the argument context of model and guide
