"""Inverse Lipschitz decoders for Pyro: posterior collapse of variational autoencoders as a dial."""

from pyro_ilvae import control, datasets, diagnostics, infer, likelihoods, plots, protocols
from pyro_ilvae.control import (
    GECO,
    BetaController,
    InverseLipschitzController,
    NatsController,
    PIController,
    measures,
)
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
from pyro_ilvae.encoders import ConvEncoder, MLPEncoder
from pyro_ilvae.infer import (
    AnnealedELBO,
    GraphSVI,
    InverseLipschitzScheduler,
    JointOptim,
    NatsScheduler,
    NonFiniteLossError,
    Schedule,
    anneal,
    remedies,
    schedules,
)
from pyro_ilvae.io_pyro import from_pyro_mcmc, from_pyro_svi
from pyro_ilvae.models import VAE, HierarchicalVAE, Layer, MixtureVAE, SequentialVAE
from pyro_ilvae.monitoring import CollapseMonitor
from pyro_ilvae.networks import mlp
from pyro_ilvae.sequences.decoder import SequenceDecoder
from pyro_ilvae.sequences.encoder import SequenceEncoder
from pyro_ilvae.sequences.histories import RecurrentHistory, TransformerHistory

__version__ = "0.1.0"

__all__ = [
    "GECO",
    "ICNN",
    "VAE",
    "AnnealedELBO",
    "BetaController",
    "BiLipschitzMap",
    "BrenierMap",
    "BrenierTransform",
    "CollapseMonitor",
    "ConvEncoder",
    "GraphSVI",
    "HierarchicalVAE",
    "InverseLipschitzController",
    "InverseLipschitzDecoder",
    "InverseLipschitzScheduler",
    "JointOptim",
    "Layer",
    "LearnedConstant",
    "MLPDecoder",
    "MLPEncoder",
    "MixtureVAE",
    "Nats",
    "NatsController",
    "NatsScheduler",
    "NonFiniteLossError",
    "PIController",
    "ProjectedDecoder",
    "RecurrentHistory",
    "Schedule",
    "SequenceDecoder",
    "SequenceEncoder",
    "SequentialVAE",
    "TransformerHistory",
    "anneal",
    "control",
    "datasets",
    "diagnostics",
    "from_pyro_mcmc",
    "from_pyro_svi",
    "infer",
    "likelihoods",
    "measures",
    "mlp",
    "plots",
    "principal_frame",
    "principal_token_frame",
    "protocols",
    "remedies",
    "schedules",
]
