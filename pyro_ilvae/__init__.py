"""Inverse Lipschitz decoders for Pyro: posterior collapse of variational autoencoders as a dial."""

from pyro_ilvae import datasets, diagnostics, infer, likelihoods, plots, text
from pyro_ilvae.compilation import compiled
from pyro_ilvae.convex import ICNN
from pyro_ilvae.decoders import InverseLipschitzDecoder, ProjectedDecoder
from pyro_ilvae.encoders import ConvEncoder, MLPEncoder
from pyro_ilvae.frames import principal_frame, principal_token_frame
from pyro_ilvae.histories import RecurrentHistory, TransformerHistory
from pyro_ilvae.infer import AnnealedELBO, InverseLipschitzScheduler, JointOptim, anneal, schedules
from pyro_ilvae.io_pyro import from_pyro_mcmc, from_pyro_svi
from pyro_ilvae.maps import BrenierMap, BrenierTransform
from pyro_ilvae.models import VAE, MixtureVAE, SequentialVAE
from pyro_ilvae.networks import MLPDecoder, mlp
from pyro_ilvae.sequence_decoders import (
    InverseLipschitzSequenceDecoder,
    ProjectedSequenceDecoder,
    SequenceDecoder,
)
from pyro_ilvae.sequence_encoders import SequenceEncoder

__version__ = "0.1.0"

__all__ = [
    "ICNN",
    "VAE",
    "AnnealedELBO",
    "BrenierMap",
    "BrenierTransform",
    "ConvEncoder",
    "InverseLipschitzDecoder",
    "InverseLipschitzScheduler",
    "InverseLipschitzSequenceDecoder",
    "JointOptim",
    "MLPDecoder",
    "MLPEncoder",
    "MixtureVAE",
    "ProjectedDecoder",
    "ProjectedSequenceDecoder",
    "RecurrentHistory",
    "SequenceDecoder",
    "SequenceEncoder",
    "SequentialVAE",
    "TransformerHistory",
    "anneal",
    "compiled",
    "datasets",
    "diagnostics",
    "from_pyro_mcmc",
    "from_pyro_svi",
    "infer",
    "likelihoods",
    "mlp",
    "plots",
    "principal_frame",
    "principal_token_frame",
    "schedules",
    "text",
]
