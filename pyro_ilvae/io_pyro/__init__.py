"""Conversion of Pyro's fits to ArviZ, for any Pyro model: of a guide and of Markov chains."""

from pyro_ilvae.io_pyro.mcmc import from_pyro_mcmc
from pyro_ilvae.io_pyro.svi import from_pyro_svi

__all__ = ["from_pyro_mcmc", "from_pyro_svi"]
