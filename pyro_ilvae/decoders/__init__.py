"""Decoders: maps from the latent variable to natural parameters, plain and with an inverse Lipschitz constant."""

from pyro_ilvae.decoders.bilipschitz import BiLipschitzMap
from pyro_ilvae.decoders.brenier import BrenierMap
from pyro_ilvae.decoders.brenier_transform import BrenierTransform
from pyro_ilvae.decoders.composition import InverseLipschitzDecoder
from pyro_ilvae.decoders.icnn import ICNN
from pyro_ilvae.decoders.learned import LearnedConstant
from pyro_ilvae.decoders.nats import Nats
from pyro_ilvae.decoders.plain import MLPDecoder
from pyro_ilvae.decoders.principal import principal_frame, principal_token_frame
from pyro_ilvae.decoders.projected import ProjectedDecoder

__all__ = [
    "ICNN",
    "BiLipschitzMap",
    "BrenierMap",
    "BrenierTransform",
    "InverseLipschitzDecoder",
    "LearnedConstant",
    "MLPDecoder",
    "Nats",
    "ProjectedDecoder",
    "principal_frame",
    "principal_token_frame",
]
