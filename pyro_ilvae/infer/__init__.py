"""Annealing, schedules, ELBO objectives, remedies of collapse and an optimizer, for use with Pyro's own ``SVI``."""

from pyro_ilvae.infer import remedies, schedules
from pyro_ilvae.infer.annealing import AnnealMessenger, anneal
from pyro_ilvae.infer.elbo import AnnealedELBO, NonFiniteLossError
from pyro_ilvae.infer.graph_svi import GraphSVI
from pyro_ilvae.infer.optim import JointOptim
from pyro_ilvae.infer.schedulers import InverseLipschitzScheduler, NatsScheduler
from pyro_ilvae.infer.schedules import Schedule

__all__ = [
    "AnnealMessenger",
    "AnnealedELBO",
    "GraphSVI",
    "InverseLipschitzScheduler",
    "JointOptim",
    "NatsScheduler",
    "NonFiniteLossError",
    "Schedule",
    "anneal",
    "remedies",
    "schedules",
]
