"""Controllers: an inverse Lipschitz constant, its nats, or the weight of the KL, moved until a measure is on target."""

from pyro_ilvae.control import measures
from pyro_ilvae.control.beta import GECO, BetaController, PIController
from pyro_ilvae.control.constants import InverseLipschitzController, NatsController
from pyro_ilvae.control.controller import Controller
from pyro_ilvae.control.measures import Measure

__all__ = [
    "GECO",
    "BetaController",
    "Controller",
    "InverseLipschitzController",
    "Measure",
    "NatsController",
    "PIController",
    "measures",
]
